package broker

import (
	"encoding/binary"
	"errors"
	"maps"
	"slices"

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
