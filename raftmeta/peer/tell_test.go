package peer

import "testing"

// A follower applies what was committed last when it is told of it: raft itself would say so in ten minutes here.
func TestTell(t *testing.T) {
	c := newCluster(t, 3, true)
	for _, n := range c.nodes {
		n.stop()
		n.quiet = true
		n.start(c.first)
	}
	lead := c.elect()
	c.write(0, 5, func(uint64) int { return 100 })
	var servers []string
	for _, n := range c.nodes {
		servers = append(servers, n.id)
		if k := len(n.fsm.all()); n != lead && k > 4 {
			t.Fatalf("%s has applied %d values before it was told", n.id, k)
		}
	}
	r := lead.raft.Load()
	lead.trans.Tell(servers, r.CurrentTerm(), r.CommitIndex(), r.CurrentTerm()+1) // not what the log has there: it is not sent
	lead.trans.Tell(servers, r.CurrentTerm(), r.CommitIndex(), r.CurrentTerm())
	c.agree(5)
	away := c.nodes[1]
	if away == lead {
		away = c.nodes[2]
	}
	away.stop() // it is told of an entry that it lacks: nothing comes of that, and raft brings the entry
	c.write(5, 8, func(uint64) int { return 100 })
	lead.trans.Tell(servers, r.CurrentTerm(), r.CommitIndex(), r.CurrentTerm())
	away.start(c.first)
	next := uint64(8)
	eventually(t, "raft to reach the one that was away", func() bool { // it tries again with the next entry: what fails while that one starts is not repeated for ten minutes
		want, _ := lead.log.LastIndex()
		c.write(next, next+1, func(uint64) int { return 100 })
		next++
		got, _ := away.log.LastIndex()
		return got >= want
	})
	eventually(t, "the one that was away to have all", func() bool {
		lead.trans.Tell(servers, r.CurrentTerm(), r.CommitIndex(), r.CurrentTerm())
		return len(away.fsm.all()) == int(next)
	})
	c.agree(next)
}
