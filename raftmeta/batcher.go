package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/hashicorp/raft"
)

// AppendBatch is one partition's batch of a produce request. The bytes must be a validated batch; they have been copied when Append returns.
type AppendBatch struct {
	TP    record.TopicPartition
	Batch record.Batch
}

// AppendRequest is what one produce request appends, in its order.
type AppendRequest struct {
	Batches  []AppendBatch
	Deadline time.Time
}

// AppendResult is the outcome of one batch. Err wraps a sentinel of this package; a duplicate is a success with its first offset.
type AppendResult struct {
	Err      error
	Base     record.Offset
	LogStart record.Offset
	Epoch    record.LeaderEpoch
}

// batcher turns the commands of one group into entries: one proposal is in flight, everything that arrives meanwhile goes into the next one.
type batcher struct {
	g    *group
	mu   sync.Mutex
	cond *sync.Cond // the open entry has room, or something to cut, or the batcher closes
	open *openEntry
	// special are entries that take nothing more: they are proposed first.
	special []*openEntry
	// waiting counts appenders that found no room: the next entry may be larger.
	waiting int
	term    uint64 // of the leadership under which entries are proposed; 0 = none
	starts  bool   // only LeaderStart is proposed until it has been applied
	closed  bool
	// hung: the entry in flight is stuck in this node's disk, others elect a leader. Nothing is taken until it is decided.
	hung atomic.Bool
	last int // payload bytes of the last entry, to size the next
	done chan struct{}
}

// openEntry is the entry that is being filled. Its payload is contiguous, never pooled: raft and readers keep it.
type openEntry struct {
	entry   state.Entry
	payload []byte
	used    int
	copying int // appenders that are still copying
	batches []pendingBatch
	cmds    []pendingCommand
}

// pendingBatch is where the result of a slot goes.
type pendingBatch struct {
	call *appendCall
	at   int // in call.results
}

type pendingCommand struct {
	done func(state.Result, error)
}

// appendCall collects the results of one Append; done is called when the last is there.
type appendCall struct {
	results []AppendResult
	left    atomic.Int32
	done    func([]AppendResult)
}

func (c *appendCall) finish(n int32) {
	if c.left.Add(-n) == 0 {
		c.done(c.results)
	}
}

func newBatcher(g *group) *batcher {
	b := &batcher{g: g, open: &openEntry{}, done: make(chan struct{})}
	b.cond = sync.NewCond(&b.mu)
	return b
}

// lead lets entries be proposed in term; first is the LeaderStart that goes before everything else.
func (b *batcher) lead(term uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.term, b.starts = term, true
	b.cond.Broadcast()
}

// started lets everything else in, once the LeaderStart has been applied.
func (b *batcher) started(term uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.term == term {
		b.starts = false
		b.cond.Broadcast()
	}
}

// follow refuses everything until lead is called again.
func (b *batcher) follow() {
	b.refuse(func() { b.term = 0 })
}

// refuse answers all that has not been proposed, once change has been made so that nothing more comes.
func (b *batcher) refuse(change func()) {
	b.mu.Lock()
	change()
	e, special := b.open, b.special
	b.open, b.special = &openEntry{}, nil
	for e.copying > 0 { // the entry is dropped only when nobody writes into it
		b.cond.Wait()
	}
	b.cond.Broadcast()
	b.mu.Unlock()
	for _, e := range append(special, e) {
		e.fail(ErrNotLeader)
	}
}

// fail answers everything in the entry.
func (e *openEntry) fail(err error) {
	for _, p := range e.batches {
		p.call.results[p.at] = AppendResult{Err: err, Base: -1, LogStart: -1}
		p.call.finish(1)
	}
	for _, c := range e.cmds {
		c.done(state.Result{}, err)
	}
}

// add puts a batch into the open entry. It waits while there is no room: that is the back-pressure on the connection.
func (b *batcher) add(ctx context.Context, handle uint64, batch record.Batch, call *appendCall, at int) error {
	b.mu.Lock()
	if err := b.waitRoom(ctx, len(batch)); err != nil {
		b.mu.Unlock()
		return err
	}
	e := b.open
	b.grow(e, len(batch))
	slot := state.SlotOf(batch)
	slot.Handle, slot.Pos = handle, uint32(e.used)
	e.entry.AddSlot(slot)
	e.batches = append(e.batches, pendingBatch{call, at})
	dst := e.payload[e.used : e.used+len(batch)]
	e.used += len(batch)
	e.copying++
	if len(e.batches) == 1 {
		b.cond.Broadcast() // there is something to cut
	}
	b.mu.Unlock()
	copy(dst, batch)
	b.mu.Lock()
	if e.copying--; e.copying == 0 {
		b.cond.Broadcast()
	}
	b.mu.Unlock()
	return nil
}

// waitRoom returns when a batch of n bytes may be added to the open entry.
func (b *batcher) waitRoom(ctx context.Context, n int) error {
	if n > EntryMax {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, n, EntryMax)
	}
	var stop func() bool
	for {
		switch {
		case b.closed:
			return ErrStopped
		case b.term == 0 || b.starts || b.hung.Load():
			return ErrNotLeader
		case ctx.Err() != nil:
			return ErrTimeout
		case b.hasRoom(n):
			if stop != nil {
				stop()
			}
			return nil
		}
		if stop == nil {
			stop = context.AfterFunc(ctx, func() { b.mu.Lock(); b.cond.Broadcast(); b.mu.Unlock() })
			defer stop()
		}
		b.waiting++
		b.cond.Wait()
		b.waiting--
	}
}

func (b *batcher) hasRoom(n int) bool {
	e := b.open
	if e.used == 0 {
		return true
	}
	if e.entry.Slots() >= state.SlotsMax {
		return false
	}
	if e.used+n <= len(e.payload) {
		return true
	}
	limit := entryTarget
	if b.waiting > 0 {
		limit = entryBacklog
	}
	return e.used+n <= limit && e.copying == 0 // it may be moved only while nobody writes into it
}

// grow makes space for n more bytes.
func (b *batcher) grow(e *openEntry, n int) {
	if e.used+n <= len(e.payload) {
		return
	}
	size := max(e.used+n, min(2*len(e.payload), entryBacklog), min(b.last+b.last/4, entryBacklog), 4<<10)
	next := make([]byte, size)
	copy(next, e.payload[:e.used])
	e.payload = next
}

// command puts a command into the open entry; done is called once with its result. first lets a LeaderStart pass.
func (b *batcher) command(c state.Command, first bool, done func(state.Result, error)) {
	b.mu.Lock()
	if b.closed || b.term == 0 || b.starts && !first || b.hung.Load() {
		b.mu.Unlock()
		done(state.Result{}, ErrNotLeader)
		return
	}
	if _, err := b.open.entry.Add(c); err != nil {
		b.mu.Unlock()
		done(state.Result{}, err)
		return
	}
	b.open.cmds = append(b.open.cmds, pendingCommand{done})
	b.cond.Broadcast()
	b.mu.Unlock()
}

// rehome proposes batches again, in an entry of their own.
func (b *batcher) rehome(slots []state.Slot, bases []record.Offset, payload []byte, done func(error)) {
	e := &openEntry{payload: payload, used: len(payload)}
	for i := range slots {
		e.entry.AddRehomed(slots[i], bases[i])
	}
	e.cmds = append(e.cmds, pendingCommand{func(_ state.Result, err error) { done(err) }})
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.term == 0 || b.starts || b.closed || b.hung.Load() {
		go done(ErrNotLeader) // not under the lock
		return
	}
	b.special = append(b.special, e)
	b.cond.Broadcast()
}

// run proposes entries until close.
func (b *batcher) run() {
	defer close(b.done)
	var perm []int32
	for {
		e, term := b.cut()
		if e == nil {
			return
		}
		var data []byte
		data, perm = e.entry.Cut(state.Term(term), e.payload[:e.used], b.g.stamp(), perm)
		b.propose(e, data, perm)
	}
}

// cut takes the open entry once it has something and nobody writes into it.
func (b *batcher) cut() (*openEntry, uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		e := b.open
		if b.closed {
			left := append(b.special, e)
			b.open, b.special = &openEntry{}, nil
			b.mu.Unlock()
			for _, e := range left {
				e.fail(ErrStopped)
			}
			b.mu.Lock()
			return nil, 0
		}
		if b.term != 0 && len(b.special) > 0 {
			e := b.special[0]
			b.special = b.special[1:]
			return e, b.term
		}
		if b.term != 0 && (e.used > 0 || len(e.cmds) > 0) {
			b.open = &openEntry{}
			b.last = max(e.used, b.last*7/8)
			b.cond.Broadcast()
			for e.copying > 0 {
				b.cond.Wait()
			}
			return e, b.term
		}
		b.cond.Wait()
	}
}

// propose gives an entry to raft and hands out the results. The next entry is cut when this one is decided.
func (b *batcher) propose(e *openEntry, data []byte, perm []int32) {
	began := time.Now()
	due, own := b.g.mistakeBefore(e, data)
	f := b.g.raft.ApplyLog(raft.Log{Data: data, Extensions: e.payload[:e.used:e.used]}, proposeTimeout)
	b.g.mistakeAnswer(e, perm, due, own)
	decided := make(chan error, 1)
	go func() { decided <- f.Error() }() // a future may never be answered; its goroutine ends with raft
	timer := time.NewTimer(proposeLook)
	defer timer.Stop()
	var err error
	for waits := true; waits; {
		select {
		case err = <-decided:
			waits = false
		case <-timer.C:
			if b.giveUp(e, time.Since(began)) {
				select {
				case <-decided:
				case <-b.g.stop:
				}
				b.hung.Store(false)
				return
			}
			timer.Reset(proposeLook)
		}
	}
	b.g.metrics.propose.Observe(time.Since(began).Seconds())
	if err != nil {
		b.g.metrics.failed.Inc()
		e.fail(proposeError(err))
		return
	}
	out, ok := f.Response().(outcome)
	if !ok || out.void {
		e.fail(fmt.Errorf("%w: the entry was proposed in another term", ErrNotLeader))
		return
	}
	if b.g.id == 0 { // every node acts on what meta decides
		b.g.tell()
	}
	if planted.On(planted.OffsetBeforeApply) && due != nil {
		out.appends = due
	}
	for i, p := range e.batches {
		p.call.results[p.at] = b.g.appendResult(out.appends[perm[i]])
		p.call.finish(1)
	}
	for i, c := range e.cmds {
		r := state.Result{}
		if i < len(out.results) {
			r = out.results[i]
		}
		c.done(r, nil)
	}
}

// giveUp answers those who wait for e that nothing is known, if it has taken too long: the next entry still waits for this one. If it is stuck in this node's disk and there are
// others, these are electing another leader: whoever waits here is to go there.
func (b *batcher) giveUp(e *openEntry, after time.Duration) bool {
	silent := b.g.trans.Silent() && len(b.g.voters()) > 1
	if !silent && after < proposeTimeout {
		return false
	}
	b.g.log_.Error("a proposal has not been decided in time", "after", after.Round(time.Millisecond), "disk_hangs", silent)
	if silent {
		b.refuse(func() { b.hung.Store(true) })
	}
	e.fail(fmt.Errorf("%w: not decided in %s", ErrUnknownOutcome, after.Round(time.Millisecond)))
	return true
}

// proposeError maps raft's errors: what is not definitely refused is unknown.
func proposeError(err error) error {
	switch {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrEnqueueTimeout), errors.Is(err, raft.ErrLeadershipTransferInProgress), isTermMismatch(err):
		return fmt.Errorf("%w: %w", ErrNotLeader, err)
	}
	return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
}

// close ends run; what is still open is refused.
func (b *batcher) close() {
	b.mu.Lock()
	b.closed = true
	b.cond.Broadcast()
	b.mu.Unlock()
	<-b.done
}
