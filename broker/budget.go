package broker

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// errSlow: a client held memory that others waited for.
var errSlow = errors.New("too slow for memory that others wait for")

// budget is memory that all clients share. Who holds some of it while he waits for his client may be slow only while nobody else wants it: a few that send or read next to nothing
// would stop all.
type budget struct {
	*semaphore.Weighted
	waiting atomic.Int32
}

func newBudget(n int64) *budget { return &budget{Weighted: semaphore.NewWeighted(n)} }

// acquire waits until n bytes are free, or ctx ends.
func (b *budget) acquire(ctx context.Context, n int64) error {
	if b.TryAcquire(n) { // not before those that wait
		return nil
	}
	b.waiting.Add(1)
	defer b.waiting.Add(-1)
	return b.Acquire(ctx, n)
}

const (
	look    = time.Second // how often a transfer is looked at
	slowest = 64 << 10    // bytes a second that a transfer must reach in the end, when nobody waits
)

// transfer is one that holds memory of a budget.
type transfer struct {
	b     *budget
	least int       // bytes between two looks, if others wait
	end   time.Time // when it must be over
	since time.Time // the last look, and what had been transferred then
	seen  int
	slow  bool // at the last look, while others waited
}

// transfer begins one of size bytes. While others wait it must come along as if it had to be over after limit; if nobody does it may be slow beyond that.
func (b *budget) transfer(size int, limit time.Duration) *transfer {
	now := time.Now()
	return &transfer{b: b, least: int(int64(size) * look.Milliseconds() / max(limit.Milliseconds(), 1)), end: now.Add(limit + time.Duration(size)*time.Second/slowest), since: now}
}

// next is the deadline of the next call that transfers some of it.
func (x *transfer) next() time.Time {
	if n := x.since.Add(look); n.Before(x.end) {
		return n
	}
	return x.end
}

// goesOn reports whether it may, n bytes having been transferred.
func (x *transfer) goesOn(n int) bool {
	now := time.Now()
	if !now.Before(x.end) {
		return false
	}
	if now.Sub(x.since) < look {
		return true
	}
	before := x.slow
	x.slow = n-x.seen < x.least && x.b.waiting.Load() > 0
	x.since, x.seen = now, n
	return !x.slow || !before // once may be this process's own fault: a deadline that is over before a call begins ends it, however quick the client is
}
