package peer

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// Entries of all sizes reach every voter as they were, also one that has been away.
func TestReplicationAndCatchUp(t *testing.T) {
	c := newCluster(t, 3, true)
	size := func(v uint64) int { return []int{0, 10, 1000, 70_000, 300_000}[v%5] }
	c.write(0, 30, size)
	c.agree(30)
	away := c.nodes[0]
	if away.leads() {
		away = c.nodes[1]
	}
	away.stop()
	c.write(30, 80, size)
	away.start(c.first)
	c.write(80, 90, size)
	c.agree(90)
	for _, n := range c.nodes {
		if n != away && !n.leads() && n.back.Load() == 0 {
			t.Errorf("%s gave back the memory of no request", n.id)
		}
	}
}

// Many proposals at once go through the pipeline and keep what each was.
func TestConcurrentProposals(t *testing.T) {
	c := newCluster(t, 3, true)
	lead := c.leader()
	var wg sync.WaitGroup
	for w := range uint64(8) {
		wg.Go(func() {
			for i := range uint64(30) {
				if err := lead.propose(1000+w*100+i, int(i)*1000); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	c.write(0, 1, func(uint64) int { return 5 << 20 }) // larger than a window's call and a frame
	c.agree(1)
	if n := len(lead.fsm.all()); n != 241 {
		t.Errorf("%d values", n)
	}
}

// A voter whose log ends below the leader's base gets a snapshot, while entries go on being written, and then the entries above it.
func TestInstallWhileWriting(t *testing.T) {
	c := newCluster(t, 3, true)
	size := func(uint64) int { return 100_000 }
	c.write(0, 5, size)
	away := c.nodes[0]
	if away.leads() {
		away = c.nodes[1]
	}
	away.stop()
	c.write(5, 60, size)
	lead := c.leader()
	for _, n := range c.nodes {
		if n == away {
			continue
		}
		n.snapMu.Lock()
		if err := n.raft.Load().Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
		n.snapMu.Unlock()
		if err := n.snaps.Applied(n.raft.Load().AppliedIndex(), 1<<63); err != nil {
			t.Fatal(err)
		}
	}
	behind, _ := away.log.LastIndex()
	eventually(t, "the leader to free its log", func() bool { base, _ := lead.log.Base(); return base > behind })
	lead.peers.link(away.id, classBulk).giveUp(errBroken, func(kind) bool { return true }) // entries that were read before they were freed
	var wg sync.WaitGroup
	wg.Go(func() { c.write(60, 100, size) })
	away.start(c.first)
	wg.Wait()
	c.agree(100)
	if base, _ := away.log.Base(); base == 0 {
		t.Error("no snapshot was installed")
	}
}

// When the leader's process dies nobody waits for a timer: none of this group's would run out in this test. On a busy machine the two that are left may stand at the same moment and
// have a vote each, or one stands although the other has just been elected: only a timer ends that. One attempt shows the claim, and were it not so all would fail.
func TestDeadLeaderIsNotWaitedFor(t *testing.T) {
	for range 5 {
		c := newClusterOf(t, 3, func(n *node) { n.slow, n.at.rank = true, time.Second })
		c.elect()
		c.write(0, 10, func(uint64) int { return 100 })
		old := c.leader()
		old.stop()
		taken := func() bool {
			return slices.ContainsFunc(c.nodes, func(n *node) bool { return n != old && n.leads() && n.propose(10, 100) == nil })
		}
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
			if taken() {
				c.write(11, 20, func(uint64) int { return 100 })
				c.agree(20)
				return
			}
		}
	}
	t.Error("nobody takes a dead leader's place")
}

// One way or both ways between the leader and the others are cut: what it cannot commit is never acknowledged, the others go on, and in the end all agree.
func TestPartitions(t *testing.T) {
	for _, ways := range []string{"out", "in", "both"} {
		t.Run(ways, func(t *testing.T) {
			c := newCluster(t, 3, false)
			size := func(uint64) int { return 1000 }
			c.write(0, 5, size)
			old := c.leader()
			cut := func(on bool) {
				for _, n := range c.nodes {
					if n == old {
						continue
					}
					if ways != "in" {
						c.net.sever(old.id, n.id, on)
					}
					if ways != "out" {
						c.net.sever(n.id, old.id, on)
					}
				}
			}
			cut(true)
			eventually(t, "the old leader to step down", func() bool {
				err := old.propose(1<<40, 10)
				if err == nil {
					t.Fatal("acknowledged by a leader that reaches nobody")
				}
				return !old.leads()
			})
			c.write(5, 15, size)
			cut(false)
			c.write(15, 20, size)
			c.agree(20)
		})
	}
}

// A group whose raft takes nothing holds up no other group and no heartbeat.
func TestStalledGroup(t *testing.T) {
	c := newCluster(t, 3, false)
	lead := c.leader()
	for _, n := range c.nodes {
		g := n.trans.g
		g.ID = 2
		stalled := n.peers.Open(g) // nobody reads its Consumer
		t.Cleanup(func() { _ = stalled.Close() })
	}
	var wg sync.WaitGroup
	h := raft.RPCHeader{ID: []byte(lead.id), Addr: []byte(lead.id)}
	for _, n := range c.nodes {
		if n == lead {
			continue
		}
		for range 20 {
			wg.Go(func() {
				lead.peers.link(n.id, classBulk).ask(&call{kind: kindAppend, group: 2, meta: encodeAppend(&raft.AppendEntriesRequest{RPCHeader: h, Term: 1, PrevLogEntry: 1}, nil, nil)}, lead.peers.times.call)
			})
		}
	}
	c.write(0, 50, func(uint64) int { return 10_000 })
	c.agree(50)
	for _, n := range c.nodes {
		n.stop() // ends what waits
	}
	wg.Wait()
}

// The voters' terms, asked for outside their raft, prove a leader or depose it.
func TestTerms(t *testing.T) {
	c := newCluster(t, 3, true)
	lead := c.leader()
	var others []string
	for _, n := range c.nodes {
		if n != lead {
			others = append(others, n.id)
		}
	}
	all := func(terms []Standing) bool { return len(terms) == 2 }
	term := lead.raft.Load().CurrentTerm()
	eventually(t, "both to follow", func() bool {
		terms := lead.peers.Standings(t.Context(), 1, others, all)
		return len(terms) == 2 && terms[0].Term == term && terms[1].Term == term && terms[0].LastIndex > 0
	})
	if terms := lead.peers.Standings(t.Context(), 7, others, all); len(terms) != 0 {
		t.Errorf("terms of a group that does not exist: %v", terms)
	}
	if terms := lead.peers.Standings(t.Context(), 1, []string{"9.gone"}, func([]Standing) bool { return true }); len(terms) != 0 {
		t.Error(fmt.Sprint(terms))
	}
}

// A node closes while its peers go on sending: it ends, whatever they do.
func TestCloseUnderLoad(t *testing.T) {
	for range 8 {
		c := newCluster(t, 3, false)
		lead := c.leader()
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for _, n := range c.nodes {
			if n == lead {
				continue
			}
			for g := range uint32(20) { // groups that are new to the connection: each is looked up
				wg.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
							_, _ = n.peers.link(lead.id, classBulk).ask(&call{kind: kindVote, group: 100 + g}, n.peers.times.vote)
						}
					}
				})
			}
		}
		c.write(0, 3, func(uint64) int { return 1000 })
		lead.stop()
		close(stop)
		for _, n := range c.nodes {
			n.stop()
		}
		wg.Wait()
	}
}

// A leader of which nothing was heard for a while is not protected from who stands for election; one that speaks is, and so is a leader's own word.
func TestSilentLeaderIsNotProtected(t *testing.T) {
	c := newClusterOf(t, 3, func(n *node) {
		n.slow, n.quiet = true, true
		n.at.vote = time.Minute
		if n.at.silent = time.Hour; n.id[0] == '3' {
			n.at.silent = 0
		}
	})
	lead, protects, forsakes := c.nodes[0], c.nodes[1], c.nodes[2]
	c.elect()
	c.write(0, 1, func(uint64) int { return 0 })
	c.agree(1)
	last, err := lead.log.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	term := lead.raft.Load().CurrentTerm()
	from := func(n *node) raft.RPCHeader {
		return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(n.id), Addr: []byte(n.id)}
	}
	ask := func(candidate, voter *node, term uint64) (pre, vote bool) {
		t.Helper()
		var p raft.RequestPreVoteResponse
		if err := candidate.trans.RequestPreVote("", raft.ServerAddress(voter.id), &raft.RequestPreVoteRequest{RPCHeader: from(candidate), Term: term, LastLogIndex: last, LastLogTerm: term - 1}, &p); err != nil {
			t.Fatal(err)
		}
		var v raft.RequestVoteResponse
		if err := candidate.trans.RequestVote("", raft.ServerAddress(voter.id), &raft.RequestVoteRequest{RPCHeader: from(candidate), Term: term, LastLogIndex: last, LastLogTerm: term - 1}, &v); err != nil {
			t.Fatal(err)
		}
		return p.Granted, v.Granted
	}
	refused := protects.trans.contact.outcome(time.Hour)
	if pre, vote := ask(forsakes, protects, term+1); pre || vote {
		t.Errorf("against a leader that speaks: pre-vote %v, vote %v", pre, vote)
	}
	if pre, vote := ask(protects, lead, term+1); pre || vote {
		t.Errorf("by the leader itself: pre-vote %v, vote %v", pre, vote)
	}
	if pre, vote := ask(protects, forsakes, term+1); !pre || !vote {
		t.Errorf("against a leader that is silent: pre-vote %v, vote %v", pre, vote)
	}
	if wait := forsakes.trans.contact.outcome(time.Hour); wait < 50*time.Minute { // it does not stand itself meanwhile
		t.Errorf("who has voted waits %v of an hour for the outcome", wait)
	}
	if now := protects.trans.contact.outcome(time.Hour); now > refused {
		t.Errorf("who has refused waits %v, and waited %v before", now, refused)
	}
}
