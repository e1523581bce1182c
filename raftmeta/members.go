package raftmeta

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/state"
	"github.com/hashicorp/raft"
)

const (
	keepEvery  = 500 * time.Millisecond
	changeTime = 10 * time.Second
)

// serverOf is a node's server ID as it registered itself.
func serverOf(n state.Node) raft.ServerID {
	return raft.ServerID(fmt.Sprintf("%d.%s", n.ID, n.Incarnation))
}

// verb is what a change does to a server.
type verb int

const (
	addNonvoter verb = iota
	promote
	replace // removes an earlier incarnation of a member, whose present one is a non-voter
	remove
)

// change is one step of a group's configuration.
type change struct {
	verb   verb
	server raft.ServerID
	// behind must have caught up before; "" if nobody must.
	behind raft.ServerID
}

// changes lists the steps that lead from a group's servers towards the members, in the order in which they should be tried. Only one is taken at a time, and none follows before
// the one taken is committed. A new incarnation joins beside the old one as a non-voter, catches up, the old one goes, the new one votes.
func changes(servers []raft.Server, members []state.Node, member func(node int32) bool) (out []change) {
	var last []change // removals come after additions
	for _, n := range members {
		want := serverOf(n)
		var now, old *raft.Server
		for _, s := range servers {
			switch {
			case s.ID == want:
				now = &s
			case nodeOf(string(s.ID)) == n.ID:
				old = &s
			}
		}
		switch {
		case now == nil:
			out = append(out, change{addNonvoter, want, ""})
		case now.Suffrage == raft.Voter && old != nil:
			last = append(last, change{remove, old.ID, ""})
		case now.Suffrage == raft.Voter:
		case old != nil:
			out = append(out, change{replace, old.ID, want})
		default:
			out = append(out, change{promote, want, want})
		}
	}
	for _, s := range servers {
		if !member(nodeOf(string(s.ID))) {
			last = append(last, change{remove, s.ID, ""})
		}
	}
	return append(out, last...)
}

// keepVoters brings the group's voters to what meta says they should be, one change after the other, until ctx ends. At every step a majority of the voters decides, and what
// was acknowledged is on it.
func (g *group) keepVoters(ctx context.Context) {
	t := time.NewTicker(g.host.cfg.slow(keepEvery))
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		if err := g.keepOnce(ctx); err != nil && ctx.Err() == nil {
			g.log_.Warn("changing the voters", "err", err)
		}
		if g.id != 0 {
			if err := g.settleSlots(ctx); err != nil && ctx.Err() == nil {
				g.log_.Warn("giving slots away", "err", err)
			}
		}
		if g.id == 0 {
			if err := g.host.keepMeta(ctx); err != nil && ctx.Err() == nil {
				g.log_.Warn("keeping the members", "err", err)
			}
		}
	}
}

// keepOnce takes the first step that can be taken.
func (g *group) keepOnce(ctx context.Context) error {
	c := g.host.Cluster()
	if len(c.Members()) == 0 || c.RecoveryEpoch() < g.host.identity.Epoch {
		return nil // meta is not known yet, or what it says of members is no longer so
	}
	servers := g.servers()
	for _, ch := range changes(servers, c.Nodes(), c.Member) {
		if ch.behind != "" && !g.caughtUp(ctx, string(ch.behind)) || ch.verb == remove && !g.canLose(ctx, servers, ch.server) {
			continue
		}
		switch ch.verb {
		case addNonvoter:
			g.log_.Info("a node joins", "event", "voter.joins", "server", ch.server)
			return g.raft.AddNonvoter(ch.server, raft.ServerAddress(ch.server), 0, changeTime).Error()
		case promote:
			g.log_.Info("a node has caught up and votes", "event", "voter.added", "server", ch.server)
			return g.raft.AddVoter(ch.server, raft.ServerAddress(ch.server), 0, changeTime).Error()
		case replace:
			g.log_.Info("a voter is replaced by what it is now", "event", "voter.replaced", "old", ch.server, "new", ch.behind)
			return g.raft.RemoveServer(ch.server, 0, changeTime).Error()
		case remove:
			g.log_.Info("a voter goes", "event", "voter.removed", "server", ch.server)
			return g.raft.RemoveServer(ch.server, 0, changeTime).Error()
		}
	}
	return nil
}

// canLose reports whether a server can be removed: it is not this one, and without it a majority of those that are left answers and has all that is committed.
func (g *group) canLose(ctx context.Context, servers []raft.Server, server raft.ServerID) bool {
	self := raft.ServerID(g.host.identity.serverID())
	if server == self {
		return false // balance hands over first
	}
	var left []string
	have := 0
	for _, s := range servers {
		switch {
		case s.ID == server && s.Suffrage != raft.Voter:
			return true
		case s.ID == server || s.Suffrage != raft.Voter:
		case s.ID == self:
			have++
		default:
			left = append(left, string(s.ID))
		}
	}
	need := (len(left)+have)/2 + 1
	commit := g.raft.CommitIndex()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	count := func(got []peer.Standing) (n int) {
		for _, s := range got {
			if s.LastIndex >= commit {
				n++
			}
		}
		return n + have
	}
	return count(g.host.peers.Standings(ctx, uint32(g.id), left, func(s []peer.Standing) bool { return count(s) >= need })) >= need
}

// servers are the servers of the group's configuration.
func (g *group) servers() []raft.Server {
	f := g.raft.GetConfiguration()
	if f.Error() != nil {
		return nil
	}
	return f.Configuration().Servers
}

// keepMeta does what the leader of meta does for the cluster as a whole: when the cluster has grown it gives every member a shard to lead, and it forgets who has left and is gone from every group.
func (h *Host) keepMeta(ctx context.Context) error {
	c := h.Cluster()
	voters := h.meta.voters()
	if c.RecoveryEpoch() < h.identity.Epoch {
		return nil
	}
	for _, n := range c.Nodes() {
		if !slices.Contains(voters, string(serverOf(n))) {
			return nil // not all are there yet
		}
	}
	members := c.Members()
	if len(members) > len(h.identity.Founders) && len(voters) == len(members) && int(c.Shards) < len(members) && len(c.Nodes()) == len(members) {
		_, err := h.meta.propose(ctx, state.AddShards{Total: uint32(len(members)), Founders: voters})
		return err
	}
	for _, n := range c.Registered() {
		if !n.Left || slices.ContainsFunc(h.groups(), func(g *group) bool {
			return slices.ContainsFunc(g.servers(), func(s raft.Server) bool { return nodeOf(string(s.ID)) == n.ID })
		}) {
			continue
		}
		if _, err := h.meta.propose(ctx, state.ForgetNode{Node: n.ID}); err != nil {
			return err
		}
	}
	return nil
}

const (
	// balanceLook is how often a leader looks whether somebody has changed who should lead; balanceEvery how often whether a better one has come back. That one may be about to go
	// again, its disk too slow: each time that the group is handed over soon after the last time, within balanceForget, this node leads for twice as long first, up to balanceMost.
	balanceLook   = 200 * time.Millisecond
	balanceEvery  = 5 * time.Second
	balanceMost   = 40 * time.Second
	balanceForget = 2 * time.Minute
)

// patience is how long a node leads before it hands over to one that should.
type patience struct {
	wait   time.Duration
	yields time.Time // the last one
}

// now returns how long to wait this time.
func (p *patience) now(at time.Time) time.Duration {
	if p.yields.IsZero() || at.Sub(p.yields) > balanceForget {
		return balanceEvery
	}
	return p.wait
}

func (p *patience) yielded(at time.Time) { p.wait, p.yields = min(2*p.now(at), balanceMost), at }

// balance hands the group over to the member that should lead it, once that one is in contact, until ctx ends.
func (g *group) balance(ctx context.Context) {
	t := time.NewTicker(g.host.cfg.slow(balanceLook))
	defer t.Stop()
	looked, order := time.Now(), g.leaders()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		now := g.leaders()
		if time.Since(looked) < g.patience.now(time.Now()) && slices.Equal(now, order) && slices.Contains(now, g.host.cfg.NodeID) {
			continue
		}
		looked, order = time.Now(), now
		if g.yield(ctx, now) {
			g.patience.yielded(time.Now())
		}
	}
}

// yield hands over to the first of order that is there, if it comes before this node; it reports whether it tried. Who is not in order at all should not lead.
func (g *group) yield(ctx context.Context, order []int32) bool {
	voters := g.voters()
	for _, node := range order {
		if node == g.host.cfg.NodeID {
			return false
		}
		i := slices.IndexFunc(voters, func(s string) bool { return nodeOf(s) == node })
		if i < 0 || !g.caughtUp(ctx, voters[i]) {
			continue
		}
		if err := g.transfer(func() raft.Future {
			return g.raft.LeadershipTransferToServer(raft.ServerID(voters[i]), raft.ServerAddress(voters[i]))
		}); err != nil {
			g.log_.Info("leadership stays", "event", "leader.transfer", "to", voters[i], "err", err)
		}
		return true
	}
	return false
}

// lostEvery is how often a node that hears of no leader asks the others whether it still belongs to them; askTime bounds each question, and what a close waits for.
const (
	lostEvery = 2 * time.Second
	askTime   = 500 * time.Millisecond
)

// watchMembership ends the node when it has been removed: nobody speaks to it any more, so it must ask.
func (h *Host) watchMembership() {
	t := time.NewTicker(h.cfg.slow(lostEvery))
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-h.stop:
			return
		}
		if !slices.ContainsFunc(h.groups(), func(g *group) bool { return g.leaderServer() != "" || len(g.servers()) == 0 }) && h.gone(h.ctx) {
			h.cfg.Logger.Warn("this node was removed from the cluster", "event", "node.removed", "component", "raft")
			close(h.removed)
			h.cfg.OnFatal(ErrRemoved)
			return
		}
	}
}

// gone reports whether a node that knows as much of meta as this one, or more, has no place for it.
func (h *Host) gone(ctx context.Context) bool {
	c := h.Cluster()
	msg, err := json.Marshal(forwarded{Ask: true})
	if err != nil {
		return false
	}
	for _, s := range h.meta.servers() { // of its log: what meta says may not have been applied here yet
		if string(s.ID) == h.identity.serverID() {
			continue
		}
		ask, cancel := context.WithTimeout(ctx, askTime)
		b, err := h.peers.Forward(ask, string(s.ID), 0, msg)
		cancel()
		var r forwardedResult
		if err == nil && json.Unmarshal(b, &r) == nil && r.Index >= c.Version && r.removes(h.identity.serverID()) {
			return true
		}
	}
	return false
}
