package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// Host is this node's part of every group. It is the Appender, the views and the catalog of the layers above and below.
type Host struct {
	cfg        Config
	identity   identity
	lock       *os.File
	peers      *peer.Peers
	metrics    *metrics
	cluster    atomic.Pointer[state.Cluster]
	meta       *group
	serving    atomic.Bool              // meta is there: peers, whom the listener lets in before, may ask for commands
	shards     atomic.Pointer[[]*group] // shard i+1 at i; only longer lists replace it
	shardCount int
	seen       atomic.Pointer[map[int32]string] // where other nodes were last, by node.json
	recorded   []uint32                         // the groups that node.json says have been here; of open, then of followShards

	level         atomic.Uint32 // the highest feature level that was seen in force
	recordedLevel uint32        // by node.json; of open, then of followShards
	refuseOnce    sync.Once
	refused       chan struct{} // closed when the cluster is at a level that this program does not know
	refusal       error         // why, once refused is closed

	bell bell // rings when anything was applied

	ids   producerIDs
	marks marks
	down  nodesDown

	opened  chan struct{} // closed when every group is there
	removed chan struct{} // closed when the others say that this node is no member any more
	stop    chan struct{}
	ctx     context.Context // ends with stop
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

// Open opens or creates the node in cfg.DataDir, and returns when it leads its groups and knows the cluster. A new directory becomes a
// cluster of one voter. On an error cfg.PeerListener is closed.
func Open(ctx context.Context, cfg Config) (_ *Host, err error) {
	defer func() {
		if err != nil && cfg.PeerListener != nil {
			_ = cfg.PeerListener.Close() // a Host that got so far has closed it
		}
	}()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	h := &Host{cfg: cfg, stop: make(chan struct{}), opened: make(chan struct{}), removed: make(chan struct{}), refused: make(chan struct{}), shardCount: int(cfg.Shards)}
	var fresh bool
	h.identity, h.lock, fresh, err = openDataDir(cfg.DataDir, cfg.NodeID, cfg.alone())
	if err != nil {
		return nil, err
	}
	if r := h.identity.Recovering; r != 0 {
		return nil, errors.Join(fmt.Errorf("%w: of epoch %d", ErrRecovering, r), h.lock.Close())
	}
	h.recordedLevel = h.identity.Level
	h.level.Store(max(h.recordedLevel, state.LevelFirst))
	if err := state.CheckLevel(h.level.Load(), cfg.FeatureLevel); err != nil {
		return nil, errors.Join(err, h.lock.Close())
	}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	h.shards.Store(new([]*group))
	h.recorded = h.identity.Groups
	seen := h.identity.Peers // not the field: join writes that while links look for peers
	h.seen.Store(&seen)
	h.metrics = newMetrics(h)
	h.cluster.Store(state.NewMeta().View())
	if err := h.open(ctx); err != nil {
		return nil, errors.Join(err, h.Close(context.Background()))
	}
	if fresh {
		cfg.Logger.Info("initialized a new cluster", "event", "cluster.initialized", "cluster", h.identity.ClusterID)
	}
	h.metrics.register(cfg.Registerer, h)
	return h, nil
}

func (h *Host) open(ctx context.Context) error {
	err := h.openPeers()
	if err != nil {
		return err
	}
	if h.identity.ClusterID == "" {
		if err := h.found(ctx); err != nil {
			return err
		}
	}
	if silent := h.askPeers(ctx); len(silent) > 0 {
		h.wg.Go(func() { h.askLater(silent) })
	}
	if h.meta, err = openGroup(h, 0, filepath.Join(h.cfg.DataDir, "meta")); err != nil {
		return err
	}
	h.serving.Store(true)
	self := state.Node{ID: h.cfg.NodeID, Incarnation: h.identity.Incarnation, Host: h.cfg.Host, Port: h.cfg.Port, Rack: h.cfg.Rack, Peer: h.peerAddress(), Level: h.cfg.FeatureLevel}
	h.wg.Go(h.watchMembership)
	if last, err := h.meta.log.LastIndex(); err != nil {
		return err
	} else if last == 0 { // nobody speaks to it before meta knows it
		if err := h.announce(ctx, self); err != nil {
			return err
		}
	}
	if err := h.await(ctx, "meta to have a leader", func() bool { return h.meta.leads.Load() > 0 || h.Cluster().ID != "" }); err != nil {
		return err
	}
	for h.Cluster().ID == "" { // whoever leads says so; a leader that is deposed meanwhile leaves it to the next
		_, err := h.meta.propose(ctx, state.InitCluster{ClusterID: h.identity.ClusterID, Shards: h.cfg.Shards, Members: h.founderNodes(), Level: h.cfg.FeatureLevel})
		if err != nil && !errors.Is(err, ErrNotLeader) && !errors.Is(err, ErrUnknownOutcome) || ctx.Err() != nil {
			return fmt.Errorf("initializing the cluster: %w", err)
		}
		if err := h.await(ctx, "the cluster to be initialized", func() bool { return h.meta.leads.Load() > 0 || h.Cluster().ID != "" }); err != nil {
			return err
		}
	}
	c := h.Cluster()
	if c.ID != h.identity.ClusterID {
		return fmt.Errorf("%w: its meta log belongs to cluster %s, %s says %s", ErrForeign, c.ID, identityFile, h.identity.ClusterID)
	}
	if old, ok := c.Node(self.ID); !ok || old != self || c.Draining(self.ID) { // who starts no longer drains
		if err := h.decideMeta(ctx, state.RegisterNode{Node: self}); err != nil {
			return fmt.Errorf("registering the node: %w", err)
		}
	}
	if c.RecoveryEpoch() < h.identity.Recovered { // nobody else can lead before this is done
		if err := h.decideMeta(ctx, state.Recover{Epoch: h.identity.Epoch, Node: self.ID}); err != nil {
			return fmt.Errorf("ending the recovery: %w", err)
		}
	}
	if c.Shards != h.cfg.Shards {
		h.cfg.Logger.Info("the number of shards was fixed when the cluster was made", "shards", c.Shards, "configured", h.cfg.Shards)
	}
	h.shardCount = int(c.Shards)
	if err := h.openShards(); err != nil {
		return err
	}
	close(h.opened)
	h.wg.Go(h.watchNodes)
	if err := h.await(ctx, "every shard to have a leader", func() bool {
		for _, g := range h.shardList() {
			if _, ok := h.Leader(g.id); !ok {
				return false
			}
		}
		return true
	}); err != nil {
		return err
	}
	if err := h.recordGroups(); err != nil {
		return err
	}
	h.wg.Go(h.followShards)
	return nil
}

// openShards opens the shards that meta knows and this node has not opened.
func (h *Host) openShards() error {
	for have := h.shardList(); len(have) < int(h.Cluster().Shards); have = h.shardList() {
		n := len(have) + 1
		g, err := openGroup(h, record.ShardID(n), filepath.Join(h.cfg.DataDir, fmt.Sprintf("shard-%d", n)))
		if err != nil {
			return err
		}
		longer := append(slices.Clone(have), g)
		h.shards.Store(&longer)
		h.wg.Go(func() { h.carry(g) })
	}
	return nil
}

// followShards opens the shards that are added while the node runs, and remembers the groups that have been here.
func (h *Host) followShards() {
	for {
		ch := h.bell.listen()
		if err := errors.Join(h.openShards(), h.recordGroups(), h.recordPeers(), h.recordLevel()); err != nil {
			h.cfg.OnFatal(err)
			return
		}
		select {
		case <-ch:
		case <-h.stop:
			return
		}
	}
}

func (h *Host) shardList() []*group { return *h.shards.Load() }

// groups are all groups of this node, meta first.
func (h *Host) groups() []*group {
	var out []*group
	if h.meta != nil {
		out = append(out, h.meta)
	}
	return append(out, h.shardList()...)
}

// poke wakes everyone who waits in await.
func (h *Host) poke() { h.bell.ring() }

// await returns when cond holds; it is asked again whenever something was applied.
func (h *Host) await(ctx context.Context, what string, cond func() bool) error {
	for {
		ch := h.bell.listen()
		if cond() {
			return nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return fmt.Errorf("%w waiting for %s", ErrTimeout, what)
		case <-h.removed:
			return ErrRemoved
		case <-h.refused:
			return h.refusal
		case <-h.stop:
			return ErrStopped
		}
	}
}

// HandOver gives up what this node leads, group by group at once, to whoever can take it; it waits for at most handOverTime. Clients that are served meanwhile are told who leads now.
func (h *Host) HandOver() {
	var wg sync.WaitGroup
	for _, g := range h.groups() {
		wg.Go(func() { g.handOver(handOverTime) })
	}
	wg.Wait()
}

// Close stops every group. What is not decided is answered with ErrStopped or ErrUnknownOutcome.
func (h *Host) Close(context.Context) error {
	select {
	case <-h.stop:
		return nil
	default:
		close(h.stop)
		h.cancel()
	}
	h.wg.Wait()
	var errs []error
	groups := h.groups()
	slices.Reverse(groups) // meta last
	h.HandOver()
	for _, g := range groups {
		errs = append(errs, g.close())
	}
	switch {
	case h.peers != nil:
		errs = append(errs, h.peers.Close())
	case h.cfg.PeerListener != nil:
		errs = append(errs, h.cfg.PeerListener.Close())
	}
	var lock io.Closer = h.lock
	return errors.Join(append(errs, lock.Close())...)
}

// Cluster returns the applied state of meta: topics, nodes, settings.
func (h *Host) Cluster() *state.Cluster { return h.cluster.Load() }

// NodeID is this node's.
func (h *Host) NodeID() int32 { return h.cfg.NodeID }

// Founder reports whether the cluster was made of this node, with the directory that it has now.
func (h *Host) Founder() bool { return slices.Contains(h.identity.Founders, h.identity.serverID()) }

// RecoveryEpoch counts how often the cluster was recovered from a lost majority.
func (h *Host) RecoveryEpoch() uint64 { return h.identity.Epoch }

// ClusterID is the cluster's ID in Kafka's form.
func (h *Host) ClusterID() string { return h.identity.ClusterID }

func (h *Host) shardByID(s record.ShardID) *group {
	list := h.shardList()
	if s == 0 || int(s) > len(list) {
		return nil
	}
	return list[s-1]
}

// groupOf returns the group that has the partition; nil if there is none.
func (h *Host) groupOf(tp record.TopicPartition) *group {
	return h.shardByID(shardOf(h.Cluster(), tp))
}

// Partition returns a partition's state as applied here: ErrUnknownPartition, or ErrNotLeader while its leader is not known.
func (h *Host) Partition(tp record.TopicPartition) (state.PartitionInfo, error) {
	g := h.groupOf(tp)
	if g == nil {
		return state.PartitionInfo{}, ErrUnknownPartition
	}
	info, err := g.partition(tp)
	if err == nil && g.leads.Load() == 0 {
		return info, ErrNotLeader
	}
	return info, err
}

// Leader returns the node that leads a shard; ok is false while none is known. A leader is known once its LeaderStart has been applied here and raft follows it.
func (h *Host) Leader(s record.ShardID) (node int32, ok bool) {
	g := h.shardByID(s)
	if g == nil {
		return -1, false
	}
	if term := g.leads.Load(); term > 0 {
		if g.batcher.hung.Load() || g.yields.Load() > 0 || g.yielded.Load() == term || g.leaderServer() != g.self { // soon another one does
			return -1, false
		}
		return h.cfg.NodeID, true
	}
	follows := nodeOf(g.leaderServer())
	g.mu.RLock()
	started := g.machine.leader().Node
	g.mu.RUnlock()
	if follows == 0 || follows == h.cfg.NodeID || follows != started {
		return -1, false
	}
	return follows, true
}

// AwaitLeader returns when Leader knows who leads the shard, or ctx ends.
func (h *Host) AwaitLeader(ctx context.Context, s record.ShardID) {
	_ = h.await(ctx, "a leader", func() bool { // the caller asks who it is
		_, ok := h.Leader(s)
		return ok
	})
}

// EpochEnd answers OffsetForLeaderEpoch (KIP-320).
func (h *Host) EpochEnd(tp record.TopicPartition, epoch record.LeaderEpoch) (record.LeaderEpoch, record.Offset, error) {
	g := h.groupOf(tp)
	if g == nil {
		return -1, -1, ErrUnknownPartition
	}
	e, end := g.epochEnd(tp, epoch)
	return e, end, nil
}

// Prove returns when this node has shown that it still leads the shard and that everything acknowledged before the call is applied here: the read index. The instance
// leads in T and has applied its LeaderStart of T; the commit index is taken after the call began; a majority of the voters, each asked after the call began, is at T
// or below; and the instance still leads in T afterwards.
func (h *Host) Prove(ctx context.Context, s record.ShardID) error {
	g := h.shardByID(s)
	if g == nil {
		return ErrUnknownPartition
	}
	return h.prove(ctx, g)
}

func (h *Host) prove(ctx context.Context, g *group) error {
	term := g.leads.Load()
	if term == 0 || g.raft.CurrentTerm() != term {
		return ErrNotLeader
	}
	if planted.On(planted.VerifyLeaderAsProof) {
		return g.raft.VerifyLeader().Error()
	}
	commit := g.raft.CommitIndex()
	if err := h.majority(ctx, g, term); err != nil {
		return err
	}
	// Not raft's AppliedIndex: raft moves it after ApplyBatch, where await is woken, and nothing would ask again.
	if err := h.await(ctx, "the commit index to be applied", func() bool { return g.applied.Load() >= commit }); err != nil {
		return err
	}
	if g.raft.CurrentTerm() != term || g.leads.Load() != term {
		return ErrNotLeader
	}
	return nil
}

// majority asks the voters for their terms until most have none above `term`.
func (h *Host) majority(ctx context.Context, g *group, term uint64) error {
	self := h.identity.serverID()
	voters := g.voters()
	if len(voters) == 1 && voters[0] == self {
		return nil
	}
	others := slices.DeleteFunc(slices.Clone(voters), func(s string) bool { return s == self })
	need := len(voters)/2 + 1
	agree := func(answers []peer.Standing) int {
		n := len(voters) - len(others) // this node
		for _, a := range answers {
			if a.Term <= term {
				n++
			}
		}
		return n
	}
	if got := h.peers.Standings(ctx, uint32(g.id), others, func(a []peer.Standing) bool { return agree(a) >= need }); agree(got) < need {
		return fmt.Errorf("%w: %d of %d voters confirm term %d", ErrNotLeader, agree(got), len(voters), term)
	}
	return nil
}

// handOverTime bounds how long a node that goes waits for somebody to take a group's leadership.
const handOverTime = time.Second

// budgetWait bounds how long an append waits for the budget before it is refused.
const budgetWait = 2 * time.Second
