package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// Host is this node's part of every group. It is the Appender, the views and the catalog of the layers above and below.
type Host struct {
	cfg        Config
	identity   identity
	lock       *os.File
	peers      *peerServer
	metrics    *metrics
	cluster    atomic.Pointer[state.Cluster]
	meta       *group
	shards     []*group // shards[i] is shard i+1; fixed after Open
	shardCount int

	pokeMu sync.Mutex
	poked  chan struct{} // closed and renewed when anything was applied

	ids   producerIDs
	marks marks

	opened chan struct{} // closed when every group is there
	stop   chan struct{}
	wg     sync.WaitGroup
}

// Open opens or creates the node in cfg.DataDir, and returns when it leads its groups and knows the cluster. A new directory becomes a
// cluster of one voter.
func Open(ctx context.Context, cfg Config) (*Host, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	h := &Host{cfg: cfg, stop: make(chan struct{}), opened: make(chan struct{}), poked: make(chan struct{}), shardCount: int(cfg.Shards)}
	var err error
	var fresh bool
	h.identity, h.lock, fresh, err = openDataDir(cfg.DataDir, cfg.NodeID)
	if err != nil {
		return nil, err
	}
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
	var err error
	if h.meta, err = openGroup(h, 0, filepath.Join(h.cfg.DataDir, "meta")); err != nil {
		return err
	}
	if err := h.await(ctx, "meta to have a leader", func() bool { return h.meta.leads.Load() > 0 }); err != nil {
		return err
	}
	if h.Cluster().ID == "" {
		if _, err := h.meta.propose(ctx, state.InitCluster{ClusterID: h.identity.ClusterID, Shards: h.cfg.Shards}); err != nil {
			return fmt.Errorf("initializing the cluster: %w", err)
		}
	}
	c := h.Cluster()
	if c.ID != h.identity.ClusterID {
		return fmt.Errorf("%w: its meta log belongs to cluster %s, %s says %s", ErrForeign, c.ID, identityFile, h.identity.ClusterID)
	}
	self := state.Node{ID: h.cfg.NodeID, Incarnation: h.identity.Incarnation, Host: h.cfg.Host, Port: h.cfg.Port, Rack: h.cfg.Rack}
	if old, ok := c.Node(self.ID); !ok || old != self {
		if _, err := h.meta.propose(ctx, state.RegisterNode{Node: self}); err != nil {
			return fmt.Errorf("registering the node: %w", err)
		}
	}
	if c.Shards != h.cfg.Shards {
		h.cfg.Logger.Info("the number of shards was fixed when the cluster was made", "shards", c.Shards, "configured", h.cfg.Shards)
	}
	h.shardCount = int(c.Shards)
	for s := range c.Shards {
		g, err := openGroup(h, record.ShardID(s+1), filepath.Join(h.cfg.DataDir, fmt.Sprintf("shard-%d", s+1)))
		if err != nil {
			return err
		}
		h.shards = append(h.shards, g)
	}
	close(h.opened)
	h.wg.Go(h.outboxLoop)
	if h.cfg.PeerListener != nil {
		h.peers = servePeers(h.cfg.PeerListener, hello{Cluster: c.ID, Server: h.identity.serverID()}, h.cfg.Logger)
	}
	return h.await(ctx, "every shard to have a leader", func() bool {
		for _, g := range h.shards {
			if g.leads.Load() == 0 {
				return false
			}
		}
		return true
	})
}

// poke wakes everyone who waits in await.
func (h *Host) poke() {
	h.pokeMu.Lock()
	defer h.pokeMu.Unlock()
	close(h.poked)
	h.poked = make(chan struct{})
}

// await returns when cond holds; it is asked again whenever something was applied.
func (h *Host) await(ctx context.Context, what string, cond func() bool) error {
	for {
		h.pokeMu.Lock()
		ch := h.poked
		h.pokeMu.Unlock()
		if cond() {
			return nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return fmt.Errorf("%w waiting for %s", ErrTimeout, what)
		case <-h.stop:
			return ErrStopped
		}
	}
}

// Close stops every group. What is not decided is answered with ErrStopped or ErrUnknownOutcome.
func (h *Host) Close(context.Context) error {
	select {
	case <-h.stop:
		return nil
	default:
		close(h.stop)
	}
	h.wg.Wait()
	var errs []error
	if h.peers != nil {
		errs = append(errs, h.peers.close())
	} else if h.cfg.PeerListener != nil {
		errs = append(errs, h.cfg.PeerListener.Close())
	}
	for _, g := range h.shards {
		errs = append(errs, g.close())
	}
	if h.meta != nil {
		errs = append(errs, h.meta.close())
	}
	var lock io.Closer = h.lock
	return errors.Join(append(errs, lock.Close())...)
}

// Cluster returns the applied state of meta: topics, nodes, settings.
func (h *Host) Cluster() *state.Cluster { return h.cluster.Load() }

// NodeID is this node's.
func (h *Host) NodeID() int32 { return h.cfg.NodeID }

// ClusterID is the cluster's ID in Kafka's form.
func (h *Host) ClusterID() string { return h.identity.ClusterID }

func (h *Host) shardByID(s record.ShardID) *group {
	if s == 0 || int(s) > len(h.shards) {
		return nil
	}
	return h.shards[s-1]
}

// groupOf returns the group that has the partition; nil if there is none.
func (h *Host) groupOf(tp record.TopicPartition) *group {
	t, ok := h.Cluster().TopicByID(tp.Topic)
	if !ok || tp.Partition < 0 || int(tp.Partition) >= len(t.Partitions) {
		return nil
	}
	return h.shardByID(t.Partitions[tp.Partition].Shard)
}

// Partition returns a partition's state as applied here: ErrUnknownPartition, or ErrNotLeader while its leader is not known.
func (h *Host) Partition(tp record.TopicPartition) (state.PartitionInfo, error) {
	g := h.groupOf(tp)
	if g == nil {
		return state.PartitionInfo{}, ErrUnknownPartition
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	info, ok := g.shard.Partition(tp)
	if !ok {
		return info, ErrUnknownPartition
	}
	if g.leads.Load() == 0 {
		return info, ErrNotLeader
	}
	return info, nil
}

// Leader returns the node that leads a shard; ok is false while none is known.
func (h *Host) Leader(s record.ShardID) (node int32, ok bool) {
	g := h.shardByID(s)
	if g == nil || g.leads.Load() == 0 {
		return -1, false
	}
	return h.cfg.NodeID, true
}

// EpochEnd answers OffsetForLeaderEpoch (KIP-320).
func (h *Host) EpochEnd(tp record.TopicPartition, epoch record.LeaderEpoch) (record.LeaderEpoch, record.Offset, error) {
	g := h.groupOf(tp)
	if g == nil {
		return -1, -1, ErrUnknownPartition
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	e, end := g.shard.EpochEnd(tp, epoch)
	return e, end, nil
}

// Prove returns when this node has shown that it still leads the shard and that everything acknowledged before the call is applied here. With
// one voter its own term is the majority; the conditions are those of the read index: the instance leads in T, has applied its LeaderStart of T,
// the commit index is taken after the call began, and the instance is still the same afterwards.
func (h *Host) Prove(ctx context.Context, s record.ShardID) error {
	g := h.shardByID(s)
	if g == nil {
		return ErrUnknownPartition
	}
	term := g.leads.Load()
	if term == 0 || g.raft.CurrentTerm() != term {
		return ErrNotLeader
	}
	commit := g.raft.CommitIndex()
	// Not raft's AppliedIndex: raft moves it after ApplyBatch, where await is woken, and nothing would ask again.
	if err := h.await(ctx, "the commit index to be applied", func() bool { return g.applied.Load() >= commit }); err != nil {
		return err
	}
	if g.raft.CurrentTerm() != term || g.leads.Load() != term {
		return ErrNotLeader
	}
	return nil
}

// slotOf is the slot of a group or transactional ID.
func slotOf(id string) uint8 {
	return uint8(crc32.Checksum([]byte(id), crc32.MakeTable(crc32.Castagnoli)))
}

// budgetWait bounds how long an append waits for the budget before it is refused.
const budgetWait = 2 * time.Second
