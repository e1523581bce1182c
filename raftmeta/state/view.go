package state

import (
	"iter"
	"maps"
	"slices"

	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// PartitionInfo is what readers see of a partition. All offsets but SealedEnd and HighWatermark are those of records; these two are exclusive.
type PartitionInfo struct {
	TP                              record.TopicPartition
	Handle                          uint64
	Config                          PartitionConfig
	LogStart, SealedEnd             record.Offset
	HighWatermark, LastStableOffset record.Offset
	LeaderEpoch                     record.LeaderEpoch // in the term whose LeaderStart was applied
	HotBytes, SealedBytes           int64
	MaxTimestamp                    record.Timestamp
	Producers, Runs                 int
}

func (s *Shard) info(p *partition) PartitionInfo {
	return PartitionInfo{TP: p.TP, Handle: p.Handle, Config: p.Config, LogStart: p.LogStart, SealedEnd: p.SealedEnd, HighWatermark: p.High,
		LastStableOffset: p.High, LeaderEpoch: Epoch(p.EpochBase, s.leader.Term), HotBytes: p.HotBytes, SealedBytes: p.RunBytes,
		MaxTimestamp: p.MaxTime, Producers: len(p.Producers), Runs: len(p.Runs)}
}

// Partition returns a partition's state; ok is false if the shard does not have it.
func (s *Shard) Partition(tp record.TopicPartition) (PartitionInfo, bool) {
	if p := s.find(tp); p != nil {
		return s.info(p), true
	}
	return PartitionInfo{}, false
}

// Handle returns the partition's handle for Slot.Handle; 0 if the shard does not have it.
func (s *Shard) Handle(tp record.TopicPartition) uint64 { return s.byTP[tp] }

// Partitions yields every partition, by handle.
func (s *Shard) Partitions() iter.Seq[PartitionInfo] {
	return func(yield func(PartitionInfo) bool) {
		for _, p := range s.parts {
			if p != nil && !yield(s.info(p)) {
				return
			}
		}
	}
}

// HotRef locates consecutive batches of a partition in one raft entry: Count slots of its directory from First on.
type HotRef struct {
	Index        RaftIndex
	Term         Term
	Base, End    record.Offset // End exclusive
	First, Count int
	Bytes        int64
	At           record.Timestamp // shard clock when it was appended
}

// HotRefs appends to out up to max refs of tp, from the one that holds offset `from` on.
func (s *Shard) HotRefs(tp record.TopicPartition, from record.Offset, max int, out []HotRef) []HotRef {
	p := s.find(tp)
	if p == nil {
		return out
	}
	for i := p.refAt(from); i < len(p.Hot) && max > 0; i++ {
		if p.refEnd(i) <= from {
			continue
		}
		r := p.Hot[i]
		e := s.entries[r.Entry-s.entBase]
		out = append(out, HotRef{e.Index, e.Term, r.Base, p.refEnd(i), int(r.First), int(r.Count), int64(r.Bytes), e.At})
		max--
	}
	return out
}

// HotStart returns the offset from which on tp is hot: its high watermark if nothing is.
func (s *Shard) HotStart(tp record.TopicPartition) record.Offset {
	p := s.find(tp)
	if p == nil || len(p.Hot) == 0 {
		if p == nil {
			return 0
		}
		return p.High
	}
	return p.Hot[0].Base
}

// EpochAt returns the leader epoch in which the record at offset was appended.
func (s *Shard) EpochAt(tp record.TopicPartition, offset record.Offset) record.LeaderEpoch {
	if p := s.find(tp); p != nil {
		return p.epochAt(offset)
	}
	return -1
}

// EpochEnd answers OffsetForLeaderEpoch (KIP-320): the largest epoch at or below the asked one and the offset behind its last record; -1, -1
// for an epoch that has not been. As in Kafka, an epoch from before the log start ended there.
func (s *Shard) EpochEnd(tp record.TopicPartition, asked record.LeaderEpoch) (record.LeaderEpoch, record.Offset) {
	p := s.find(tp)
	if p == nil || asked < 0 {
		return -1, -1
	}
	switch cur := Epoch(p.EpochBase, s.leader.Term); {
	case asked > cur:
		return -1, -1
	case asked == cur:
		return cur, p.High
	}
	return p.epochEnd(asked)
}

// Epochs returns a partition's leader-epoch history; it must not be changed.
func (s *Shard) Epochs(tp record.TopicPartition) []segment.EpochStart {
	if p := s.find(tp); p != nil {
		return p.Epochs
	}
	return nil
}

// LastSequence returns the last sequence that was accepted from a producer in this epoch; ok is false if none is known.
func (s *Shard) LastSequence(tp record.TopicPartition, id record.ProducerID, epoch record.ProducerEpoch) (last record.Sequence, ok bool) {
	p := s.find(tp)
	if p == nil {
		return 0, false
	}
	pr := p.Producers[id]
	if pr == nil || pr.Epoch != epoch || len(pr.Batches) == 0 {
		return 0, false
	}
	return pr.Batches[len(pr.Batches)-1].Last, true
}

// Producers returns what the object that seals a partition up to its high watermark says of its producers, by ID.
func (s *Shard) Producers(tp record.TopicPartition) []segment.ProducerState {
	p := s.find(tp)
	if p == nil {
		return nil
	}
	var out []segment.ProducerState
	for _, id := range slices.Sorted(maps.Keys(p.Producers)) {
		pr := p.Producers[id]
		last := pr.Batches[len(pr.Batches)-1]
		out = append(out, segment.ProducerState{ID: id, Epoch: pr.Epoch, LastSequence: last.Last, LastOffset: last.Base + record.Offset((last.Last-last.First)&0x7fffffff), Timestamp: pr.At})
	}
	return out
}

// Runs appends to out up to max runs of tp, from the one that holds offset `from`, or the first behind it.
func (s *Shard) Runs(tp record.TopicPartition, from record.Offset, max int, out []segment.Run) []segment.Run {
	p := s.find(tp)
	if p == nil {
		return out
	}
	i := p.runAt(from)
	return append(out, p.Runs[i:min(len(p.Runs), i+max)]...)
}

// Object returns an entry of the object table.
func (s *Shard) Object(n segment.Number) (segment.Object, bool) {
	if o := s.objects[n]; o != nil {
		return *o, true
	}
	return segment.Object{}, false
}

// Doomed returns the tombstoned objects, by number; without those of which it is not known yet since when, because the clock has stood and has not gone on.
func (s *Shard) Doomed() []segment.Object {
	var out []segment.Object
	for _, o := range s.sortedObjects() {
		if o.State == segment.Tombstoned && !(s.stood && o.Since == s.clock) {
			out = append(out, *o)
		}
	}
	return out
}

// Objects counts the objects per state.
func (s *Shard) Objects() map[segment.ObjectState]int {
	out := map[segment.ObjectState]int{}
	for _, o := range s.objects {
		out[o.State]++
	}
	return out
}

// Group returns a group's state, which must not be changed; nil if there is none.
func (s *Shard) Group(id string) *Group { return s.groups[id] }

// Groups yields every group, by ID.
func (s *Shard) Groups() iter.Seq[*Group] {
	return func(yield func(*Group) bool) {
		for _, id := range slices.Sorted(maps.Keys(s.groups)) {
			if !yield(s.groups[id]) {
				return
			}
		}
	}
}

// OldestHot returns the index of the oldest entry that holds hot batches; ok is false if there are none.
func (s *Shard) OldestHot() (index RaftIndex, at record.Timestamp, ok bool) {
	if len(s.entries) == 0 {
		return 0, 0, false
	}
	return s.entries[0].Index, s.entries[0].At, true
}

// Small accessors.

// ID is the shard's number.
func (s *Shard) ID() record.ShardID { return s.id }

// Applied is the index of the last command applied.
func (s *Shard) Applied() RaftIndex { return s.applied }

// Clock is the shard's replicated clock.
func (s *Shard) Clock() record.Timestamp { return s.clock }

// Leader is the last LeaderStart applied.
func (s *Shard) Leader() LeaderStart { return s.leader }

// Cursor is the last effect of meta that was applied.
func (s *Shard) Cursor() uint64 { return s.cursor }

// ChainHash is the hash over every command entry applied.
func (s *Shard) ChainHash() [16]byte { return s.chain }

// HotBytes is the size of all hot batches.
func (s *Shard) HotBytes() int64 { return s.hotBytes }

// SealedBytes is the size of all runs.
func (s *Shard) SealedBytes() int64 { return s.runBytes }

// Voids counts entries that were applied as void because of their term.
func (s *Shard) Voids() uint64 { return s.voids }
