package raftmeta

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
)

// FollowerConfig describes a node that follows the voters and serves reads.
type FollowerConfig struct {
	// NodeID is what clients know it by.
	NodeID int32
	// Cluster are peer addresses of nodes of the cluster; one that answers is enough.
	Cluster []string
	Secret  []byte
	TLS     *peer.TLS
	// Payload: the newest batches come with the feed and are kept in memory; without, only what readers ask for.
	Payload bool
	// RingBytes bounds the entries in memory (64 MiB).
	RingBytes int64
	// Stay: only the nodes of Cluster are followed, which may be followers themselves: a second level costs the voters nothing.
	Stay bool
	// PeerListener takes connections of followers of this one; nil = it has none. Close closes it.
	PeerListener net.Listener

	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// OnFatal is told when the follower cannot go on: its program is too old for the cluster.
	OnFatal func(error)

	// For tests: as in Config.
	FeatureLevel uint32
	Dial         func(ctx context.Context, addr string) (net.Conn, error)
	Slower       int
}

// Follower has what the voters have committed, by following them, and stores nothing. It is the view and the hot log of a broker that only reads.
type Follower struct {
	cfg     FollowerConfig
	server  string
	peers   *peer.Peers
	m       *followerMetrics
	cluster atomic.Pointer[state.Cluster]
	level   atomic.Uint32
	id      string // the cluster's
	meta    *mirror
	shard   atomic.Pointer[[]*mirror] // shard i+1 at i; only longer lists replace it

	learnMu sync.Mutex
	learned map[string]string // addresses by server ID, as they answered

	bell bell // rings when anything was applied, or has become fresh

	stop   chan struct{}
	ctx    context.Context // ends with stop
	cancel context.CancelFunc
	mu     sync.Mutex // guards ended, and adding to wg
	ended  bool
	wg     sync.WaitGroup
}

type followerMetrics struct{ states, resyncs prometheus.Counter }

func (c *FollowerConfig) validate() error {
	if c.NodeID < 1 || len(c.Cluster) == 0 {
		return fmt.Errorf("raftmeta: a follower with node ID %d of %d nodes", c.NodeID, len(c.Cluster))
	}
	if c.RingBytes == 0 {
		c.RingBytes = 64 << 20
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Registerer == nil {
		c.Registerer = prometheus.NewRegistry()
	}
	if c.OnFatal == nil {
		c.OnFatal = func(error) {}
	}
	if c.FeatureLevel == 0 {
		c.FeatureLevel = state.LevelNewest
	}
	c.Slower = max(c.Slower, 1)
	return nil
}

// OpenFollower finds the cluster and follows it. It returns when everything is here that was acknowledged after the call began.
func OpenFollower(ctx context.Context, cfg FollowerConfig) (_ *Follower, err error) {
	defer func() {
		if err != nil && cfg.PeerListener != nil {
			_ = cfg.PeerListener.Close()
		}
	}()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	f := &Follower{cfg: cfg, server: fmt.Sprintf("%d.%s", cfg.NodeID, hex.EncodeToString(random(8))), learned: map[string]string{}, stop: make(chan struct{})}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.level.Store(state.LevelFirst)
	f.shard.Store(new([]*mirror))
	f.cluster.Store(state.NewMeta().View())
	f.m = &followerMetrics{
		states:  prometheus.NewCounter(prometheus.CounterOpts{Name: "estran_replica_states_total", Help: "States of groups that were taken over whole."}),
		resyncs: prometheus.NewCounter(prometheus.CounterOpts{Name: "estran_replica_resyncs_total", Help: "Feeds that did not continue the state."})}
	f.meta = newMirror(f, 0)
	if f.peers, err = peer.New(peer.Config{ServerID: f.server, Follower: true, Secret: cfg.Secret, TLS: cfg.TLS, Features: f.features, Listener: cfg.PeerListener, Source: f.source,
		Resolve: f.resolve, Dial: cfg.Dial, Slower: cfg.Slower, Logger: cfg.Logger, Registerer: cfg.Registerer}); err != nil {
		return nil, err
	}
	cfg.Registerer.MustRegister(f.m.states, f.m.resyncs)
	if err := f.open(ctx); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (f *Follower) open(ctx context.Context) error {
	for {
		err := f.discover(ctx)
		if err == nil {
			break
		}
		if errors.Is(err, peer.ErrStranger) {
			return err
		}
		if sleep(ctx, f.stop, foundEvery) != nil {
			return fmt.Errorf("%w looking for the cluster: %w", ErrTimeout, err)
		}
	}
	f.spawn(f.rediscover)
	f.follow(f.meta)
	if err := f.await(ctx, "meta", func() bool { return f.Cluster().Shards > 0 }); err != nil {
		return err
	}
	f.openShards()
	f.spawn(f.followShards)
	return f.await(ctx, "everything that was acknowledged", f.Ready)
}

// follow starts what keeps a mirror up to date.
func (f *Follower) follow(m *mirror) {
	f.spawn(func() { m.run(f.ctx) })
	f.spawn(func() { m.keepFresh(f.ctx) })
}

func (f *Follower) openShards() {
	for have := *f.shard.Load(); len(have) < int(f.Cluster().Shards); have = *f.shard.Load() {
		m := newMirror(f, record.ShardID(len(have)+1))
		longer := append(slices.Clone(have), m)
		f.shard.Store(&longer)
		f.follow(m)
	}
}

// followShards follows the shards that are added.
func (f *Follower) followShards() {
	for {
		ch := f.bell.listen()
		f.openShards()
		select {
		case <-ch:
		case <-f.stop:
			return
		}
	}
}

// discover asks the configured nodes who they are. The first that belongs to a cluster decides which.
func (f *Follower) discover(ctx context.Context) error {
	var errs []error
	for _, addr := range f.cfg.Cluster {
		p, err := f.peers.Ask(ctx, addr)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", addr, err))
			continue
		case p.Cluster == "":
			errs = append(errs, fmt.Errorf("%s belongs to no cluster yet", addr))
			continue
		}
		f.learnMu.Lock()
		id, _, err := parseCluster(p.Cluster)
		switch {
		case err != nil || f.id != "" && f.id != id:
			errs = append(errs, fmt.Errorf("%w: %s belongs to cluster %q, want %q", ErrForeign, addr, p.Cluster, f.id))
		default:
			f.id = id
			f.peers.Join(p.Cluster, p.Founders)
			f.learned[p.Server] = addr
		}
		f.learnMu.Unlock()
	}
	if len(errs) == len(f.cfg.Cluster) {
		return errors.Join(errs...)
	}
	return nil
}

// rediscover asks again as long as something is not fresh: nodes may have been replaced.
func (f *Follower) rediscover() {
	for sleep(f.ctx, f.stop, f.slow(staleAfter)) == nil {
		if !f.Ready() {
			if err := f.discover(f.ctx); err != nil {
				f.cfg.Logger.Debug("no node answers", "component", "replica", "err", err)
			}
		}
	}
}

// Close ends the follower.
func (f *Follower) Close() error {
	f.mu.Lock()
	ended := f.ended
	f.ended = true
	f.mu.Unlock()
	if ended {
		return nil
	}
	close(f.stop)
	f.cancel()
	err := f.peers.Close() // ends what waits for an answer
	f.wg.Wait()
	return err
}

// spawn runs do on a goroutine that Close waits for; false = it has been called.
func (f *Follower) spawn(do func()) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.ended {
		f.wg.Go(do)
	}
	return !f.ended
}

func (f *Follower) slow(d time.Duration) time.Duration { return d * time.Duration(f.cfg.Slower) }

func (f *Follower) features() map[string]peer.Levels {
	return map[string]peer.Levels{featureLevel: {int(f.level.Load()), int(f.cfg.FeatureLevel)}}
}

func (f *Follower) source(id uint32) peer.Source {
	if id == 0 {
		return f.meta
	}
	if list := *f.shard.Load(); int(id) <= len(list) {
		return list[id-1]
	}
	return nil
}

// resolve gives the address of a server.
func (f *Follower) resolve(server string) (string, bool) {
	if n, ok := f.Cluster().Node(nodeOf(server)); ok && string(serverOf(n)) == server && n.Peer != "" {
		return n.Peer, true
	}
	f.learnMu.Lock()
	defer f.learnMu.Unlock()
	addr, ok := f.learned[server]
	return addr, ok
}

func (f *Follower) knows(server string) bool { _, ok := f.resolve(server); return ok }

// servers are those that can be followed, in an order that lasts.
func (f *Follower) servers() []string {
	set := map[string]bool{}
	for _, n := range f.Cluster().Nodes() {
		if n.Peer != "" && !f.cfg.Stay {
			set[string(serverOf(n))] = true
		}
	}
	if len(set) == 0 {
		f.learnMu.Lock()
		defer f.learnMu.Unlock()
		for s := range f.learned {
			set[s] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}

// serverOfNode is the server of a voter; "" if it is not known.
func (f *Follower) serverOfNode(node int32) string {
	for _, s := range f.servers() {
		if nodeOf(s) == node {
			return s
		}
	}
	return ""
}

func (f *Follower) shards() int { return int(f.Cluster().Shards) }

func (f *Follower) poke() { f.bell.ring() }

// await returns when cond holds; it is asked again whenever something was applied.
func (f *Follower) await(ctx context.Context, what string, cond func() bool) error {
	for {
		ch := f.bell.listen()
		if cond() {
			return nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return fmt.Errorf("%w waiting for %s", ErrTimeout, what)
		case <-f.stop:
			return ErrStopped
		}
	}
}

// Ready reports whether all groups have, within the last seconds, had everything that was acknowledged.
func (f *Follower) Ready() bool {
	list := *f.shard.Load()
	if len(list) == 0 || len(list) < f.shards() || !f.meta.isFresh() {
		return false
	}
	return !slices.ContainsFunc(list, func(m *mirror) bool { return !m.isFresh() })
}

// Cluster returns the applied state of meta.
func (f *Follower) Cluster() *state.Cluster { return f.cluster.Load() }

// NodeID is this node's.
func (f *Follower) NodeID() int32 { return f.cfg.NodeID }

// ClusterID is the cluster's ID in Kafka's form.
func (f *Follower) ClusterID() string {
	f.learnMu.Lock()
	defer f.learnMu.Unlock()
	return f.id
}

// Down reports that no voter is known to be down: voters know.
func (f *Follower) Down(int32) bool { return false }

func (f *Follower) shardByID(s record.ShardID) *mirror {
	list := *f.shard.Load()
	if s == 0 || int(s) > len(list) {
		return nil
	}
	return list[s-1]
}

func (f *Follower) mirrorOf(tp record.TopicPartition) *mirror {
	return f.shardByID(shardOf(f.Cluster(), tp))
}

// Leader returns the voter that leads a shard, as far as its commands say.
func (f *Follower) Leader(s record.ShardID) (node int32, ok bool) {
	m := f.shardByID(s)
	if m == nil {
		return -1, false
	}
	if n := m.leaderNode(); n != 0 && f.Cluster().Member(n) {
		return n, true
	}
	return -1, false
}

// AwaitLeader returns when Leader knows one, or ctx ends.
func (f *Follower) AwaitLeader(ctx context.Context, s record.ShardID) {
	_ = f.await(ctx, "a leader", func() bool { // the caller asks who it is
		_, ok := f.Leader(s)
		return ok
	})
}

// Partition returns a partition's state as applied here: ErrNotLeader while this follower cannot show that it is not behind.
func (f *Follower) Partition(tp record.TopicPartition) (state.PartitionInfo, error) {
	m := f.mirrorOf(tp)
	if m == nil {
		return state.PartitionInfo{}, ErrUnknownPartition
	}
	info, err := m.partition(tp)
	if err == nil && !m.isFresh() {
		return info, ErrNotLeader
	}
	return info, err
}

// EpochEnd answers OffsetForLeaderEpoch (KIP-320) from what is applied here: who tells a client that it diverges proves first.
func (f *Follower) EpochEnd(tp record.TopicPartition, epoch record.LeaderEpoch) (record.LeaderEpoch, record.Offset, error) {
	m := f.mirrorOf(tp)
	if m == nil {
		return -1, -1, ErrUnknownPartition
	}
	e, end := m.epochEnd(tp, epoch)
	return e, end, nil
}

// Watch is Host.Watch.
func (f *Follower) Watch(tps []record.TopicPartition, wake func()) (stop func()) {
	return watch(tps, wake, func(tp record.TopicPartition) *view {
		if m := f.mirrorOf(tp); m != nil {
			return &m.view
		}
		return nil
	})
}

// Prove returns when everything that was acknowledged before the call is applied here: the leader says how far that is, after it has asked a majority.
func (f *Follower) Prove(ctx context.Context, s record.ShardID) error {
	m := f.shardByID(s)
	if m == nil {
		return ErrUnknownPartition
	}
	return m.prove(ctx)
}

// Current is Prove for meta.
func (f *Follower) Current(ctx context.Context) error { return f.meta.prove(ctx) }

// Replicas returns the voters of a shard. Who of them is in contact with the leader is theirs to know: here all are.
func (f *Follower) Replicas(s record.ShardID) Replicas {
	v := slices.Clone(f.Cluster().Members())
	slices.Sort(v)
	r := Replicas{InSync: slices.Clone(v)}
	if order := f.Cluster().Leaders(s); len(order) > 0 {
		if i := slices.Index(v, order[0]); i > 0 {
			v = slices.Concat(v[i:], v[:i])
		}
	}
	r.Voters = v
	return r
}

// Voters is how many nodes the quorum has.
func (f *Follower) Voters() int { return len(f.Cluster().Members()) }

// GroupShard is Host.GroupShard.
func (f *Follower) GroupShard(group string) record.ShardID {
	slot := state.GroupSlot(group)
	s := f.Cluster().SlotShard(slot)
	m := f.shardByID(s)
	if m == nil {
		return 0
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.shard.Released(slot) {
		return 0
	}
	return s
}

var (
	_ tiering.HotLog = (*Follower)(nil)
	_ tiering.View   = (*Follower)(nil)
)

// ReadHot implements tiering.HotLog: from memory, else from a voter.
func (f *Follower) ReadHot(ctx context.Context, tp record.TopicPartition, from record.Offset, l tiering.Limits) (tiering.Result, error) {
	m := f.mirrorOf(tp)
	if m == nil {
		return tiering.Result{}, tiering.ErrUnknownPartition
	}
	return m.readHot(ctx, tp, from, l, m.open, func(record.TopicPartition, record.Offset) {})
}

// Bounds implements tiering.View.
func (f *Follower) Bounds(tp record.TopicPartition) (tiering.Bounds, bool) {
	m := f.mirrorOf(tp)
	if m == nil {
		return tiering.Bounds{}, false
	}
	return m.bounds(tp)
}

// ShardOf implements tiering.View.
func (f *Follower) ShardOf(tp record.TopicPartition) (record.ShardID, bool) {
	s := shardOf(f.Cluster(), tp)
	return s, f.shardByID(s) != nil
}

// Runs implements tiering.View.
func (f *Follower) Runs(tp record.TopicPartition, from record.Offset, max int) []tiering.RunRef {
	m := f.mirrorOf(tp)
	if m == nil {
		return nil
	}
	return m.runs(tp, from, max)
}

// HotRange implements tiering.View.
func (f *Follower) HotRange(tp record.TopicPartition) (tiering.HotRange, bool) {
	m := f.mirrorOf(tp)
	if m == nil {
		return tiering.HotRange{}, false
	}
	return m.hotRangeOf(tp)
}

// Batches implements tiering.View.
func (f *Follower) Batches(ctx context.Context, s record.ShardID, r tiering.HotRange, maxBytes int64) ([]tiering.HotBatch, error) {
	m := f.shardByID(s)
	if m == nil {
		return nil, ErrNotLeader
	}
	return m.batches(ctx, r, maxBytes, m.open)
}
