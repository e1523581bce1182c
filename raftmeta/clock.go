package raftmeta

import (
	"log/slog"
	"sync"
	"time"

	"github.com/estran/estran/tiering/record"
)

const (
	// clockJump: the wall clock may run this far ahead of the monotonic one before it is distrusted.
	clockJump = 10 * time.Minute
	// clockSkew: it may differ this much from the object store's.
	clockSkew = 15 * time.Minute
)

// clock gives the time that goes into entries. A wrong time must never be stored, since it would expire data for ever: while the clock is
// not trusted, entries carry none and the replicated clock stands.
type clock struct {
	now   func() time.Time
	store func() (time.Time, bool)
	log   *slog.Logger

	mu   sync.Mutex
	wall time.Time // at the last trusted stamp, with its monotonic reading
	ok   bool
}

func newClock(now func() time.Time, store func() (time.Time, bool), log *slog.Logger) *clock {
	return &clock{now: now, store: store, log: log, wall: now(), ok: true}
}

// stamp returns the time in ms for the next entry, 0 if the clock is not trusted.
func (c *clock) stamp() record.Timestamp {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	elapsed := now.Sub(c.wall) // monotonic where both have it
	jump := now.Round(0).Sub(c.wall.Round(0)) - elapsed
	trusted := jump < clockJump
	if t, ok := c.store(); ok {
		skew := now.Round(0).Sub(t)
		trusted = skew < clockSkew && skew > -clockSkew // the store confirms or refutes
	}
	if trusted != c.ok {
		c.ok = trusted
		if trusted {
			c.log.Info("clock is trusted again", "event", "clock.trusted")
		} else {
			c.log.Error("clock is not trusted: nothing expires by time until it is put right", "event", "clock.untrusted", "ahead", jump)
		}
	}
	if !trusted {
		return 0
	}
	c.wall = now
	return record.Timestamp(now.UnixMilli())
}
