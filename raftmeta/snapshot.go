package raftmeta

import (
	"errors"
	"fmt"
	"time"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/hashicorp/raft"
)

const (
	// snapshotEvery: with anything to free, a snapshot is taken at least this often.
	snapshotEvery  = 5 * time.Minute
	snapshotCheck  = 250 * time.Millisecond
	snapshotBytes  = 256 << 20
	snapshotFactor = 16
)

// snapshotLoop takes snapshots by the group's own rule: by log bytes since the last one, by the budget, by time.
func (g *group) snapshotLoop() {
	t := time.NewTicker(g.host.cfg.slow(snapshotCheck))
	defer t.Stop()
	last := time.Now()
	for {
		select {
		case <-g.stop:
			return
		case <-t.C:
		}
		_, unfree := g.log.Bytes()
		c := &g.host.cfg
		every := max(min(snapshotBytes, c.HotMaxBytes/int64(4*g.share)), snapshotFactor*g.snapBytes.Load())
		since := g.log.SinceSnapshot()
		if since < every && (unfree < c.HotMaxBytes/2 || since < c.HotMaxBytes/64) && (time.Since(last) < snapshotEvery || since < 1<<16) {
			continue
		}
		if err := g.snapshot(); err != nil {
			g.log_.Warn("snapshot failed", "err", err)
		}
		last = time.Now()
	}
}

// snapshot takes one now; it does nothing if there is nothing new.
func (g *group) snapshot() error {
	g.snapMu.Lock()
	defer g.snapMu.Unlock()
	err := g.raft.Snapshot().Error()
	if errors.Is(err, raft.ErrNothingNewToSnapshot) || errors.Is(err, raftlog.ErrStale) {
		return nil
	}
	if err != nil {
		g.metrics.snapFailed.Inc()
		return fmt.Errorf("raftmeta: snapshot of group %d: %w", g.id, err)
	}
	g.metrics.snapshots.Inc()
	g.mu.RLock()
	oldest := g.machine.oldestHot()
	g.mu.RUnlock()
	// An idle group applies nothing more that could mark it installable.
	return g.snaps.Applied(g.applied.Load(), oldest)
}
