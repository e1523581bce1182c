package raftmeta

import "testing"

// Clients are not told of a node that does not answer, until it does again. A node that reaches no majority says nobody is down.
func TestDownNodes(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	c.stop(0)
	for _, h := range c.alive() {
		until(t, "node 1 to be found down", func() bool { return h.Down(1) })
		if h.Down(2) || h.Down(3) {
			t.Error("who answers is down")
		}
	}
	c.start(0)
	for _, h := range c.alive() {
		until(t, "node 1 to be found up", func() bool { return !h.Down(1) })
	}
	c.stop(1)
	until(t, "node 2 to be found down", func() bool { return c.hosts[0].Down(2) })
	c.stop(2)
	h := c.hosts[0]
	until(t, "node 3 not to answer either", func() bool {
		h.down.mu.Lock()
		defer h.down.mu.Unlock()
		return h.down.down[3]
	})
	if h.Down(2) || h.Down(3) {
		t.Error("a node that is alone says others are down")
	}
}
