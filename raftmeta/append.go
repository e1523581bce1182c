package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/estran/estran/tiering/record"
)

// Append proposes the batches of a produce request, each in its partition's shard. It has copied all bytes when it returns; it waits while
// entries are full (back-pressure). done is called exactly once, with a result per batch, when all are decided; it must not block. A batch that
// was refused before it was proposed makes later batches of the same producer and partition be refused with the same error, until the refused
// one comes again: else batch 2 could be accepted without batch 1.
func (h *Host) Append(ctx context.Context, r AppendRequest, done func([]AppendResult)) {
	call := &appendCall{results: make([]AppendResult, len(r.Batches)), done: done}
	call.left.Store(int32(len(r.Batches)) + 1)
	cancel := context.CancelFunc(func() {})
	limited := ctx
	for i, b := range r.Batches {
		err := h.marks.check(b, h.lastSequence)
		if err == nil {
			if limited == ctx && !r.Deadline.IsZero() {
				limited, cancel = context.WithDeadline(ctx, r.Deadline)
			}
			if err = h.appendOne(limited, b, call, i); err != nil {
				h.marks.refuse(b, err)
			}
		}
		if err != nil {
			call.results[i] = AppendResult{Err: err, Base: -1, LogStart: -1}
			call.finish(1)
		}
	}
	cancel()
	call.finish(1)
}

// lastSequence is the last that was accepted from the batch's producer, as far as it is applied here.
func (h *Host) lastSequence(b *AppendBatch) (record.Sequence, bool) {
	g := h.groupOf(b.TP)
	if g == nil {
		return 0, false
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.shard.LastSequence(b.TP, b.Batch.ProducerID(), b.Batch.ProducerEpoch())
}

func (h *Host) appendOne(ctx context.Context, b AppendBatch, call *appendCall, at int) error {
	g := h.groupOf(b.TP)
	if g == nil {
		return ErrUnknownPartition
	}
	g.mu.RLock()
	handle := g.shard.Handle(b.TP)
	g.mu.RUnlock()
	if handle == 0 {
		return ErrUnknownPartition
	}
	if err := h.admit(ctx, g); err != nil {
		return err
	}
	return g.batcher.add(ctx, handle, b.Batch, call, at)
}

// FreeBudget is how many bytes of record batches may still be written here before the hot budget is used up.
func (h *Host) FreeBudget() int64 { return max(0, h.room()) }

// room is what is left of this node's hot budget; below 0 is how far it is beyond it. A full disk is like a used-up budget.
func (h *Host) room() int64 {
	free := h.cfg.HotMaxBytes
	full := false
	for _, g := range h.shardList() {
		_, unfree := g.log.Bytes()
		free -= unfree
		full = full || g.log.NoSpace()
	}
	if full {
		return min(0, free)
	}
	return free
}

// roomFor is what is left for record batches of a group: here, and on the fullest voter that a majority needs.
func (h *Host) roomFor(g *group) int64 { return min(h.room(), g.others().free) }

// admit lets a record batch in while the budgets have room: first slower, then not at all.
func (h *Host) admit(ctx context.Context, g *group) error {
	free, near := h.roomFor(g), h.cfg.HotMaxBytes/16
	if free > near {
		return nil
	}
	if free > 0 { // near the end: each batch waits the longer, the less is left
		h.metrics.throttled.Inc()
		return sleep(ctx, h.stop, time.Duration(near-free)*20*time.Millisecond/time.Duration(near))
	}
	for end := time.Now().Add(budgetWait); time.Now().Before(end); {
		if err := sleep(ctx, h.stop, 20*time.Millisecond); err != nil {
			break
		}
		if h.roomFor(g) > 0 {
			return nil
		}
	}
	h.metrics.refused.Inc()
	return fmt.Errorf("%w: %d bytes are left here, %d on the fullest voter that a majority of group %d needs", ErrBudget, h.room(), g.others().free, g.id)
}

func sleep(ctx context.Context, stop <-chan struct{}, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ErrTimeout
	case <-stop:
		return ErrStopped
	}
}

const (
	marksMax = 64 << 10
	markLife = 2 * time.Minute
)

// marks remembers batches of idempotent producers that were refused before they were proposed. They never judge a sequence: Apply does.
type marks struct {
	mu sync.Mutex
	m  map[markKey]mark
}

type markKey struct {
	tp       record.TopicPartition
	producer record.ProducerID
	epoch    record.ProducerEpoch
}

type mark struct {
	sequence record.Sequence
	err      error
	at       time.Time
}

// check returns the error of a refusal of an earlier batch, unless b is the batch that was refused, or that one has been accepted since: here or, while another node led, there.
func (k *marks) check(b AppendBatch, accepted func(*AppendBatch) (record.Sequence, bool)) error {
	if b.Batch.ProducerID() < 0 {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.m) == 0 {
		return nil
	}
	key := markKey{b.TP, b.Batch.ProducerID(), b.Batch.ProducerEpoch()}
	m, ok := k.m[key]
	switch {
	case !ok:
		return nil
	case m.sequence == b.Batch.BaseSequence() || time.Since(m.at) > markLife:
		delete(k.m, key)
		return nil
	case !reaches(b.Batch.BaseSequence(), m.sequence): // it comes before the refused one, which it must not wait for
		return nil
	}
	if last, ok := accepted(&b); ok && reaches(last, m.sequence) {
		delete(k.m, key)
		return nil
	}
	return m.err
}

// reaches reports whether sequence a is b or comes behind it: they wrap from 2^31-1 to 0.
func reaches(a, b record.Sequence) bool { return (uint32(a)-uint32(b))&(1<<31-1) < 1<<30 }

func (k *marks) refuse(b AppendBatch, err error) {
	if b.Batch.ProducerID() < 0 || errors.Is(err, ErrUnknownPartition) || errors.Is(err, ErrTooLarge) {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.m == nil {
		k.m = map[markKey]mark{}
	}
	if len(k.m) >= marksMax {
		for key, m := range k.m {
			if time.Since(m.at) > markLife {
				delete(k.m, key)
			}
		}
	}
	if len(k.m) < marksMax {
		k.m[markKey{b.TP, b.Batch.ProducerID(), b.Batch.ProducerEpoch()}] = mark{b.Batch.BaseSequence(), err, time.Now()}
	}
}
