package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/hashicorp/raft"
)

// machine is a group's state machine as the FSM drives it. Its methods are called with group.mu held for writing, except write.
type machine interface {
	apply(index, term uint64, data []byte) outcome
	freeze() frozen
	restore(r io.Reader) error
	// oldestHot is the index of the oldest entry that is still needed; MaxUint64 if none.
	oldestHot() uint64
	leader() state.LeaderStart
	clock() record.Timestamp
	level() uint32
	// position is the last command that was applied.
	position() peer.Position
}

// frozen is a state that can be written while the machine goes on.
type frozen interface {
	WriteTo(w io.Writer) (int64, error)
	Index() state.RaftIndex
}

// outcome is what Apply returns to the batcher. It owns its slices.
type outcome struct {
	appends []state.AppendResult
	results []state.Result
	dirty   []record.TopicPartition
	dropped []state.DroppedRef
	void    bool
}

// group is one Raft group of this node.
type group struct {
	id    record.ShardID
	host  *Host
	self  string // this node's server ID
	share int    // of how many shards, for what the node's groups divide among them
	log_  *slog.Logger

	log     *raftlog.Log
	stable  *raftlog.Stable
	snaps   *raftlog.Snapshots
	raft    *raft.Raft
	live    atomic.Pointer[raft.Raft] // raft, once it is open: for what its transport asks
	trans   *peer.Transport
	batcher *batcher
	clock   *clock
	census  atomic.Pointer[census]
	seen    atomic.Int64 // the replicated clock
	metrics *groupMetrics

	view
	machine machine // guarded by mu, as the view's states are, which it applies to
	refused error   // the state has a feature level that this program does not know: it stays as it is

	applied atomic.Uint64 // last index that the machine has seen, of any type
	leads   atomic.Uint64 // term whose LeaderStart was applied and that this node leads; 0 = none
	yields  atomic.Int32  // transfers of the leadership that are under way: raft takes no entries
	yielded atomic.Uint64 // the last term whose leadership was handed over
	changed chan struct{} // poked when something was applied

	patience patience // of balance, which runs once at a time

	snapMu    sync.Mutex // a local snapshot and an install never overlap
	snapBytes atomic.Int64

	pub *peer.Publisher // used with mu held
	// openEntry and mend as values: to make one for each read is an allocation.
	opens opener
	mends func(record.TopicPartition, record.Offset)
	// mending: a damaged entry is being repaired.
	mending single

	notify chan bool
	stop   chan struct{}
	wg     sync.WaitGroup
}

func openGroup(h *Host, id record.ShardID, dir string) (*group, error) {
	g := &group{id: id, host: h, self: h.identity.serverID(), share: max(1, h.shardCount), log_: h.cfg.Logger.With("component", "raft", "group", id), notify: make(chan bool, 16), stop: make(chan struct{}),
		changed: make(chan struct{}, 1)}
	g.metrics = h.metrics.group(id)
	g.clock = newClock(h.cfg.Now, h.cfg.StoreTime, g.clocks, g.log_)
	g.batcher = newBatcher(g)
	g.watch.init()
	g.pub = peer.NewPublisher(uint32(id))
	g.opens, g.mends = g.openEntry, g.mend
	if id == 0 {
		g.meta = state.NewMeta()
		g.machine = &metaMachine{g}
	} else {
		g.shard = state.NewShard(id)
		g.machine = &shardMachine{g}
	}
	if err := g.openStores(dir); err != nil {
		return nil, errors.Join(err, g.closeStores())
	}
	last, err := g.log.LastIndex()
	if err != nil {
		return nil, errors.Join(err, g.closeStores())
	}
	fresh := last == 0 && g.preferred() == h.cfg.NodeID
	if err := g.openRaft(); err != nil {
		return nil, errors.Join(err, g.closeStores())
	}
	g.wg.Go(g.batcher.run)
	g.wg.Go(g.leadership)
	g.wg.Go(g.snapshotLoop)
	if v := g.voters(); fresh && len(v) > 0 || len(v) == 1 && v[0] == h.identity.serverID() {
		g.trans.ElectNow() // nobody else stands, or should: no timer need run out
	}
	return g, nil
}

func (g *group) openStores(dir string) error {
	c := &g.host.cfg
	var err error
	retention := int64(0)
	if g.id != 0 {
		retention = c.LocalRetentionBytes / int64(g.share)
	}
	tail := c.TailBytes
	if g.id == 0 && tail == 0 {
		tail = 1 << 20
	}
	if g.log, err = raftlog.Open(raftlog.Config{Dir: dir, Group: uint32(g.id), FS: c.FS, FileBytes: c.FileBytes, TailBytes: tail, LocalRetention: retention,
		OnFatal: c.OnFatal, Logger: c.Logger, Metrics: g.metrics.log}); err != nil {
		return err
	}
	if g.stable, err = raftlog.OpenStable(c.FS, dir, c.OnFatal); err != nil {
		return err
	}
	g.log.WatchStable(g.stable)
	if g.snaps, err = raftlog.OpenSnapshots(g.log); err != nil {
		return err
	}
	last, err := g.log.LastIndex()
	if err != nil {
		return err
	}
	if g.stable.Empty() && last > 0 {
		return fmt.Errorf("%w: %s has a log but no term: the directory is incomplete", ErrForeign, filepath.Base(dir))
	}
	return nil
}

func (g *group) closeStores() error {
	var errs []error
	if g.log != nil {
		errs = append(errs, g.log.Close())
	}
	if g.stable != nil {
		errs = append(errs, g.stable.Close())
	}
	return errors.Join(errs...)
}

func (g *group) openRaft() error {
	id := g.host.identity.serverID()
	g.trans = g.host.peers.Open(g.transportGroup())
	cfg := raft.DefaultConfig()
	cfg.LocalID = raft.ServerID(id)
	timeout := g.host.cfg.slow(raftTimeout)
	cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout = timeout, timeout, timeout
	cfg.CommitTimeout = g.host.cfg.slow(commitTimeout)
	cfg.SnapshotThreshold, cfg.SnapshotInterval, cfg.TrailingLogs = math.MaxUint64, 10*365*24*time.Hour, 0 // our own trigger decides
	cfg.NotifyCh = g.notify
	cfg.ShutdownOnRemove = false // a node that was removed finds out by watchMembership, and says so
	cfg.NoLegacyTelemetry = true
	cfg.Logger = newHclog(g.log_)
	err := g.bootstrap(cfg)
	if err == nil {
		err = g.notBehind()
	}
	if err != nil {
		return errors.Join(err, g.trans.Close())
	}
	log := g.log.ForRaft()
	g.raft, err = newRaft(cfg, &fsm{g}, log, g.stable.ForRaft(), g.snaps.Store(), g.trans)
	if err != nil {
		return errors.Join(g.refused, fmt.Errorf("raftmeta: opening group %d: %w", g.id, err), g.trans.Close())
	}
	log.Runs()
	if g.refused != nil { // by a snapshot; raft may have found an older one
		return errors.Join(g.refused, g.trans.Close(), g.raft.Shutdown().Error())
	}
	g.live.Store(g.raft)
	return nil
}

// newRaft is raft.NewRaft, which panics with the error of a log that it cannot read.
func newRaft(cfg *raft.Config, f raft.FSM, log raft.LogStore, stable raft.StableStore, snaps raft.SnapshotStore, trans raft.Transport) (r *raft.Raft, err error) {
	defer func() {
		if p := recover(); p != nil {
			var ok bool
			if err, ok = p.(error); !ok || !errors.Is(err, raftlog.ErrRead) {
				panic(p)
			}
		}
	}()
	return raft.NewRaft(cfg, f, log, stable, snaps, trans)
}

// leadership follows raft's word on who leads. raft blocks on notify, so this loop never waits for raft.
func (g *group) leadership() {
	var cancel context.CancelFunc
	var lead sync.WaitGroup
	end := func() {
		g.leads.Store(0)
		if cancel != nil {
			cancel()
			cancel = nil
		}
		g.batcher.follow()
		lead.Wait()
		g.leads.Store(0) // again: the start of the term may have been applied just before it ended
	}
	defer end()
	for {
		select {
		case <-g.stop:
			return
		case leads := <-g.notify:
			end()
			if !leads {
				g.log_.Info("leadership lost", "event", "leader.lost")
				continue
			}
			cancel = g.startLead(&lead)
		}
	}
}

func (g *group) startLead(wg *sync.WaitGroup) context.CancelFunc {
	ctx, cancel := context.WithCancel(context.Background())
	term := g.raft.CurrentTerm()
	wg.Go(func() { g.lead(ctx, term) })
	return cancel
}

// lead proposes this term's LeaderStart and, when it has been applied, runs what a leader does until ctx ends.
func (g *group) lead(ctx context.Context, term uint64) {
	g.batcher.lead(term)
	applied := make(chan error, 2)
	g.batcher.command(state.LeaderStart{Term: state.Term(term), Node: g.host.cfg.NodeID}, true, func(_ state.Result, err error) { applied <- err })
	if planted.On(planted.LeaderStartSkipped) {
		applied <- nil
	}
	if err := <-applied; err != nil {
		if ctx.Err() == nil {
			g.log_.Warn("the start of a term was not committed", "term", term, "err", err)
		}
		return
	}
	g.batcher.started(term) // first: who sees leads may propose
	g.leads.Store(term)
	g.log_.Info("leading", "event", "leader.elected", "term", term)
	g.host.poke()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { g.keepVoters(ctx) })
	wg.Go(func() { g.balance(ctx) })
	if g.host.cfg.OnBackup != nil {
		wg.Go(func() { g.backups(ctx) })
	}
	if g.id == 0 {
		<-ctx.Done()
		return
	}
	select {
	case <-g.host.opened: // what a leader does may look at the other groups
	case <-ctx.Done():
		return
	}
	g.host.cfg.OnLead(ctx, g.id)
	<-ctx.Done()
}

// propose commits one command and returns its result.
func (g *group) propose(ctx context.Context, c state.Command) (state.Result, error) {
	var out [1]decision
	g.proposeAll(ctx, []state.Command{c}, []int{0}, out[:])
	return out[0].r, out[0].err
}

// proposeAll commits cs[i] for all i in `which` and sets out[i].
func (g *group) proposeAll(ctx context.Context, cs []state.Command, which []int, out []decision) {
	type answer struct {
		i int
		d decision
	}
	ch := make(chan answer, len(which))
	for _, i := range which {
		out[i] = decision{err: fmt.Errorf("%w: %T", ErrUnknownOutcome, cs[i])} // until it is known
		g.batcher.command(cs[i], false, func(r state.Result, err error) { ch <- answer{i, decision{r, err}} })
	}
	for range which {
		select {
		case a := <-ch:
			out[a.i] = a.d
		case <-ctx.Done():
			return
		}
	}
}

func (g *group) appendResult(r state.AppendResult) AppendResult {
	out := AppendResult{Base: r.Base, LogStart: r.LogStart}
	switch r.Code {
	case state.OK, state.Duplicate:
	case state.OutOfOrderSequence:
		out.Err = ErrOutOfOrderSequence
	case state.InvalidProducerEpoch:
		out.Err = ErrInvalidProducerEpoch
	case state.UnknownPartition:
		out.Err = ErrUnknownPartition
	default:
		out.Err = fmt.Errorf("%w: code %d", ErrInvalid, r.Code)
	}
	return out
}

// close stops the group. The callers of what is not decided learn that they do not know.
func (g *group) close() error {
	close(g.stop)
	g.mending.close()
	g.batcher.close()
	err := errors.Join(g.trans.Close(), g.raft.Shutdown().Error()) // the transport first: raft waits for its calls
	g.wg.Wait()
	return errors.Join(err, g.closeStores())
}

// stamp is the time for the next entry, never behind what the state has seen; 0 if there is none that is trusted, or it has been put back.
func (g *group) stamp() record.Timestamp {
	seen := record.Timestamp(g.seen.Load())
	if t := g.clock.stamp(seen); t != 0 {
		return max(t, seen)
	}
	return 0
}

func isTermMismatch(err error) bool { return errors.Is(err, raftlog.ErrTermMismatch) }

// fsm is raft's view of the group.
type fsm struct{ g *group }

var _ raft.BatchingFSM = (*fsm)(nil)

// Apply implements raft.FSM; raft uses ApplyBatch.
func (f *fsm) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch implements raft.BatchingFSM. It never looks at Extensions.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	g := f.g
	out := make([]any, len(logs))
	g.mu.Lock()
	for i, l := range logs {
		if l.Type != raft.LogCommand {
			continue
		}
		if g.refused != nil {
			out[i] = outcome{void: true}
			continue
		}
		before := g.machine.position()
		o := g.machine.apply(l.Index, l.Term, l.Data)
		g.publish(before.Index, l)
		g.checkLevel()
		if o.void {
			g.metrics.voids.Inc()
			g.log_.Error("entry of another term applied as void", "index", l.Index, "term", l.Term)
		}
		if len(o.dropped) > 0 {
			freed, _ := g.log.Base()
			g.recent.add(o.dropped, freed) // under mu: a reader finds a batch hot or recent, never neither
		}
		out[i] = o
		if !l.AppendedAt.IsZero() {
			g.metrics.commit.Observe(time.Since(l.AppendedAt).Seconds())
		}
	}
	oldest := g.machine.oldestHot()
	g.seen.Store(int64(g.machine.clock()))
	refused := g.refused
	g.mu.Unlock()
	if refused != nil {
		g.host.refuse(refused)
		return out
	}
	last := logs[len(logs)-1].Index
	g.applied.Store(last)
	for _, o := range out {
		if o, ok := o.(outcome); ok {
			g.watch.wake(o.dirty)
		}
	}
	if err := g.snaps.Applied(last, oldest); err != nil {
		g.host.cfg.OnFatal(err)
	}
	g.metrics.applied.Add(float64(len(logs)))
	select {
	case g.changed <- struct{}{}:
	default:
	}
	g.host.poke()
	return out
}

// Snapshot implements raft.FSM: pointer work only.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	f.g.mu.Lock()
	defer f.g.mu.Unlock()
	if f.g.refused != nil {
		return nil, f.g.refused
	}
	return &fsmSnapshot{f.g, f.g.machine.freeze()}, nil
}

// Restore implements raft.FSM.
func (f *fsm) Restore(r io.ReadCloser) error {
	defer r.Close()
	f.g.mu.Lock()
	err := f.g.machine.restore(r)
	f.g.pub.Reset()
	if f.g.checkLevel(); errors.Is(err, state.ErrLevel) {
		f.g.refused = err
	}
	refused := f.g.refused
	f.g.seen.Store(int64(f.g.machine.clock()))
	f.g.mu.Unlock()
	if refused != nil {
		f.g.host.refuse(refused)
		return refused
	}
	f.g.host.poke()
	return err
}

type fsmSnapshot struct {
	g *group
	f frozen
}

// Persist implements raft.FSMSnapshot.
func (s *fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	n, err := s.f.WriteTo(sink)
	if err != nil {
		return errors.Join(err, sink.Cancel())
	}
	s.g.snapBytes.Store(n)
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (*fsmSnapshot) Release() {}

type metaMachine struct{ g *group }

func (m *metaMachine) apply(index, term uint64, data []byte) outcome {
	out := outcome{results: m.g.meta.Apply(state.RaftIndex(index), state.Term(term), data)}
	out.void = out.results == nil
	m.g.host.cluster.Store(m.g.meta.View())
	return out
}

func (m *metaMachine) freeze() frozen { f := m.g.meta.Freeze(); return &f }

func (m *metaMachine) restore(r io.Reader) error {
	s, err := state.RestoreMeta(r)
	if err != nil {
		return err
	}
	m.g.meta = s
	m.g.host.cluster.Store(s.View())
	return nil
}

func (m *metaMachine) oldestHot() uint64         { return math.MaxUint64 }
func (m *metaMachine) leader() state.LeaderStart { return m.g.meta.Leader() }
func (m *metaMachine) clock() record.Timestamp   { return m.g.meta.Clock() }
func (m *metaMachine) level() uint32             { return m.g.meta.FeatureLevel() }
func (m *metaMachine) position() peer.Position {
	return peer.Position{Index: uint64(m.g.meta.Applied()), Chain: m.g.meta.ChainHash()}
}

type shardMachine struct{ g *group }

func (m *shardMachine) apply(index, term uint64, data []byte) outcome {
	a := m.g.shard.Apply(state.RaftIndex(index), state.Term(term), data)
	return outcome{slices.Clone(a.Appends), a.Results, slices.Clone(a.Dirty), a.Dropped, a.Void}
}

func (m *shardMachine) freeze() frozen { f := m.g.shard.Freeze(); return &f }

func (m *shardMachine) restore(r io.Reader) error {
	s, err := state.RestoreShard(r)
	if err != nil {
		return err
	}
	if s.ID() != m.g.id {
		return fmt.Errorf("raftmeta: snapshot of shard %d restored into %d", s.ID(), m.g.id)
	}
	m.g.shard = s
	return nil
}

func (m *shardMachine) oldestHot() uint64 {
	if i, _, ok := m.g.shard.OldestHot(); ok {
		return uint64(i)
	}
	return math.MaxUint64
}

func (m *shardMachine) leader() state.LeaderStart { return m.g.shard.Leader() }
func (m *shardMachine) clock() record.Timestamp   { return m.g.shard.Clock() }
func (m *shardMachine) level() uint32             { return m.g.shard.FeatureLevel() }
func (m *shardMachine) position() peer.Position {
	return peer.Position{Index: uint64(m.g.shard.Applied()), Chain: m.g.shard.ChainHash()}
}

// tell lets the other voters know what is committed, for what waits until they have applied it: raft takes its time (CommitTimeout) when nothing follows.
func (g *group) tell() {
	term := g.leads.Load()
	voters := g.voters()
	if len(voters) < 2 || term == 0 {
		return
	}
	var e raft.Log
	if err := g.log.GetLog(g.raft.CommitIndex(), &e); err != nil {
		return
	}
	g.trans.Tell(voters, term, e.Index, e.Term)
}
