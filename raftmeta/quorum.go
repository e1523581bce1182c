package raftmeta

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/hashicorp/raft"
)

const (
	foundEvery = 100 * time.Millisecond
	foundTell  = 5 * time.Second
)

// alone: the configuration names no other voter. A new cluster is then made of this node; one that exists may have grown since.
func (c *Config) alone() bool { return len(c.Voters) <= 1 }

func nodeOf(serverID string) int32 {
	id, _, _ := strings.Cut(serverID, ".")
	n, err := strconv.ParseInt(id, 10, 32)
	if err != nil {
		return 0
	}
	return int32(n)
}

// resolve gives the address of a server ID: that of its node in the configuration, else where the node says that it is.
func (h *Host) resolve(serverID string) (string, bool) {
	id := nodeOf(serverID)
	if addr, ok := h.cfg.addrOf(id); ok {
		return addr, true
	}
	if n, ok := h.Cluster().Node(id); ok && n.Peer != "" {
		return n.Peer, true
	}
	addr, ok := (*h.seen.Load())[id]
	return addr, ok
}

// recordPeers remembers where other nodes are: after a restart they must be reached before meta is applied.
func (h *Host) recordPeers() error {
	now := map[int32]string{}
	for _, n := range h.Cluster().Registered() {
		if n.ID != h.cfg.NodeID && n.Peer != "" {
			now[n.ID] = n.Peer
		}
	}
	if len(now) == 0 || maps.Equal(now, *h.seen.Load()) {
		return nil
	}
	h.seen.Store(&now)
	return h.recordIdentity()
}

// recordIdentity writes node.json with what has become known since it was opened.
func (h *Host) recordIdentity() error {
	id := h.identity
	id.Groups, id.Peers, id.Level = h.recorded, *h.seen.Load(), h.recordedLevel
	return writeIdentity(filepath.Join(h.cfg.DataDir, identityFile), id)
}

// addrOf is where the configuration says that a node is.
func (c *Config) addrOf(node int32) (string, bool) {
	for _, v := range c.Voters {
		if v.ID == node {
			return v.Addr, true
		}
	}
	return "", false
}

// peerAddress is what this node tells others of itself.
func (h *Host) peerAddress() string {
	if addr, ok := h.cfg.addrOf(h.cfg.NodeID); ok {
		return addr
	}
	if h.cfg.PeerAdvertise != "" || h.cfg.PeerListener == nil {
		return h.cfg.PeerAdvertise
	}
	return h.cfg.PeerListener.Addr().String()
}

// founderNodes are the nodes that the cluster is made of.
func (h *Host) founderNodes() (out []int32) {
	for _, s := range h.identity.Founders {
		out = append(out, nodeOf(s))
	}
	return out
}

func (h *Host) openPeers() error {
	stage := filepath.Join(h.cfg.DataDir, "stage")
	if err := errors.Join(os.RemoveAll(stage), os.Mkdir(stage, 0o700)); err != nil { // what a crash left of snapshots on their way
		return err
	}
	var err error
	h.peers, err = peer.New(peer.Config{ServerID: h.identity.serverID(), ClusterID: h.identity.cluster(), Founders: h.identity.Founders, Secret: h.cfg.Secret, TLS: h.cfg.TLS,
		Features: h.features, Source: h.source,
		Listener: h.cfg.PeerListener, Dial: h.cfg.Dial, Slower: h.cfg.Slower, Resolve: h.resolve, OnForward: h.onForward, OnBehind: h.onBehind, StageDir: stage, Logger: h.cfg.Logger, Registerer: h.cfg.Registerer, Now: h.cfg.Now, Free: h.room,
		GetBuffer: record.GetBuffer, PutBuffer: record.PutBuffer})
	return err
}

// found finds the cluster, or makes it once all voters have answered that they belong to none. Every founder comes to the same result by itself: the cluster's ID follows
// from their server IDs, which are durable before they are told to anybody. Should a voter be wiped in between, two sets may differ; then their IDs do, and neither side
// takes the other's votes.
func (h *Host) found(ctx context.Context) error {
	told := time.Now()
	for {
		cluster, founders, missing, err := h.canvass(ctx)
		if err != nil {
			return err
		}
		if founders != nil {
			return h.join(cluster, founders)
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

// canvass asks every voter once. founders is nil while it cannot be said who they are. One that belongs to a cluster is followed into it: as a founder that was interrupted, in
// the place of what this node was before it lost its directory, or to be added.
func (h *Host) canvass(ctx context.Context) (cluster string, founders []string, missing []string, err error) {
	blank := []string{h.identity.serverID()}
	for _, v := range h.cfg.Voters {
		if v.ID == h.cfg.NodeID {
			continue
		}
		p, err := h.peers.Ask(ctx, v.Addr)
		switch {
		case errors.Is(err, peer.ErrStranger):
			return "", nil, nil, fmt.Errorf("voter %d at %s: %w", v.ID, v.Addr, err)
		case err != nil:
			missing = append(missing, fmt.Sprintf("%d at %s (%v)", v.ID, v.Addr, err))
			continue
		case nodeOf(p.Server) != v.ID:
			return "", nil, nil, fmt.Errorf("%w: %s is node %d, the configuration says %d", ErrForeign, v.Addr, nodeOf(p.Server), v.ID)
		case p.Cluster == "":
			blank = append(blank, p.Server)
		default:
			return p.Cluster, p.Founders, nil, nil
		}
	}
	if len(blank) < len(h.cfg.Voters) {
		return "", nil, missing, nil
	}
	slices.Sort(blank)
	sum := sha256.Sum256([]byte(strings.Join(blank, " ")))
	return base64.RawURLEncoding.EncodeToString(sum[:16]), blank, nil, nil
}

func (h *Host) join(cluster string, founders []string) error {
	id := h.identity
	var err error
	if id.ClusterID, id.Epoch, err = parseCluster(cluster); err != nil {
		return fmt.Errorf("%w: cluster %q", ErrForeign, cluster)
	}
	id.Founders = founders
	if err := h.saveIdentity(id); err != nil {
		return err
	}
	h.peers.Join(cluster, founders)
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
	self, founders := h.identity.serverID(), h.identity.Founders
	if f := h.Cluster().ShardFounders(g.id); f != nil {
		founders = f
	}
	switch {
	case !has && slices.Contains(h.recorded, uint32(g.id)):
		return fmt.Errorf("%w: group %d has been here and is empty now: its votes are lost, so this node must not vote again", ErrForeign, g.id)
	case !has && slices.Contains(founders, self):
		var first raft.Configuration
		for _, s := range founders {
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
	groups, now := h.groups(), slices.Clone(h.recorded)
	if len(now) == len(groups) {
		return nil
	}
	for _, g := range groups {
		last, err := g.log.LastIndex()
		if err != nil {
			return err
		}
		if last > 0 && !slices.Contains(now, uint32(g.id)) {
			now = append(now, uint32(g.id))
		}
	}
	if len(now) == len(h.recorded) {
		return nil
	}
	h.recorded = now
	return h.recordIdentity()
}

// rememberTime bounds how long a start waits for what others remember of this node: one that hangs is not waited for.
const rememberTime = time.Second

// askPeers asks all nodes whose address is known what they remember of this one, which notBehind compares; silent are the addresses where nobody answers.
func (h *Host) askPeers(ctx context.Context) (silent []string) {
	ctx, cancel := context.WithTimeout(ctx, rememberTime)
	defer cancel()
	addrs := map[string]bool{}
	for _, v := range h.cfg.Voters {
		addrs[v.Addr] = v.ID != h.cfg.NodeID
	}
	for _, addr := range *h.seen.Load() {
		addrs[addr] = true
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for addr, other := range addrs {
		if !other {
			continue
		}
		wg.Go(func() {
			if _, err := h.peers.Ask(ctx, addr); err != nil {
				mu.Lock()
				defer mu.Unlock()
				silent = append(silent, addr)
			}
		})
	}
	wg.Wait()
	return silent
}

// askLaterMost is the longest pause between two questions to a node that did not answer at the start.
const askLaterMost = time.Minute

// askLater asks those who could not be reached at the start, until each has answered: what they remember of this node is compared then.
func (h *Host) askLater(silent []string) {
	for pause := rememberTime; len(silent) > 0; pause = min(2*pause, askLaterMost) {
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-h.stop:
			t.Stop()
			return
		}
		silent = slices.DeleteFunc(silent, func(addr string) bool {
			_, err := h.peers.Ask(h.ctx, addr)
			return err == nil
		})
	}
}

// notBehind refuses a directory that has less of the group than others remember of this node: it is an old copy, or its disk has lost what it had confirmed. With it this node might
// vote twice in a term, or help to elect a leader without entries that it has acknowledged.
func (g *group) notBehind() error {
	last, err := g.log.LastIndex()
	if err != nil {
		return err
	}
	here := peer.Standing{Term: g.stable.Term(), LastIndex: last}
	if why := g.host.peers.Behind(uint32(g.id), here); why != "" {
		return fmt.Errorf("%w: group %d: %s", ErrBehind, g.id, why)
	}
	return nil
}

// onBehind ends a node of which a peer remembers more than it has.
func (h *Host) onBehind(group uint32, why string) {
	h.cfg.Logger.Error("this node has lost writes", "event", "node.behind", "component", "raft", "group", group, "why", why)
	h.cfg.OnFatal(fmt.Errorf("%w: group %d: %s", ErrBehind, group, why))
}

// announce tells meta, through whichever voter leads it, that this node has another incarnation than the founder of its number: until then nobody speaks to it.
func (h *Host) announce(ctx context.Context, self state.Node) error {
	body, err := json.Marshal(state.RegisterNode{Node: self})
	if err != nil {
		return err
	}
	msg, err := json.Marshal(forwarded{Kind: state.KindRegisterNode, Body: body})
	if err != nil {
		return err
	}
	for told := time.Now(); ; {
		why := "no voter answers"
		for _, v := range h.cfg.Voters {
			if v.ID == h.cfg.NodeID {
				continue
			}
			p, err := h.peers.Ask(ctx, v.Addr)
			if err != nil || p.Cluster != h.identity.cluster() {
				continue
			}
			var r forwardedResult
			b, err := h.peers.Forward(ctx, p.Server, 0, msg)
			if err == nil && json.Unmarshal(b, &r) == nil && !r.NotLeader && r.Unknown == "" {
				if r.Code != state.OK {
					return fmt.Errorf("%w: voter %d does not take this node in: %s", ErrForeign, v.ID, r.Why)
				}
				return nil
			}
			why = "the voters have no leader"
		}
		if time.Since(told) > foundTell {
			told = time.Now()
			h.cfg.Logger.Info("announcing this node", "component", "raft", "waiting", why)
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

// caughtUp reports whether a server has all that was committed when it was asked.
func (g *group) caughtUp(ctx context.Context, server string) bool {
	commit := g.raft.CommitIndex()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	got := g.host.peers.Standings(ctx, uint32(g.id), []string{server}, func(s []peer.Standing) bool { return len(s) > 0 })
	return len(got) == 1 && got[0].LastIndex >= commit
}

// preferred is the node that should lead the group.
func (g *group) preferred() int32 {
	if order := g.leaders(); len(order) > 0 {
		return order[0]
	}
	return 0
}

// leaders are the nodes that should lead the group, the best first. While meta is not known it is the founders' turn.
func (g *group) leaders() []int32 {
	if order := g.host.Cluster().Leaders(g.id); len(order) > 0 {
		return order
	}
	f := g.host.founderNodes()
	if len(f) == 0 {
		return nil
	}
	first := (int(g.id) + len(f) - 1) % len(f)
	return slices.Concat(f[first:], f[:first])
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
		Rank:      func() int { return max(0, slices.Index(g.leaders(), g.host.cfg.NodeID)) },
		Installed: func(index, term uint64) uint64 { return g.snaps.InstallableAt(index, term) },
		Install: func(index, term, installed uint64, hand func() error) (bool, error) {
			r := g.live.Load()
			if r == nil { // its goroutines run before it is here
				return false, errors.New("the group is being opened")
			}
			g.snapMu.Lock()
			defer g.snapMu.Unlock()
			g.snaps.ExpectInstall(index, term, installed, r.AppliedIndex)
			err := hand()
			return g.snaps.InstallRefused(), err
		}}
}

// transfer gives the leadership away. From now on this node is not named as the leader: clients would come back at once with what raft refuses. Several may be under way; raft refuses
// all but the first.
func (g *group) transfer(begin func() raft.Future) error {
	term := g.leads.Load()
	g.yields.Add(1)
	err := begin().Error()
	if err == nil {
		g.yielded.Store(term)
	}
	if g.yields.Add(-1); err != nil {
		g.host.poke()
	}
	return err
}

// handOver gives up the leadership before the node goes, if there is somebody to take it.
func (g *group) handOver(limit time.Duration) {
	if g.leads.Load() == 0 || len(g.voters()) < 2 {
		return
	}
	done := make(chan error, 1)
	go func() { done <- g.transfer(g.raft.LeadershipTransfer) }()
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
