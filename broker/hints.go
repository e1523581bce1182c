package broker

import (
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// hints tell a client that came to the wrong node where the leaders are (KIP-951), so that it need not ask for Metadata first.
type hints struct {
	r     *request
	nodes map[int32]bool // that were named
}

// leader returns the tagged field with a partition's leader and its epoch; nil if the error is another, or no leader is known.
func (h *hints) leader(tag uint32, code int16, t *state.Topic, partition int32) []taggedField {
	if code != codeNotLeaderOrFollower && code != codeFencedLeaderEpoch || t == nil || partition < 0 || int(partition) >= len(t.Partitions) {
		return nil
	}
	node, ok := h.r.s.b.Leader(t.Partitions[partition].Shard)
	if !ok {
		return nil
	}
	info, err := h.r.s.b.Partition(record.TopicPartition{Topic: t.ID, Partition: partition})
	if err != nil && !errors.Is(err, raftmeta.ErrNotLeader) {
		return nil
	}
	if h.nodes == nil {
		h.nodes = map[int32]bool{}
	}
	h.nodes[node] = true
	b := binary.BigEndian.AppendUint32(nil, uint32(node))
	b = binary.BigEndian.AppendUint32(b, uint32(info.LeaderEpoch))
	return []taggedField{{tag, append(b, 0)}}
}

// leaderWait is how long an answer waits for somebody to lead a partition that nobody leads at this moment: most elections are over by then. A client that is told no leader asks for
// Metadata, and some do that only every five seconds.
const leaderWait = 500 * time.Millisecond

// leaderless adds a partition's shard to those that nobody leads, if that is what its error comes from.
func (r *request) leaderless(shards map[record.ShardID]bool, code int16, topic *state.Topic, partition int32) map[record.ShardID]bool {
	if code != codeNotLeaderOrFollower || topic == nil || partition < 0 || int(partition) >= len(topic.Partitions) {
		return shards
	}
	s := topic.Partitions[partition].Shard
	if _, ok := r.s.b.Leader(s); ok {
		return shards
	}
	if shards == nil {
		shards = map[record.ShardID]bool{}
	}
	shards[s] = true
	return shards
}

// awaitLeaders waits until all these shards are led, so that the answer can say by whom.
func (r *request) awaitLeaders(shards map[record.ShardID]bool, limit time.Duration) {
	ctx, cancel := r.timeout(min(limit, leaderWait))
	defer cancel()
	for s := range shards {
		r.s.b.AwaitLeader(ctx, s)
	}
}

// endpoints returns the tagged field with the addresses of the nodes that were named.
func (h *hints) endpoints(tag uint32) []taggedField {
	if len(h.nodes) == 0 {
		return nil
	}
	var known []state.Node
	for _, id := range slices.Sorted(maps.Keys(h.nodes)) {
		if n, ok := h.r.s.b.Cluster().Node(id); ok {
			known = append(known, n)
		}
	}
	w := &writer{flex: true}
	w.array(len(known))
	for _, n := range known {
		w.i32(n.ID)
		w.str(n.Host)
		w.i32(n.Port)
		w.text(n.Rack)
		w.tags()
	}
	return []taggedField{{tag, w.b}}
}
