package raftmeta

import (
	"errors"
	"sync"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
)

// errFetching: an entry's bytes are on their way; who waits for the partition is woken when they are here.
var errFetching = errors.New("raftmeta: the entry is being fetched")

// view is what readers see of a group, a voter's instance or a follower's.
type view struct {
	mu    sync.RWMutex // Apply holds it for writing, readers for reading
	shard *state.Shard // of a shard; nil for meta
	meta  *state.Meta  // of meta; nil for a shard

	watch  watchers
	recent recentIndex
}

// shardOf is the shard of a partition; 0 if there is no such partition.
func shardOf(c *state.Cluster, tp record.TopicPartition) record.ShardID {
	t, ok := c.TopicByID(tp.Topic)
	if !ok || tp.Partition < 0 || int(tp.Partition) >= len(t.Partitions) {
		return 0
	}
	return t.Partitions[tp.Partition].Shard
}

func (v *view) partition(tp record.TopicPartition) (state.PartitionInfo, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	info, ok := v.shard.Partition(tp)
	if !ok {
		return info, ErrUnknownPartition
	}
	return info, nil
}

func (v *view) epochEnd(tp record.TopicPartition, epoch record.LeaderEpoch) (record.LeaderEpoch, record.Offset) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.shard.EpochEnd(tp, epoch)
}

func (v *view) bounds(tp record.TopicPartition) (tiering.Bounds, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	i, ok := v.shard.Partition(tp)
	return boundsOf(&i), ok
}

func (v *view) runs(tp record.TopicPartition, from record.Offset, max int) []tiering.RunRef {
	v.mu.RLock()
	defer v.mu.RUnlock()
	runs := v.shard.Runs(tp, from, max, nil)
	out := make([]tiering.RunRef, 0, len(runs))
	for _, r := range runs {
		if o, ok := v.shard.Object(r.Object); ok {
			out = append(out, tiering.RunRef{Run: r, Object: o})
		}
	}
	return out
}

func (v *view) hotRangeOf(tp record.TopicPartition) (tiering.HotRange, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	p, ok := v.shard.Partition(tp)
	if !ok {
		return tiering.HotRange{}, false
	}
	return v.hotRange(&p)
}

// hotRange describes what a partition has to seal. mu is held.
func (v *view) hotRange(p *state.PartitionInfo) (tiering.HotRange, bool) {
	if p.HighWatermark <= p.SealedEnd {
		return tiering.HotRange{}, false
	}
	refs := v.shard.HotRefs(p.TP, p.SealedEnd, 1, nil)
	if len(refs) == 0 {
		return tiering.HotRange{}, false
	}
	return tiering.HotRange{TP: p.TP, Start: p.SealedEnd, End: p.HighWatermark - 1, Bytes: p.HotBytes, Class: p.Config.Class, Oldest: refs[0].At,
		Epochs: v.shard.Epochs(p.TP)}, true
}
