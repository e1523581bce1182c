package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/hashicorp/raft"
)

// errMoved ends a feed because another node leads.
var errMoved = errors.New("raftmeta: another node leads")

// mirror is a follower's instance of a group: the state that the voters have, by the same commands, and the newest entries themselves.
type mirror struct {
	f    *Follower
	id   record.ShardID
	pub  *peer.Publisher // of the second level; used with mu held
	ring *ring           // what the feed brought
	far  *ring           // what was asked for

	view
	refused error  // under mu, as group's
	source  string // whose feed this is now; of run

	hintMu sync.Mutex
	hint   string // the server that leads, as another said

	freshMu sync.Mutex
	fresh   time.Time // all that was acknowledged before is here
	asks    proofs

	fetchMu sync.Mutex
	fetches map[uint64]chan struct{} // by index, closed when they are over
}

var (
	_ peer.Sink   = (*mirror)(nil)
	_ peer.Source = (*mirror)(nil)
)

func newMirror(f *Follower, id record.ShardID) *mirror {
	m := &mirror{f: f, id: id, pub: peer.NewPublisher(uint32(id)), fetches: map[uint64]chan struct{}{}}
	share := f.cfg.RingBytes / int64(max(1, f.shards()))
	m.ring, m.far = newRing(share*3/4), newRing(share/4)
	m.watch.init()
	if id == 0 {
		m.meta = state.NewMeta()
		m.ring, m.far = newRing(0), newRing(0) // nobody reads meta's entries
	} else {
		m.shard = state.NewShard(id)
	}
	m.asks.ask, m.asks.spawn = m.reached, f.spawn
	return m
}

// positionLocked is where the state is. mu is held.
func (m *mirror) positionLocked() peer.Position {
	if m.meta != nil {
		return peer.Position{Index: uint64(m.meta.Applied()), Chain: m.meta.ChainHash()}
	}
	return peer.Position{Index: uint64(m.shard.Applied()), Chain: m.shard.ChainHash()}
}

func (m *mirror) position() peer.Position {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.positionLocked()
}

// leaderNode is the node whose LeaderStart was applied last; 0 if none was.
func (m *mirror) leaderNode() int32 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.leaderLocked().Node
}

func (m *mirror) leaderLocked() state.LeaderStart {
	if m.meta != nil {
		return m.meta.Leader()
	}
	return m.shard.Leader()
}

// State implements peer.Sink. A state that is behind this one is refused: nothing that was visible may go back.
func (m *mirror) State(at peer.Position, r io.Reader) (err error) {
	var meta *state.Meta
	var shard *state.Shard
	var got peer.Position
	if m.id == 0 {
		if meta, err = state.RestoreMeta(r); err == nil {
			got = peer.Position{Index: uint64(meta.Applied()), Chain: meta.ChainHash()}
		}
	} else if shard, err = state.RestoreShard(r); err == nil {
		got = peer.Position{Index: uint64(shard.Applied()), Chain: shard.ChainHash()}
	}
	switch {
	case errors.Is(err, state.ErrLevel):
		return m.refuse(err)
	case err != nil:
		return err
	case got != at || shard != nil && shard.ID() != m.id:
		return fmt.Errorf("%w: a state at %d, announced at %d", peer.ErrResync, got.Index, at.Index)
	}
	m.mu.Lock()
	if have := m.positionLocked(); at.Index < have.Index {
		m.mu.Unlock()
		return fmt.Errorf("%w: a state at %d, here it is at %d", peer.ErrResync, at.Index, have.Index)
	}
	m.meta, m.shard = meta, shard
	err = m.checkLevel()
	m.pub.Reset()
	m.ring.clear()
	m.far.clear()
	m.recent.clear()
	m.mu.Unlock()
	m.changed()
	m.watch.wakeAll()
	m.f.m.states.Inc()
	if err == nil && m.led() {
		err = errMoved
	}
	return err
}

// led reports whether a node that can be reached leads, and the feed is another's.
func (m *mirror) led() bool {
	n := m.leaderNode()
	return n != 0 && n != nodeOf(m.source) && m.f.serverOfNode(n) != ""
}

// Entry implements peer.Sink. Nothing of an entry is visible before its chain hash was compared.
func (m *mirror) Entry(e peer.FeedEntry) error {
	m.mu.Lock()
	at := m.positionLocked()
	if m.refused != nil {
		defer m.mu.Unlock()
		return m.refused
	}
	if e.Prev != at.Index || state.ChainHash(at.Chain, state.RaftIndex(e.Index), state.Term(e.Term), e.Data) != e.Chain {
		m.mu.Unlock()
		return fmt.Errorf("%w: entry %d behind %d, the state is at %d", peer.ErrResync, e.Index, e.Prev, at.Index)
	}
	whole, err := checkPayload(&e)
	if err != nil {
		m.mu.Unlock()
		return err
	}
	before := m.leaderLocked()
	oldest := m.ring.put(&entryBytes{e.Index, e.Term, e.Data, e.Payload, whole})
	dirty := m.applyLocked(&e, oldest)
	moved := m.leaderLocked() != before
	err = m.checkLevel()
	m.pub.Publish(e)
	m.mu.Unlock()
	m.changed()
	m.watch.wake(dirty)
	if err == nil && moved && m.led() {
		err = errMoved
	}
	return err
}

// applyLocked applies an entry; oldest is the oldest that the ring has.
func (m *mirror) applyLocked(e *peer.FeedEntry, oldest uint64) (dirty []record.TopicPartition) {
	if m.meta != nil {
		m.meta.Apply(state.RaftIndex(e.Index), state.Term(e.Term), e.Data)
		return nil
	}
	a := m.shard.Apply(state.RaftIndex(e.Index), state.Term(e.Term), e.Data)
	if len(a.Dropped) > 0 {
		m.recent.add(a.Dropped, oldest-1)
	}
	return append(dirty, a.Dirty...)
}

// checkPayload compares what came of an entry's payload with its header.
func checkPayload(e *peer.FeedEntry) (whole bool, err error) {
	h, ok := raftlog.ParseEntryHeader(e.Data)
	switch {
	case !ok:
		return false, fmt.Errorf("%w: entry %d has no header", peer.ErrResync, e.Index)
	case len(e.Payload) > 0 && (len(e.Payload) != int(h.PayloadLen) || e.PayloadCRC != h.PayloadCRC):
		return false, fmt.Errorf("%w: payload of entry %d", peer.ErrResync, e.Index)
	}
	return len(e.Payload) == int(h.PayloadLen), nil
}

// Idle implements peer.Sink.
func (m *mirror) Idle(at peer.Position) error {
	if have := m.position(); have != at {
		return fmt.Errorf("%w: its sender is at %d, the state at %d", peer.ErrResync, at.Index, have.Index)
	}
	return nil
}

// checkLevel refuses a level that this program does not know. mu is held.
func (m *mirror) checkLevel() error {
	level := uint32(0)
	if m.meta != nil {
		level = m.meta.FeatureLevel()
		m.f.level.Store(max(level, m.f.level.Load()))
	} else {
		level = m.shard.FeatureLevel()
	}
	if err := state.CheckLevel(level, m.f.cfg.FeatureLevel); err != nil {
		m.refused = m.refuse(err)
	}
	return m.refused
}

func (m *mirror) refuse(err error) error {
	err = fmt.Errorf("raftmeta: following group %d: %w", m.id, err)
	m.f.cfg.OnFatal(err)
	return err
}

// changed shows what was applied.
func (m *mirror) changed() {
	if m.id == 0 {
		m.mu.RLock()
		v := m.meta.View()
		m.mu.RUnlock()
		m.f.cluster.Store(v)
	}
	m.f.poke()
}

// wakeAll wakes everybody: what has changed is not known.
func (w *watchers) wakeAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	woken := map[*watcher]struct{}{}
	for _, set := range w.m {
		for x := range set {
			if _, ok := woken[x]; !ok {
				woken[x] = struct{}{}
				x.wake()
			}
		}
	}
}

// followPause lies between two attempts to follow; followPauseMost if they go on failing.
const (
	followPause     = 20 * time.Millisecond
	followPauseMost = time.Second
)

// run follows the group until ctx ends: its leader, or whoever answers.
func (m *mirror) run(ctx context.Context) {
	for tries, pause := 0, followPause; ctx.Err() == nil; tries++ {
		to := m.choose(tries)
		before := m.position()
		if to != "" {
			m.source = to
			err := m.f.peers.Follow(ctx, to, uint32(m.id), before, m.f.cfg.Payload, m)
			if ctx.Err() != nil {
				return
			}
			m.f.cfg.Logger.Debug("a feed ended", "component", "replica", "group", m.id, "from", to, "err", err)
			if errors.Is(err, peer.ErrResync) {
				m.f.m.resyncs.Inc()
				m.f.cfg.Logger.Warn("a feed does not continue the state; it begins anew", "event", "replica.resync", "component", "replica", "group", m.id, "from", to, "err", err)
			}
			if errors.Is(err, errMoved) || m.position() != before {
				tries, pause = -1, followPause
			}
		}
		if sleep(ctx, m.f.stop, pause) != nil {
			return
		}
		pause = min(2*pause, followPauseMost)
	}
}

// choose is the server to follow or to ask: who leads first, then each that is known.
func (m *mirror) choose(tries int) string {
	leader := m.leaderServer()
	if leader != "" && tries == 0 {
		return leader
	}
	all := m.f.servers()
	if len(all) == 0 {
		return ""
	}
	return all[(tries+int(m.id))%len(all)]
}

// leaderServer is the server that leads as far as is known.
func (m *mirror) leaderServer() string {
	m.hintMu.Lock()
	hint := m.hint
	m.hintMu.Unlock()
	if hint != "" {
		return hint
	}
	return m.f.serverOfNode(m.leaderNode())
}

func (m *mirror) setHint(server string) {
	m.hintMu.Lock()
	defer m.hintMu.Unlock()
	m.hint = server
}

// reached asks the leader how far the group is; the answer covers all that was acknowledged before.
func (m *mirror) reached(ctx context.Context) (uint64, error) {
	var err error = ErrNotLeader
	for tries := 0; tries <= len(m.f.servers()); tries++ {
		to := m.choose(tries)
		if to == "" {
			continue
		}
		r, e := m.ask(ctx, to)
		if e == nil && r.Proven {
			m.setHint(to)
			return r.Index, nil
		}
		if e != nil {
			err = fmt.Errorf("%w: %w", ErrNotLeader, e)
		}
		if m.setHint(""); e == nil && r.Leader != "" && r.Leader != to && !m.f.cfg.Stay && m.f.knows(r.Leader) {
			m.setHint(r.Leader)
			if r, e := m.ask(ctx, r.Leader); e == nil && r.Proven {
				return r.Index, nil
			}
			m.setHint("")
		}
		if ctx.Err() != nil {
			break
		}
	}
	return 0, err
}

// ask asks one server; another is asked if it does not answer soon.
func (m *mirror) ask(ctx context.Context, server string) (peer.Reach, error) {
	ctx, cancel := context.WithTimeout(ctx, m.f.slow(proofTry))
	defer cancel()
	return m.f.peers.Reached(ctx, server, uint32(m.id))
}

// prove returns when everything that was acknowledged before the call is applied here.
func (m *mirror) prove(ctx context.Context) error {
	asked := time.Now()
	index, err := m.asks.join(ctx)
	if err != nil {
		return err
	}
	if err := m.f.await(ctx, "what was acknowledged", func() bool { return m.position().Index >= index }); err != nil {
		return err
	}
	m.freshMu.Lock()
	defer m.freshMu.Unlock()
	if asked.After(m.fresh) {
		m.fresh = asked
	}
	return nil
}

const (
	// proveEvery is how often a follower shows itself that it is not behind; after staleAfter without that it serves nothing.
	proveEvery = time.Second
	staleAfter = 5 * time.Second
)

func (m *mirror) isFresh() bool {
	m.freshMu.Lock()
	defer m.freshMu.Unlock()
	return !m.fresh.IsZero() && time.Since(m.fresh) < m.f.slow(staleAfter)
}

// keepFresh proves the state again and again until ctx ends.
func (m *mirror) keepFresh(ctx context.Context) {
	for pause := followPause; ; {
		try, cancel := context.WithTimeout(ctx, m.f.slow(staleAfter))
		err := m.prove(try)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			m.f.cfg.Logger.Debug("not proven", "component", "replica", "group", m.id, "err", err)
			pause = min(2*pause, m.f.slow(proveEvery))
		} else {
			pause = m.f.slow(proveEvery)
		}
		m.f.poke() // whoever waits for it to be fresh
		if sleep(ctx, m.f.stop, pause) != nil {
			return
		}
	}
}

// proofs lets callers share questions: each gets the answer to one that was asked after it came.
type proofs struct {
	ask   func(context.Context) (uint64, error)
	spawn func(func()) bool

	mu      sync.Mutex
	running bool
	next    *proof
}

type proof struct {
	done  chan struct{}
	index uint64
	err   error
}

// proofTime bounds one question, proofTry what one server gets of that.
const (
	proofTime = 2 * time.Second
	proofTry  = 500 * time.Millisecond
)

func (r *proofs) join(ctx context.Context) (uint64, error) {
	r.mu.Lock()
	x := r.next
	if x == nil {
		x = &proof{done: make(chan struct{})}
		r.next = x
	}
	if !r.running {
		r.beginLocked()
	}
	r.mu.Unlock()
	select {
	case <-x.done:
		return x.index, x.err
	case <-ctx.Done():
		return 0, fmt.Errorf("%w: %w", ErrTimeout, ctx.Err())
	}
}

// beginLocked asks for the round that waits, if there is one, and goes on with the one that waits then.
func (r *proofs) beginLocked() {
	x := r.next
	r.next = nil
	if r.running = x != nil; !r.running {
		return
	}
	began := r.spawn(func() {
		ctx, cancel := context.WithTimeout(context.Background(), proofTime)
		x.index, x.err = r.ask(ctx)
		cancel()
		close(x.done)
		r.mu.Lock()
		r.beginLocked()
		r.mu.Unlock()
	})
	if !began {
		x.err, r.running = ErrStopped, false
		close(x.done)
	}
}

// Publisher implements peer.Source.
func (m *mirror) Publisher() *peer.Publisher { return m.pub }

// Begin implements peer.Source.
func (m *mirror) Begin(from peer.Position, mark func(peer.Position)) (peer.Start, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at := m.positionLocked()
	switch {
	case m.refused != nil:
		return peer.Start{}, m.refused
	case at.Index == 0 || from.Index > at.Index:
		return peer.Start{}, fmt.Errorf("%w: at %d, the follower at %d", errAhead, at.Index, from.Index)
	}
	mark(at)
	if from == at {
		return peer.Start{}, nil
	}
	if m.meta != nil {
		f := m.meta.Freeze()
		return peer.Start{State: &f}, nil
	}
	f := m.shard.Freeze()
	return peer.Start{State: &f}, nil
}

// Reach implements peer.Source: a follower asks the leader itself, and has applied what it answers.
func (m *mirror) Reach(ctx context.Context) peer.Reach {
	err := m.prove(ctx)
	return peer.Reach{Proven: err == nil, Index: m.position().Index, Leader: m.leaderServer()}
}

// Bytes implements peer.Source.
func (m *mirror) Bytes(a peer.BytesAsked) (peer.EntryBytes, error) {
	e := m.held(a.Index, a.Term)
	if e == nil || !e.whole {
		ctx, cancel := context.WithTimeout(m.f.ctx, fetchTime)
		defer cancel()
		select {
		case <-m.fetch(a.Index, a.Term):
		case <-ctx.Done():
		}
		if e = m.held(a.Index, a.Term); e == nil || !e.whole {
			return m.gone(a.Index)
		}
	}
	b := e.data
	if a.Place == peer.PlacePayload {
		b = e.payload
	}
	if int64(a.From) > int64(len(b)) {
		return peer.EntryBytes{}, fmt.Errorf("byte %d of %d", a.From, len(b))
	}
	return peer.EntryBytes{Total: uint32(len(b)), Bytes: b[a.From:min(int64(len(b)), int64(a.From)+int64(a.Len))]}, nil
}

// gone tells a follower of an entry that is not to be had what it can go by.
func (m *mirror) gone(index uint64) (peer.EntryBytes, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	at := m.positionLocked()
	if m.shard != nil && index <= at.Index {
		if oldest, _, ok := m.shard.OldestHot(); !ok || uint64(oldest) > index {
			return peer.EntryBytes{Gone: true, Applied: at.Index}, nil
		}
	}
	return peer.EntryBytes{}, errors.New("the entry is not in memory, and no voter gives it")
}

// held is an entry that is in memory, with its payload if that is anywhere.
func (m *mirror) held(index, term uint64) *entryBytes {
	e := m.ring.get(index, term)
	if e != nil && e.whole {
		return e
	}
	if x := m.far.get(index, term); x != nil {
		return x
	}
	return e
}

// open is the opener of a follower: an entry that is not in memory is fetched. Who does not wait is told so, and woken when it is here; a sealed one is read from its object.
func (m *mirror) open(ctx context.Context, ref *state.HotRef, sealed bool) (raftlog.Entry, error) {
	index, term := uint64(ref.Index), uint64(ref.Term)
	for {
		if e := m.held(index, term); e != nil && e.whole {
			return raftlog.Entry{Type: raft.LogCommand, Data: e.data, Payload: e.payload, PayloadLen: len(e.payload)}, nil
		}
		if sealed {
			return raftlog.Entry{}, raftlog.ErrGone
		}
		done := m.fetch(index, term)
		select {
		case <-done:
		case <-ctx.Done():
			return raftlog.Entry{}, errFetching
		}
		if e := m.held(index, term); e != nil && e.whole {
			continue
		}
		return raftlog.Entry{}, errFetching
	}
}
