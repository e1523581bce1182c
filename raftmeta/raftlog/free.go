package raftlog

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sort"
	"sync/atomic"
	"time"
)

// Permit allows the log to free entries up to index: that of the newest installable snapshot. What may be freed is kept as a cache of up
// to Config.LocalRetention bytes.
func (l *Log) Permit(index uint64) {
	l.mu.Lock()
	l.permit = max(l.permit, index)
	l.mu.Unlock()
	l.kickFree()
}

// HoldAt keeps the entries above index for a peer that installs or catches up, until the time given.
func (l *Log) HoldAt(peer string, index uint64, until time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.holds[peer] = hold{index, until}
}

// ReleaseHold ends HoldAt.
func (l *Log) ReleaseHold(peer string) {
	l.mu.Lock()
	delete(l.holds, peer)
	l.mu.Unlock()
	l.kickFree()
}

// SetSnapshot tells the log the newest complete local snapshot: a DeleteRange at or below it is never a truncation.
func (l *Log) SetSnapshot(index uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.snapIdx = max(l.snapIdx, index)
}

// Install makes the received snapshot (index, term) the base: everything up to it is dropped, a tail above it stays even if it is
// divergent. It returns when the base is durable.
func (l *Log) Install(index, term uint64) error {
	l.freeMu.Lock()
	defer l.freeMu.Unlock()
	l.mu.RLock()
	old := l.base
	l.mu.RUnlock()
	if index <= old {
		return nil
	}
	return l.moveBase(index, term)
}

func (l *Log) kickFree() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

func (l *Log) freeLoop() {
	expiry := time.NewTimer(time.Hour)
	defer expiry.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-l.kick:
		case <-expiry.C:
		}
		again, err := l.free()
		if !again.IsZero() {
			expiry.Reset(time.Until(again))
		}
		if err != nil {
			_ = l.fail(fmt.Errorf("freeing: %w", err)) // nobody waits; the node is told
			return
		}
	}
}

// free moves the base to the last entry of a file as long as more may be freed than is to be kept. again is when a hold ends that kept it from more.
func (l *Log) free() (again time.Time, err error) {
	l.freeMu.Lock()
	defer l.freeMu.Unlock()
	index, term, again := l.freeTarget(time.Now())
	if index == 0 {
		return again, nil
	}
	return again, l.moveBase(index, term)
}

func (l *Log) freeTarget(now time.Time) (index, term uint64, again time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	limit := min(l.permit, l.lastLocked())
	for peer, h := range l.holds {
		if !now.Before(h.until) {
			delete(l.holds, peer)
			continue
		}
		if h.index < limit {
			limit = h.index
			again = h.until
		}
	}
	if limit <= l.base {
		return 0, 0, again
	}
	keep := l.cfg.LocalRetention
	if l.NoSpace() {
		keep = 0 // the cache gives way
	}
	cached := l.bytesAboveLocked(l.base) - l.bytesAboveLocked(max(l.base, l.permit))
	for _, f := range l.order[:max(0, len(l.order)-1)] { // the newest file is being written
		if cached <= keep {
			break
		}
		n := l.entriesThrough(f)
		if n == 0 {
			continue // everything in it was replaced
		}
		last := l.base + uint64(n)
		if last > limit || last < 2 {
			break
		}
		index, term = last, l.ents[n-1].term
		cached = l.bytesAboveLocked(index) - l.bytesAboveLocked(max(index, l.permit))
	}
	return index, term, again
}

// entriesThrough counts the live entries in f and older files; generations never fall with the index.
func (l *Log) entriesThrough(f *logFile) int {
	return sort.Search(len(l.ents), func(i int) bool { return l.ents[i].file > uint32(f.gen) })
}

// moveBase makes the base durable and then gives back the files that hold nothing above it.
func (l *Log) moveBase(index, term uint64) error {
	v := binary.BigEndian.AppendUint64(nil, index)
	if err := l.baseRec.set(binary.BigEndian.AppendUint64(v, term)); err != nil {
		return fmt.Errorf("writing the base %d: %w", index, err)
	}
	l.wmu.Lock() // no write may count on a file that goes
	l.mu.Lock()
	k := min(index-l.base, uint64(len(l.ents)))
	count(l.cfg.Metrics.HeadTrim, float64(k))
	l.ents = slices.Clone(l.ents[k:])
	l.base, l.baseTerm = index, term
	if k > 0 && len(l.ents) == 0 {
		l.tail = tail{}
	}
	l.permit = max(l.permit, index)
	live := map[uint32]bool{}
	for i := 0; i < len(l.ents); {
		live[l.ents[i].file] = true
		i = l.entriesThrough(l.files[l.ents[i].file])
	}
	var gone []*logFile
	l.order = slices.DeleteFunc(l.order, func(f *logFile) bool {
		if f == l.cur || live[uint32(f.gen)] {
			return false
		}
		delete(l.files, uint32(f.gen))
		f.doomed = true
		if f.refs == 0 {
			gone = append(gone, f)
		}
		return true
	})
	l.mu.Unlock()
	l.wmu.Unlock()
	for _, f := range gone {
		l.fill.recycle(f)
	}
	return nil
}

// watch stops the node when a write hangs: a leader whose disk does not answer would otherwise lead for ever.
func (l *Log) watch() {
	t := time.NewTicker(l.cfg.HangTimeout / 4)
	defer t.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-t.C:
		}
		if since := l.Stalled(); since > l.cfg.HangTimeout {
			l.log.Error("disk does not answer", "dir", l.cfg.Dir, "since", since)
			if l.cfg.OnFatal != nil {
				go l.cfg.OnFatal(fmt.Errorf("%w: a write to %s has taken %s", ErrHung, l.cfg.Dir, since.Round(time.Millisecond)))
			}
			return
		}
	}
}

// Stalled is how long the write in flight has been in the disk, or has waited for a file whose making is stuck there; 0 if there is none.
// The small records count too: the base, and the term and vote of a store that WatchStable named.
func (l *Log) Stalled() time.Duration {
	d := max(l.writing.running(), min(l.fill.waiting.running(), l.fill.busy.running()), l.baseRec.busy.running())
	if s := l.stable.Load(); s != nil {
		d = max(d, s.file.busy.running())
	}
	return d
}

// WatchStable lets the log's watchdog watch the group's stable store as well: raft waits for it.
func (l *Log) WatchStable(s *Stable) { l.stable.Store(s) }

// stopwatch tells for how long something has been in flight. It goes by the monotonic clock: a wall clock that is set is no hang.
type stopwatch struct{ since atomic.Pointer[time.Time] }

func (s *stopwatch) start() {
	now := time.Now()
	s.since.Store(&now)
}

func (s *stopwatch) end() { s.since.Store(nil) }

func (s *stopwatch) running() time.Duration {
	if t := s.since.Load(); t != nil {
		return time.Since(*t)
	}
	return 0
}
