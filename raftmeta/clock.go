package raftmeta

import (
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/tiering/record"
)

const (
	// clockJump: the time may run this far ahead of the monotonic one before it is distrusted.
	clockJump = 10 * time.Minute
	// clockSkew: it may differ this much from the object store's.
	clockSkew = 15 * time.Minute
	// clockSpread: a majority of the voters' clocks must be this close to their median.
	clockSpread = 5 * time.Minute
	// clockBack: it may be behind the replicated clock as much as one leader's is behind another's. Further back it was put there, and may be put right at any moment.
	clockBack = time.Second
)

// clock gives the time that goes into entries: the median of the voters' clocks, so that one that is wrong moves nothing. A wrong time must never be stored, since it would
// expire data for ever: while the clock is not trusted, entries carry none and the replicated clock stands.
type clock struct {
	now   func() time.Time
	store func() (time.Time, bool)
	// others are the clocks of the voters that are in contact, of `voters` with this one.
	others func() (clocks []time.Time, voters int)
	log    *slog.Logger

	mu sync.Mutex
	// last is the last trusted time, and mark this node's clock then, with its monotonic reading. Before the first, only the only voter has them: its own when it was opened.
	last, mark, opened time.Time
	ok                 bool
}

func newClock(now func() time.Time, store func() (time.Time, bool), others func() ([]time.Time, int), log *slog.Logger) *clock {
	return &clock{now: now, store: store, others: others, log: log, ok: true, opened: now()}
}

// stamp returns the time in ms for the next entry of a group whose replicated clock is at seen; 0 if it is not known, not trusted, or has been put back: the replicated clock stands then.
func (c *clock) stamp(seen record.Timestamp) record.Timestamp {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if planted.On(planted.LocalClock) {
		return record.Timestamp(now.UnixMilli())
	}
	clocks, voters := c.others()
	t, agree, known := agreed(now.Round(0), clocks, voters)
	if !known {
		return 0 // a leader that has not heard a majority yet: no reason for an alarm
	}
	if c.mark.IsZero() && voters == 1 {
		c.last, c.mark = c.opened.Round(0), c.opened
	}
	ahead := time.Duration(0)
	if !c.mark.IsZero() {
		ahead = t.Sub(c.last) - now.Sub(c.mark) // monotonic where both have it
	}
	trusted := agree && ahead < clockJump
	if s, ok := c.store(); ok {
		trusted = t.Sub(s).Abs() < clockSkew // the store confirms or refutes
	}
	if trusted != c.ok {
		c.ok = trusted
		if trusted {
			c.log.Info("clock is trusted again", "event", "clock.trusted")
		} else {
			c.log.Error("clock is not trusted: nothing expires by time until it is put right", "event", "clock.untrusted", "ahead", ahead, "majority_agrees", agree)
		}
	}
	if !trusted {
		return 0
	}
	ms := record.Timestamp(t.UnixMilli())
	if seen-ms > record.Timestamp(clockBack.Milliseconds()) {
		return 0 // and last stays: the time that it is put right to is not one that runs ahead
	}
	c.last, c.mark = t, now
	return ms
}

// agreed is the median of the voters' clocks, of two the lower; agree says that a majority of all voters is close to it, known that a majority is in contact.
func agreed(own time.Time, clocks []time.Time, voters int) (t time.Time, agree, known bool) {
	majority := voters/2 + 1
	clocks = append(clocks, own)
	if len(clocks) < majority {
		return own, false, false
	}
	slices.SortFunc(clocks, time.Time.Compare)
	t = clocks[(len(clocks)-1)/2]
	near := 0
	for _, o := range clocks {
		if o.Sub(t).Abs() <= clockSpread {
			near++
		}
	}
	return t, near >= majority, true
}

// trusted reports whether the last stamp was.
func (c *clock) trusted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ok
}
