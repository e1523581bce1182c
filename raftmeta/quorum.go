package raftmeta

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/estran/estran/raftmeta/peer"
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
	self := h.identity.serverID()
	blank := []string{self}
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
		case slices.Contains(p.Founders, self): // a founder that was interrupted
			return p.Founders, nil, nil
		default:
			return nil, nil, fmt.Errorf("%w: voter %d belongs to cluster %s, whose voters are %v; this node is a new one and cannot join it", ErrForeign, v.ID, p.Cluster, p.Founders)
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
	known := slices.Contains(id.Groups, uint32(g.id))
	switch {
	case !has && known:
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
	if known {
		return nil
	}
	id.Groups = append(slices.Clone(id.Groups), uint32(g.id))
	return h.saveIdentity(id)
}

// preferred is the server that should lead the group: leadership is spread over the founders.
func (g *group) preferred() string {
	f := g.host.identity.Founders
	if len(f) == 0 {
		return ""
	}
	return f[(int(g.id)+len(f)-1)%len(f)]
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
		to := g.preferred()
		if to == "" || to == g.host.identity.serverID() || !slices.Contains(g.voters(), to) {
			continue
		}
		tctx, cancel := context.WithTimeout(ctx, time.Second)
		alive := len(g.host.peers.Terms(tctx, uint32(g.id), []string{to}, func(t []uint64) bool { return len(t) > 0 })) > 0
		cancel()
		if !alive {
			continue
		}
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
