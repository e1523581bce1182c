package peer

import (
	"testing"
	"time"
)

// With every answer to an append a voter says what time it has and how much room.
func TestAnswersReport(t *testing.T) {
	ahead := func(n *node) time.Duration { return time.Duration(n.id[0]-'0') * time.Hour }
	c := newClusterOf(t, 3, func(n *node) {
		n.slow = true
		n.now = func() time.Time { return time.Now().Add(ahead(n)) }
		n.free = func() int64 { return 10 - 10*int64(n.id[0]-'0') }
	})
	lead := c.elect()
	for _, n := range c.nodes {
		if n == lead {
			continue
		}
		var r Report
		eventually(t, "a report", func() (ok bool) { r, ok = lead.peers.Report(n.id, time.Hour); return ok })
		if r.Free != n.free() {
			t.Errorf("%s has %d bytes, want %d", n.id, r.Free, n.free())
		}
		if off := r.Now().Sub(time.Now().Add(ahead(n))).Abs(); off > time.Minute {
			t.Errorf("the clock of %s is off by %s", n.id, off)
		}
		n.stop()
		if _, ok := lead.peers.Report(n.id, 0); ok {
			t.Error("what was said before now counts as said now")
		}
	}
	if _, ok := lead.peers.Report(lead.id, time.Hour); ok {
		t.Error("a node reports to itself")
	}
}
