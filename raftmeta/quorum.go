package raftmeta

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/state"
	"github.com/hashicorp/raft"
)

const (
	foundEvery = 100 * time.Millisecond
	foundTell  = 5 * time.Second
)

// alone: this node is all of the cluster.
func (c *Config) alone() bool { return len(c.Voters) <= 1 }

func nodeOf(serverID string) int32 {
	id, _, _ := strings.Cut(serverID, ".")
	n, err := strconv.ParseInt(id, 10, 32)
	if err != nil {
		return 0
	}
	return int32(n)
}

// resolve gives the address of a server ID: that of its node in the configuration.
func (h *Host) resolve(serverID string) (string, bool) {
	id := nodeOf(serverID)
	for _, v := range h.cfg.Voters {
		if v.ID == id {
			return v.Addr, true
		}
	}
	return "", false
}

func (h *Host) openPeers() error {
	stage := filepath.Join(h.cfg.DataDir, "stage")
	if err := errors.Join(os.RemoveAll(stage), os.Mkdir(stage, 0o700)); err != nil { // what a crash left of snapshots on their way
		return err
	}
	var err error
	h.peers, err = peer.New(peer.Config{ServerID: h.identity.serverID(), ClusterID: h.identity.ClusterID, Founders: h.identity.Founders, Secret: h.cfg.Secret,
		Listener: h.cfg.PeerListener, Resolve: h.resolve, OnForward: h.onForward, StageDir: stage, Logger: h.cfg.Logger, Registerer: h.cfg.Registerer})
	return err
}

// found finds the cluster, or makes it once all voters have answered that they belong to none. Every founder comes to the same result by itself: the cluster's ID follows
// from their server IDs, which are durable before they are told to anybody. Should a voter be wiped in between, two sets may differ; then their IDs do, and neither side
// takes the other's votes.
func (h *Host) found(ctx context.Context) error {
	told := time.Now()
	for {
		founders, missing, err := h.canvass(ctx)
		if err != nil {
			return err
		}
		if founders != nil {
			return h.join(founders)
		}
		if time.Since(told) > foundTell {
			told = time.Now()
			h.cfg.Logger.Info("waiting for the other voters", "component", "raft", "missing", missing)
		}
		t := time.NewTimer(foundEvery)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%w waiting for voters: %v", ErrTimeout, missing)
		}
	}
}

// checkFounders compares the voters that the cluster was made of with the configuration: they cannot be changed yet.
func (h *Host) checkFounders() error {
	if h.identity.ClusterID == "" {
		return nil
	}
	have, want := []int32{}, []int32{h.cfg.NodeID}
	for _, s := range h.identity.Founders {
		have = append(have, nodeOf(s))
	}
	if !h.cfg.alone() {
		want = nil
		for _, v := range h.cfg.Voters {
			want = append(want, v.ID)
		}
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		return fmt.Errorf("%w: its cluster was made of voters %v, the configuration names %v", ErrForeign, have, want)
	}
	return nil
}

// canvass asks every voter once. founders is nil while it cannot be said who they are.
func (h *Host) canvass(ctx context.Context) (founders []string, missing []string, err error) {
	blank := []string{h.identity.serverID()}
	for _, v := range h.cfg.Voters {
		if v.ID == h.cfg.NodeID {
			continue
		}
		p, err := h.peers.Ask(ctx, v.Addr)
		switch {
		case errors.Is(err, peer.ErrStranger):
			return nil, nil, fmt.Errorf("voter %d at %s: %w", v.ID, v.Addr, err)
		case err != nil:
			missing = append(missing, fmt.Sprintf("%d at %s (%v)", v.ID, v.Addr, err))
			continue
		case nodeOf(p.Server) != v.ID:
			return nil, nil, fmt.Errorf("%w: %s is node %d, the configuration says %d", ErrForeign, v.Addr, nodeOf(p.Server), v.ID)
		case p.Cluster == "":
			blank = append(blank, p.Server)
		case !slices.ContainsFunc(p.Founders, func(s string) bool { return nodeOf(s) == h.cfg.NodeID }):
			return nil, nil, fmt.Errorf("%w: voter %d belongs to cluster %s, which was made of %v without this node", ErrForeign, v.ID, p.Cluster, p.Founders)
		default: // a founder that was interrupted, or one that has lost its directory and takes the place of what it was
			return p.Founders, nil, nil
		}
	}
	if len(blank) < len(h.cfg.Voters) {
		return nil, missing, nil
	}
	slices.Sort(blank)
	return blank, nil, nil
}

func (h *Host) join(founders []string) error {
	sum := sha256.Sum256([]byte(strings.Join(founders, " ")))
	id := h.identity
	id.ClusterID, id.Founders = base64.RawURLEncoding.EncodeToString(sum[:16]), founders
	if err := h.saveIdentity(id); err != nil {
		return err
	}
	h.peers.Join(id.ClusterID, founders)
	return nil
}

func (h *Host) saveIdentity(id identity) error {
	if err := writeIdentity(filepath.Join(h.cfg.DataDir, identityFile), id); err != nil {
		return err
	}
	h.identity = id
	return nil
}

// bootstrap writes the group's first configuration, if this node is a founder and the group is new.
func (g *group) bootstrap(cfg *raft.Config) error {
	has, err := raft.HasExistingState(g.log, g.stable, g.snaps.All())
	if err != nil {
		return fmt.Errorf("raftmeta: %w", err)
	}
	h := g.host
	id := h.identity
	switch {
	case !has && slices.Contains(id.Groups, uint32(g.id)):
		return fmt.Errorf("%w: group %d has been here and is empty now: its votes are lost, so this node must not vote again", ErrForeign, g.id)
	case !has && slices.Contains(id.Founders, id.serverID()):
		var first raft.Configuration
		for _, s := range id.Founders {
			first.Servers = append(first.Servers, raft.Server{Suffrage: raft.Voter, ID: raft.ServerID(s), Address: raft.ServerAddress(s)})
		}
		if err := raft.BootstrapCluster(cfg, g.log, g.stable, g.snaps.All(), g.trans, first); err != nil {
			return fmt.Errorf("raftmeta: bootstrapping group %d: %w", g.id, err)
		}
	}
	return nil
}

// recordGroups remembers which groups have been here: one of them that is empty at a later start has lost its votes.
func (h *Host) recordGroups() error {
	id := h.identity
	for _, g := range append([]*group{h.meta}, h.shards...) {
		last, err := g.log.LastIndex()
		if err != nil {
			return err
		}
		if last > 0 && !slices.Contains(id.Groups, uint32(g.id)) {
			id.Groups = append(slices.Clone(id.Groups), uint32(g.id))
		}
	}
	if len(id.Groups) == len(h.identity.Groups) {
		return nil
	}
	return h.saveIdentity(id)
}

// announce tells meta, through whichever voter leads it, that this node has another incarnation than the founder of its number: until then nobody speaks to it.
func (h *Host) announce(ctx context.Context, self state.Node) error {
	body, err := json.Marshal(state.RegisterNode{Node: self})
	if err != nil {
		return err
	}
	msg, err := json.Marshal(forwarded{state.KindRegisterNode, body})
	if err != nil {
		return err
	}
	for {
		for _, v := range h.cfg.Voters {
			if v.ID == h.cfg.NodeID {
				continue
			}
			p, err := h.peers.Ask(ctx, v.Addr)
			if err != nil || p.Cluster != h.identity.ClusterID {
				continue
			}
			var r forwardedResult
			b, err := h.peers.Forward(ctx, p.Server, 0, msg)
			if err == nil && json.Unmarshal(b, &r) == nil && !r.NotLeader && r.Unknown == "" {
				return nil
			}
		}
		t := time.NewTimer(foundEvery)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%w announcing this node to the leader of meta", ErrTimeout)
		}
	}
}

const (
	keepEvery  = 500 * time.Millisecond
	changeTime = 10 * time.Second
)

// keepVoters replaces, one after the other, the voters whose node has come back without its directory, until ctx ends. The new incarnation joins beside the old one as a
// non-voter, catches up, the old one goes, the new one votes: at every step a majority of the old voters decides, and what was acknowledged is on it.
func (g *group) keepVoters(ctx context.Context) {
	t := time.NewTicker(keepEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		for _, n := range g.host.Cluster().Nodes() {
			done, err := g.keepVoter(ctx, n)
			if err != nil && ctx.Err() == nil {
				g.log_.Warn("replacing a voter", "node", n.ID, "err", err)
			}
			if !done {
				break // one at a time
			}
		}
	}
}

// keepVoter takes the next step for a node; done says that there is none.
func (g *group) keepVoter(ctx context.Context, n state.Node) (done bool, err error) {
	want := raft.ServerID(fmt.Sprintf("%d.%s", n.ID, n.Incarnation))
	f := g.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return false, err
	}
	var old, now *raft.Server
	for _, s := range f.Configuration().Servers {
		switch {
		case s.ID == want:
			now = &s
		case nodeOf(string(s.ID)) == n.ID:
			old = &s
		}
	}
	switch {
	case now != nil && now.Suffrage == raft.Voter && old == nil, now == nil && old == nil:
		return true, nil
	case now == nil:
		g.log_.Info("a voter has come back without its directory and joins anew", "event", "voter.replace", "old", old.ID, "new", want)
		return false, g.raft.AddNonvoter(want, raft.ServerAddress(want), 0, changeTime).Error()
	case old != nil:
		if !g.caughtUp(ctx, string(want)) {
			return false, nil
		}
		return false, g.raft.RemoveServer(old.ID, 0, changeTime).Error()
	}
	g.log_.Info("a voter has caught up and votes", "event", "voter.replaced", "new", want)
	return false, g.raft.AddVoter(want, raft.ServerAddress(want), 0, changeTime).Error()
}

// caughtUp reports whether a server has all that was committed when it was asked.
func (g *group) caughtUp(ctx context.Context, server string) bool {
	commit := g.raft.CommitIndex()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	got := g.host.peers.Standings(ctx, uint32(g.id), []string{server}, func(s []peer.Standing) bool { return len(s) > 0 })
	return len(got) == 1 && got[0].LastIndex >= commit
}

// preferred is the node that should lead the group: leadership is spread over the founders.
func (g *group) preferred() int32 {
	f := g.host.identity.Founders
	if len(f) == 0 {
		return 0
	}
	return nodeOf(f[(int(g.id)+len(f)-1)%len(f)])
}

// voters are the server IDs of the group's voters.
func (g *group) voters() (out []string) {
	f := g.raft.GetConfiguration()
	if f.Error() != nil {
		return nil
	}
	for _, s := range f.Configuration().Servers {
		if s.Suffrage == raft.Voter {
			out = append(out, string(s.ID))
		}
	}
	return out
}

// leaderServer is the server that this node's instance of the group follows, "" if none.
func (g *group) leaderServer() string {
	_, id := g.raft.LeaderWithID()
	return string(id)
}

// transportGroup is what the transport must know of the group.
func (g *group) transportGroup() peer.Group {
	id := g.host.identity
	return peer.Group{ID: uint32(g.id), Log: g.log,
		Term: func() (uint64, bool) {
			if r := g.live.Load(); r != nil {
				return r.CurrentTerm(), true
			}
			return 0, false
		},
		Leader: func() string {
			if r := g.live.Load(); r != nil {
				_, leader := r.LeaderWithID()
				return string(leader)
			}
			return ""
		},
		Rank:      func() int { return max(0, slices.Index(id.Founders, id.serverID())) },
		Installed: func(index, term uint64) uint64 { return g.snaps.InstallableAt(index, term) },
		Install: func(index, term, installed uint64, hand func() error) (bool, error) {
			g.snapMu.Lock()
			defer g.snapMu.Unlock()
			g.snaps.ExpectInstall(index, term, installed, func() uint64 { return g.live.Load().AppliedIndex() })
			err := hand()
			return g.snaps.InstallRefused(), err
		}}
}

// balanceEvery is how often a leader looks whether another should lead.
const balanceEvery = 5 * time.Second

// balance hands a shard over to the voter that should lead it, once that one is in contact, until ctx ends.
func (g *group) balance(ctx context.Context) {
	t := time.NewTicker(balanceEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		node := g.preferred()
		voters := g.voters()
		i := slices.IndexFunc(voters, func(s string) bool { return nodeOf(s) == node })
		if node == g.host.cfg.NodeID || i < 0 || !g.caughtUp(ctx, voters[i]) {
			continue
		}
		to := voters[i]
		if err := g.raft.LeadershipTransferToServer(raft.ServerID(to), raft.ServerAddress(to)).Error(); err != nil {
			g.log_.Info("leadership stays", "event", "leader.transfer", "to", to, "err", err)
		}
	}
}

// handOver gives up the leadership before the node goes, if there is somebody to take it.
func (g *group) handOver(limit time.Duration) {
	if g.host.cfg.alone() || g.leads.Load() == 0 || len(g.voters()) < 2 {
		return
	}
	done := make(chan error, 1)
	go func() { done <- g.raft.LeadershipTransfer().Error() }()
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case err := <-done:
		if err != nil {
			g.log_.Info("leadership was not handed over", "event", "leader.transfer", "err", err)
		}
	case <-t.C:
	}
}
