package peer

import (
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/raft"
)

// Only what a server holds durably and for ever is remembered of it: its term, and what it confirmed and was committed.
func TestWhatIsRemembered(t *testing.T) {
	entries := []*raft.Log{{Index: 6}, {Index: 7}, {Index: 8}}
	for _, c := range []struct {
		name string
		a    raft.AppendEntriesRequest
		resp raft.AppendEntriesResponse
		want Standing
	}{
		{"committed in part", raft.AppendEntriesRequest{PrevLogEntry: 5, PrevLogTerm: 1, Entries: entries, LeaderCommitIndex: 7}, raft.AppendEntriesResponse{Term: 3, Success: true, LastLog: 9}, Standing{3, 7}},
		{"not all of what is committed", raft.AppendEntriesRequest{PrevLogEntry: 5, PrevLogTerm: 1, Entries: entries, LeaderCommitIndex: 70}, raft.AppendEntriesResponse{Term: 3, Success: true, LastLog: 8}, Standing{3, 8}},
		{"refused", raft.AppendEntriesRequest{PrevLogEntry: 5, PrevLogTerm: 1, Entries: entries, LeaderCommitIndex: 7}, raft.AppendEntriesResponse{Term: 4, LastLog: 9}, Standing{4, 0}},
		{"heartbeat", raft.AppendEntriesRequest{}, raft.AppendEntriesResponse{Term: 3, Success: true, LastLog: 9}, Standing{3, 0}},
	} {
		if got := standingIn(&c.a, &c.resp); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
	var m memory
	for _, s := range []Standing{{3, 7}, {4, 0}, {2, 9}, {1, 1}} {
		m.note("a", 1, s)
	}
	known := m.of("a")[1]
	if known != (Standing{4, 9}) || m.of("b") != nil {
		t.Errorf("%+v is remembered", known)
	}
	for s, behind := range map[Standing]bool{{4, 9}: false, {5, 10}: false, {3, 10}: true, {5, 8}: true} {
		if why := known.Behind(s); (why != "") != behind {
			t.Errorf("%+v: %q", s, why)
		}
	}
}

// A node learns, whenever it connects, that a peer remembers more of it than it has; and nothing of the kind while all is well, through elections and catching up.
func TestWhoIsBehindIsTold(t *testing.T) {
	c := newCluster(t, 3, false)
	var mu sync.Mutex
	var said []string
	for _, n := range c.nodes {
		n.stop()
		n.behind = func(_ uint32, why string) {
			mu.Lock()
			defer mu.Unlock()
			said = append(said, why)
		}
	}
	told := func(by string) bool { // by whom, or "" by anybody
		mu.Lock()
		defer mu.Unlock()
		return slices.ContainsFunc(said, func(why string) bool { return strings.Contains(why, "remembers it had") && strings.Contains(why, by) })
	}
	for _, n := range c.nodes {
		n.start(c.first)
	}
	c.write(0, 20, func(uint64) int { return 1000 })
	for _, n := range c.nodes {
		n.stop()
		n.start(c.first)
		c.write(20, 21, func(uint64) int { return 1000 })
	}
	mu.Lock()
	if len(said) > 0 {
		t.Errorf("all is well, and one is told: %s", said)
	}
	said = nil
	mu.Unlock()
	a, b := c.nodes[0], c.nodes[1]
	for _, n := range c.nodes {
		if n != b { // whoever leads connects to it
			n.peers.memory.note(b.id, 1, Standing{LastIndex: 1 << 40})
		}
	}
	b.stop()
	b.start(c.first)
	eventually(t, "it to be told", func() bool { return told("") })
	eventually(t, "it to have an instance", func() bool { return b.raft.Load() != nil })
	addr, _ := c.net.resolve(a.id)
	mu.Lock()
	said = nil
	mu.Unlock()
	eventually(t, "an answer", func() bool { _, err := b.peers.Ask(t.Context(), addr); return err == nil })
	if !told(a.id) {
		t.Error("it is not told though it asks")
	}
}

// Whoever has connected is asked back until it has answered: its connection may last for days.
func TestAskingBackIsRepeated(t *testing.T) {
	c := newCluster(t, 3, true)
	lead := c.leader()
	b := c.nodes[slices.IndexFunc(c.nodes, func(n *node) bool { return n != lead })]
	told := make(chan string, 100)
	b.stop()
	b.behind = func(_ uint32, why string) {
		select {
		case told <- why:
		default:
		}
	}
	b.fails.Store(3) // it follows, and connects to nobody else
	lead.peers.memory.note(b.id, 1, Standing{LastIndex: 1 << 40})
	b.start(c.first)
	if why := <-told; !strings.Contains(why, lead.id) || b.fails.Load() >= 0 {
		t.Errorf("%q, %d connections still to fail", why, b.fails.Load())
	}
}
