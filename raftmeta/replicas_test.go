package raftmeta

import (
	"fmt"
	"slices"
	"testing"

	"github.com/estran/estran/tiering/record"
)

// Every node shows the same voters, the preferred one first, and whom the leader hears: also those that do not lead. Who is gone is shown no more, who is back is.
func TestReplicas(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	all := []int32{1, 2, 3}
	see := func(h *Host, s record.ShardID, want []int32) {
		t.Helper()
		until(t, fmt.Sprintf("node %d to see %v in sync in shard %d", h.NodeID(), want, s), func() bool { return slices.Equal(h.Replicas(s).InSync, want) })
	}
	for _, h := range c.hosts {
		if h.Voters() != 3 {
			t.Errorf("node %d sees %d voters", h.NodeID(), h.Voters())
		}
		for s := range record.ShardID(2) {
			see(h, s+1, all)
			want := [][]int32{{1, 2, 3}, {2, 3, 1}}[s]
			if got := h.Replicas(s + 1).Voters; !slices.Equal(got, want) {
				t.Errorf("node %d, shard %d: %v, want %v", h.NodeID(), s+1, got, want)
			}
		}
	}
	c.stop(2)
	for _, h := range c.alive() {
		for s := range record.ShardID(2) {
			see(h, s+1, []int32{1, 2})
			if got := len(h.Replicas(s + 1).Voters); got != 3 {
				t.Errorf("%d voters", got)
			}
		}
	}
	c.start(2)
	for _, h := range c.hosts {
		see(h, 1, all)
	}
	if r := c.hosts[0].Replicas(99); r.Voters != nil || r.InSync != nil {
		t.Errorf("a shard that does not exist: %+v", r)
	}
}
