package peer

import (
	"github.com/hashicorp/raft"
)

// Tell lets the other servers know at once what is committed: (commit, its entry's term), decided in the leader's `term`. raft says it with the next entries, or after its
// CommitTimeout. What is sent is an AppendEntries without entries, which a leader may send at any time; it goes behind what the group has sent before, and nobody waits for
// the answer: a server that lacks the entry refuses it, and raft's own requests see to that.
func (t *Transport) Tell(servers []string, term, commit, commitTerm uint64) {
	self := t.p.cfg.ServerID
	for _, s := range servers {
		if s == self {
			continue
		}
		c, err := t.prepare(s, &raft.AppendEntriesRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(self), Addr: []byte(self)}, Term: term,
			PrevLogEntry: commit, PrevLogTerm: commitTerm, LeaderCommitIndex: commit})
		if err != nil { // closed, or the log has another entry there now: the term is over
			return
		}
		c.done = func([]byte, error) {}
		t.p.link(s, classBulk).submit(c, t.p.times.beat)
	}
}
