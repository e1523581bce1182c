package raftmeta

import "testing"

// Everyone who has listened is woken by the next ring, once; a ring that nobody waits for costs nothing and wakes nobody later.
func TestBell(t *testing.T) {
	var b bell
	rung := func(ch <-chan struct{}) bool {
		select {
		case <-ch:
			return true
		default:
			return false
		}
	}
	if n := testing.AllocsPerRun(10, b.ring); n != 0 {
		t.Errorf("%v allocations", n)
	}
	first, second := b.listen(), b.listen()
	if rung(first) || rung(second) {
		t.Error("it rang before")
	}
	b.ring()
	if !rung(first) || !rung(second) || rung(b.listen()) {
		t.Error("the ring was not heard, or twice")
	}
}
