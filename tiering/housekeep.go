package tiering

import (
	"context"
	"math"
	"slices"
	"time"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

const (
	// advancePerPass bounds the log starts that one pass moves: a wrong decision must not delete everything at once.
	advancePerPass = 1000
	deletePerPass  = 1000
	// failuresPerPass ends a pass: a store that is away is not asked for every object that is to go, every time.
	failuresPerPass = 3
	runsPerLook     = 256
	dayMs           = 24 * 60 * 60 * 1000
)

// housekeep keeps retention and deletes what nothing refers to, until ctx ends.
func (t *Tiering) housekeep(ctx context.Context, s record.ShardID) {
	g := garbage{map[segment.Number]bool{}, map[segment.Number]bool{}}
	for wait(ctx, t.cfg.HousekeepEvery) {
		now, trusted := t.cat.Clock(s)
		if !trusted {
			continue // nothing expires by a clock that may be wrong
		}
		t.retain(ctx, s, now)
		if err := t.cat.Sweep(ctx, s); err != nil && ctx.Err() == nil {
			t.cfg.Logger.Warn("sweep failed", "component", "tier", "shard", s, "err", err)
		}
		t.collectGarbage(ctx, s, now, g)
	}
}

// retain moves log starts by time and size.
func (t *Tiering) retain(ctx context.Context, s record.ShardID, now record.Timestamp) {
	moved := 0
	for _, p := range t.cat.Partitions(s) {
		if ctx.Err() != nil || moved >= advancePerPass {
			return
		}
		to := t.logStartOf(&p, now)
		if to <= p.LogStart {
			continue
		}
		t.deleteFirst(ctx, &p, to)
		if err := t.cat.AdvanceLogStart(ctx, p.TP, to); err != nil {
			t.cfg.Logger.Warn("cannot advance a log start", "component", "tier", "partition", p.TP, "to", to, "err", err)
			continue
		}
		moved++
		t.cfg.Logger.Info("records expired", "event", "retention.applied", "component", "tier", "partition", p.TP, "from", p.LogStart, "to", to)
	}
}

// logStartOf decides where a partition's log should begin. It goes run by run: a run goes as a whole, when all of it is expired or when what remains
// is still enough.
func (t *Tiering) logStartOf(p *PartitionStatus, now record.Timestamp) record.Offset {
	to := p.LogStart
	if p.Compact || p.RetentionMs < 0 && p.RetentionBytes < 0 || p.HighWatermark == p.LogStart {
		return to
	}
	left := p.SealedBytes + p.HotBytes
	for {
		runs := t.cat.Runs(p.TP, to, runsPerLook)
		for _, r := range runs {
			expired := p.RetentionMs >= 0 && expiryOf(p, &r) < now
			surplus := p.RetentionBytes >= 0 && left-r.Run.SizeBytes >= p.RetentionBytes
			if !expired && !surplus {
				return to
			}
			left -= r.Run.SizeBytes
			to = r.Run.EndOffset + 1
		}
		if len(runs) < runsPerLook {
			break
		}
	}
	// Everything sealed is gone. What is hot and as old is dropped without ever being uploaded.
	if p.RetentionMs >= 0 && p.HotBytes > 0 && later(p.MaxTimestamp, p.RetentionMs) < now {
		return p.HighWatermark
	}
	return to
}

// expiryOf is when a run may go: by its largest timestamp, and whatever the records say, when its class is over, if it is known since when.
func expiryOf(p *PartitionStatus, r *RunRef) record.Timestamp {
	at := later(r.Run.MaxTimestamp, p.RetentionMs)
	if c := r.Object.Plan.Class; c != segment.ClassKeep && r.Object.UploadedAt > 0 {
		at = min(at, r.Object.UploadedAt+record.Timestamp(c.Days()*dayMs))
	}
	return at
}

// later is t + ms, or the end of time: both come from users, who say "for ever" with the largest number there is.
func later(t record.Timestamp, ms int64) record.Timestamp {
	if t > 0 && ms > math.MaxInt64-int64(t) {
		return math.MaxInt64
	}
	return t + record.Timestamp(ms)
}

// garbage remembers what a leader has tried.
type garbage struct {
	late   map[segment.Number]bool // swept uploads that were deleted once
	failed map[segment.Number]bool // objects whose last deletion failed: the others go first
}

// collectGarbage deletes objects whose grace is over. A swept upload is deleted twice, since its PUT may end late.
func (t *Tiering) collectGarbage(ctx context.Context, s record.ShardID, now record.Timestamp, g garbage) {
	var gone []segment.Number
	n, failures, asked := 0, 0, t.cfg.MayDelete == nil
	doomed := t.cat.Doomed(s)
	slices.SortStableFunc(doomed, func(a, b segment.Object) int { return rank(g.failed[a.Number]) - rank(g.failed[b.Number]) })
	for _, o := range doomed {
		if ctx.Err() != nil || n >= deletePerPass || failures >= failuresPerPass {
			break
		}
		swept := o.Size == 0 // never committed: no reader can know it
		grace := t.cfg.Grace
		if swept || planted.On(planted.GraceSkipped) {
			grace = 0
			if g.late[o.Number] {
				grace = t.cfg.LateDelete
			}
		}
		if o.Since+record.Timestamp(grace/time.Millisecond) > now {
			continue
		}
		if !asked {
			if err := t.cfg.MayDelete(ctx); err != nil {
				t.cfg.Logger.Warn("nothing is deleted", "component", "tier", "shard", s, "err", err)
				break
			}
			asked = true
		}
		n++
		if err := t.bucket.Delete(ctx, o.Key()); err != nil {
			failures++
			g.failed[o.Number] = true
			t.m.deleted.WithLabelValues("failed").Inc()
			t.cfg.Logger.Warn("cannot delete an object", "component", "tier", "key", o.Key(), "err", err)
			continue
		}
		delete(g.failed, o.Number)
		t.m.deleted.WithLabelValues("deleted").Inc()
		if swept && !g.late[o.Number] {
			g.late[o.Number] = true
			if t.cfg.LateDelete > 0 {
				continue
			}
		}
		delete(g.late, o.Number)
		gone = append(gone, o.Number)
	}
	if len(gone) > 0 {
		if err := t.cat.Forget(ctx, s, gone); err != nil && ctx.Err() == nil {
			t.cfg.Logger.Warn("cannot forget deleted objects", "component", "tier", "shard", s, "err", err)
		}
	}
}

func rank(failed bool) int {
	if failed {
		return 1
	}
	return 0
}
