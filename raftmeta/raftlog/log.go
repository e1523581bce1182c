// Package raftlog is the log store of a Raft group and the hot tier at once: a record batch is written to disk here, once, as part
// of a raft entry, and read back from here until it is sealed. It knows the record frame and the header of an entry's Data, nothing
// else. FORMAT.md is the format on disk.
//
// The invariant: every entry above the base is readable and equal to what StoreLogs was given, and the base never passes the newest
// installable snapshot.
package raftlog

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/estran/estran/localstack/planted"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

// Errors of use.
var (
	// ErrTermMismatch: a command was proposed in another term than it would be stored under. Nothing was written and the store goes on:
	// the entry is definitely not appended (hashicorp/raft #695).
	ErrTermMismatch = errors.New("raftlog: proposing term differs from the log's term")
	// ErrGone: the entry is not in this log: freed, or of another term.
	ErrGone = errors.New("raftlog: entry is not here any more")
	// ErrRead: an entry that the log has could not be read, or is damaged; raft cannot go on without it.
	ErrRead = errors.New("raftlog: entry cannot be read")
	// ErrPoisoned: an earlier write failed; nothing is written any more.
	ErrPoisoned = errors.New("raftlog: poisoned by a failed write")
	// ErrHung: a write has been in the disk for longer than Config.HangTimeout.
	ErrHung = errors.New("raftlog: disk does not answer")
	// ErrClosed: the log was closed.
	ErrClosed = errors.New("raftlog: closed")
)

// stubType marks the (index, term) stub that GetLog gives for the base. It is never stored, sent or applied.
const stubType = raft.LogType(200)

// Config describes one group's log. Zero values take the defaults named.
type Config struct {
	Dir   string
	Group uint32
	FS    FS // OS{}
	// FileBytes is the size of a full log file (64 MiB); the first ones are smaller.
	FileBytes int64
	// TailBytes of the newest entries stay in memory (16 MiB).
	TailBytes int64
	// LocalRetention is how many bytes that may be freed are kept as a cache. Up to half as many are kept in freed files, to be written again.
	LocalRetention int64
	// HangTimeout: a write that takes longer stops the node (30 s).
	HangTimeout time.Duration
	// OnFatal is called at most once, on its own goroutine, when the store is poisoned, cannot be read by raft, or the disk hangs.
	OnFatal func(error)
	Logger  *slog.Logger
	Metrics Metrics
}

// Metrics are observed by a log; nil fields are left out.
type Metrics struct {
	Fsync, Store                 prometheus.Observer
	Appends, Entries, Bytes      prometheus.Counter
	Rotations, HeadTrim, TailCut prometheus.Counter
}

// Log implements raft.LogStore. All methods may be called concurrently; writes are serialised.
type Log struct {
	cfg Config
	fs  FS
	log *slog.Logger

	wmu   sync.Mutex // serialises writing; taken before mu
	cur   *logFile   // nil before the first batch after an open
	pos   int64      // where the next batch goes in cur
	batch uint64     // number of the last batch
	recs  []idxEntry // of cur, for its index
	hdrs  []byte     // scratch for record headers
	vecs  [][]byte   // scratch for the write

	mu       sync.RWMutex
	base     uint64
	baseTerm uint64
	ents     []ent // base+1 …
	files    map[uint32]*logFile
	order    []*logFile // with entries, oldest first
	tail     tail
	lent     map[*raft.Log]struct{} // entries whose bytes must not be kept
	written  int64                  // all bytes ever written, as positions: files' starts count from here
	permit   uint64
	snapIdx  uint64 // newest complete local snapshot of any kind
	holds    map[string]hold

	freeMu  sync.Mutex // serialises freeing
	baseRec *abFile

	fill filler
	kick chan struct{} // wakes freeLoop

	writing stopwatch // the write in flight
	stable  atomic.Pointer[Stable]
	poison  atomic.Pointer[error]
	once    sync.Once
	stop    chan struct{}
	done    sync.WaitGroup
}

// ent locates one entry.
type ent struct {
	file uint32 // low bits of the file's generation
	pos  uint32
	term uint64
}

type idxEntry struct {
	index, term uint64
	pos         uint32
}

type hold struct {
	index uint64
	until time.Time
}

// logFile is a log file; refs counts its readers.
type logFile struct {
	gen    uint64
	name   string
	f      File
	size   int64
	start  int64  // Log.written when its first batch was written
	last   uint64 // highest index that a record in it has
	refs   int    // under Log.mu
	doomed bool   // freed: goes back to the filler when refs is 0
}

var _ raft.LogStore = (*Log)(nil)

// Store implements one entry of StoreLogs.
func (l *Log) StoreLog(e *raft.Log) error { return l.StoreLogs([]*raft.Log{e}) }

// StoreLogs writes the entries as one batch and returns when they are durable. An error other than ErrTermMismatch and a gap has
// poisoned the store: whether the entries are there is unknown.
func (l *Log) StoreLogs(es []*raft.Log) error {
	if len(es) == 0 {
		return nil
	}
	l.wmu.Lock()
	defer l.wmu.Unlock()
	began := time.Now()
	var size int64
	for _, e := range es {
		size += recordHeader + int64(len(e.Data)) + int64(len(e.Extensions))
	}
	size = alignUp(size)
	for ready := false; !ready; {
		if err := l.Poisoned(); err != nil {
			return err
		}
		if err := l.check(es); err != nil {
			return err
		}
		var err error
		if ready, err = l.room(size, len(es)); err != nil {
			return err
		}
	}
	l.encode(es, size)
	l.writing.start() // not began: waiting for space is no hang
	err := l.cur.f.WriteVec(l.vecs, l.pos)
	if err == nil && !planted.On(planted.NoFsync) {
		synced := time.Now()
		err = l.cur.f.Sync()
		observe(l.cfg.Metrics.Fsync, synced)
	}
	l.writing.end()
	clear(l.vecs)
	if err != nil {
		return l.fail(fmt.Errorf("writing entries %d to %d: %w", es[0].Index, es[len(es)-1].Index, err))
	}
	l.added(es, size)
	l.fill.advance(l.pos, l.cur.size)
	observe(l.cfg.Metrics.Store, began)
	return nil
}

func observe(o prometheus.Observer, since time.Time) {
	if o != nil {
		o.Observe(time.Since(since).Seconds())
	}
}

func count(c prometheus.Counter, n float64) {
	if c != nil {
		c.Add(n)
	}
}

// check refuses what must never be stored. mu is taken for reading only.
func (l *Log) check(es []*raft.Log) error {
	l.mu.RLock()
	next, base := l.lastLocked()+1, l.base
	l.mu.RUnlock()
	first := es[0].Index
	if first > next || first <= base {
		return fmt.Errorf("raftlog: entry %d does not follow the log (%d..%d]", first, base, next-1)
	}
	for i, e := range es {
		if e.Index != first+uint64(i) {
			return fmt.Errorf("raftlog: entry %d where %d was due", e.Index, first+uint64(i))
		}
		if err := checkEntry(e); err != nil {
			return err
		}
	}
	return nil
}

// checkEntry refuses an entry that must never be stored, wherever it comes from.
func checkEntry(e *raft.Log) error {
	if e.Type == stubType {
		return fmt.Errorf("raftlog: the stub of entry %d must not be stored", e.Index)
	}
	if e.Type != raft.LogCommand {
		return nil
	}
	h, ok := ParseEntryHeader(e.Data)
	switch {
	case !ok:
		return fmt.Errorf("raftlog: command %d of %d bytes has no header", e.Index, len(e.Data))
	case h.Term != e.Term && !planted.On(planted.StockHeartbeat):
		return fmt.Errorf("%w: command %d was proposed in term %d and would be stored in term %d", ErrTermMismatch, e.Index, h.Term, e.Term)
	case h.Place == PlaceInline && int(h.PayloadLen) != len(e.Extensions), h.Place != PlaceInline && len(e.Extensions) != 0:
		return fmt.Errorf("raftlog: command %d says %d bytes of payload, it has %d", e.Index, h.PayloadLen, len(e.Extensions))
	}
	return nil
}

var zeros [blockBytes]byte

// encode makes the record headers and the buffers of the write; the payloads are not copied.
func (l *Log) encode(es []*raft.Log, size int64) {
	if need := len(es) * recordHeader; cap(l.hdrs) < need {
		l.hdrs = make([]byte, need)
	}
	l.vecs = l.vecs[:0]
	l.batch++
	total := int64(0)
	for i, e := range es {
		h := recHeader{group: l.cfg.Group, gen: l.cur.gen, batch: l.batch, index: e.Index, term: e.Term, typ: uint8(e.Type),
			dataLen: uint32(len(e.Data)), extLen: uint32(len(e.Extensions)), dataCRC: crcOf(e.Data),
			start: uint32(l.pos / blockBytes)}
		if !e.AppendedAt.IsZero() {
			h.appended = e.AppendedAt.UnixNano()
		}
		if len(e.Extensions) > 0 {
			if eh, ok := ParseEntryHeader(e.Data); ok && e.Type == raft.LogCommand {
				h.extCRC = eh.PayloadCRC // the proposer's; it travels with the entry
			} else {
				h.extCRC = crcOf(e.Extensions)
			}
		}
		if i == len(es)-1 {
			h.flags = flagLast
		}
		b := l.hdrs[i*recordHeader : (i+1)*recordHeader]
		h.encode(b)
		l.vecs = append(l.vecs, b)
		if len(e.Data) > 0 {
			l.vecs = append(l.vecs, e.Data)
		}
		if len(e.Extensions) > 0 {
			l.vecs = append(l.vecs, e.Extensions)
		}
		l.recs = append(l.recs, idxEntry{e.Index, e.Term, uint32(l.pos + total)})
		total += h.size()
	}
	if pad := size - total; pad > 0 {
		l.vecs = append(l.vecs, zeros[:pad])
	}
}

// added makes a durable batch visible.
func (l *Log) added(es []*raft.Log, size int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if first := es[0].Index; first <= l.lastLocked() {
		l.cutLocked(first)
	}
	recs := l.recs[len(l.recs)-len(es):]
	for i, e := range es {
		l.ents = append(l.ents, ent{uint32(l.cur.gen), recs[i].pos, e.Term})
		_, lent := l.lent[e]
		l.tail.push(e, lent, l.cfg.TailBytes)
	}
	l.cur.last = max(l.cur.last, es[len(es)-1].Index)
	l.pos += size
	l.written += size
	count(l.cfg.Metrics.Appends, 1)
	count(l.cfg.Metrics.Entries, float64(len(es)))
	count(l.cfg.Metrics.Bytes, float64(size))
}

func (l *Log) lastLocked() uint64 { return l.base + uint64(len(l.ents)) }

// cutLocked drops the entries from min on.
func (l *Log) cutLocked(min uint64) {
	count(l.cfg.Metrics.TailCut, float64(l.lastLocked()-min+1))
	l.ents = l.ents[:min-l.base-1]
	l.tail.cut(min)
}

// room makes sure that cur has space for a batch, and for its index afterwards; otherwise the next file is taken. If it had to wait for
// that it reports false: wmu was released meanwhile, so that the log can be freed, and what was checked may have changed.
func (l *Log) room(size int64, records int) (ready bool, err error) {
	need := size + alignUp(int64(len(l.recs)+records)*indexEntry) + blockBytes
	if l.cur != nil && l.pos+need <= l.cur.size {
		return true, nil
	}
	need = blockBytes + size + alignUp(int64(records)*indexEntry) + blockBytes
	f, err := l.fill.take(need)
	if err == nil && f == nil {
		l.wmu.Unlock()
		err = l.fill.await(need, l.stop)
		l.wmu.Lock()
	}
	switch {
	case errors.Is(err, ErrClosed):
		return false, err
	case err != nil:
		return false, l.fail(err)
	case f == nil:
		return false, nil
	}
	if l.cur != nil {
		if err := l.closeFile(l.cur, l.pos, l.recs, l.batch); err != nil {
			return false, l.fail(errors.Join(err, f.f.Close()))
		}
	}
	l.cur, l.pos, l.recs = f, blockBytes, l.recs[:0]
	l.fill.advance(l.pos, f.size)
	l.mu.Lock()
	f.start = l.written - blockBytes
	l.files[uint32(f.gen)] = f
	l.order = append(l.order, f)
	l.mu.Unlock()
	count(l.cfg.Metrics.Rotations, 1)
	return true, nil
}

// fail poisons the store: the first failed write is the last.
func (l *Log) fail(err error) error { return l.end(fmt.Errorf("%w: %w", ErrPoisoned, err)) }

// end tells the owner why nothing is written any more.
func (l *Log) end(err error) error {
	l.once.Do(func() {
		l.poison.Store(&err)
		l.log.Error("log store poisoned", "group", l.cfg.Group, "dir", l.cfg.Dir, "err", err)
		if l.cfg.OnFatal != nil {
			go l.cfg.OnFatal(err)
		}
	})
	return l.Poisoned()
}

// Poisoned returns why the store takes no more writes, or nil.
func (l *Log) Poisoned() error {
	if p := l.poison.Load(); p != nil {
		return *p
	}
	return nil
}

// FirstIndex implements raft.LogStore: 0 if the log is empty.
func (l *Log) FirstIndex() (uint64, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if len(l.ents) == 0 {
		return 0, nil
	}
	return l.base + 1, nil
}

// LastIndex implements raft.LogStore: the base if the log is empty.
func (l *Log) LastIndex() (uint64, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.lastLocked(), nil
}

// Base returns index and term of the entry that the log begins behind.
func (l *Log) Base() (index, term uint64) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.base, l.baseTerm
}

// GetLog implements raft.LogStore. Commands come without their Extensions; the base is answered with a stub of its index and term.
func (l *Log) GetLog(index uint64, out *raft.Log) error {
	l.mu.RLock()
	if index == l.base && index > 0 {
		*out = raft.Log{Index: index, Term: l.baseTerm, Type: stubType}
		l.mu.RUnlock()
		return nil
	}
	if index <= l.base || index > l.lastLocked() {
		l.mu.RUnlock()
		return raft.ErrLogNotFound
	}
	term := l.ents[index-l.base-1].term
	if e, ok := l.tail.get(index); ok && e.onDisk {
		*out = *e.Log
		l.mu.RUnlock()
		return nil
	}
	l.mu.RUnlock()
	e, err := l.Entry(index, term)
	if errors.Is(err, ErrGone) {
		return raft.ErrLogNotFound
	}
	if err != nil {
		return err
	}
	defer e.Release()
	*out = raft.Log{Index: index, Term: term, Type: e.Type, Data: e.Data, AppendedAt: e.AppendedAt}
	if e.Type != raft.LogCommand && e.PayloadLen > 0 {
		out.Extensions = make([]byte, e.PayloadLen)
		return e.ReadPayload(out.Extensions, 0)
	}
	return nil
}

// RaftLog is the log as raft should use it: raft panics when it cannot read an entry that is to be applied.
type RaftLog struct {
	*Log
	runs atomic.Bool
}

// ForRaft is for one raft. Until Runs is called it is being opened, and gets an ErrRead for an entry that cannot be read.
func (l *Log) ForRaft() *RaftLog { return &RaftLog{Log: l} }

// Runs says that raft has been opened: from now on GetLog never returns from a read that fails. The owner has been told by Config.OnFatal and ends the process.
func (r *RaftLog) Runs() { r.runs.Store(true) }

// GetLog implements raft.LogStore.
func (r *RaftLog) GetLog(index uint64, out *raft.Log) error {
	err := r.Log.GetLog(index, out)
	if err == nil || errors.Is(err, raft.ErrLogNotFound) {
		return err
	}
	err = fmt.Errorf("%w: %w", ErrRead, err)
	if r.runs.Load() {
		_ = r.end(err) // the owner is told
		select {}
	}
	return err
}

// DeleteRange implements raft.LogStore. raft calls it both to truncate a conflicting suffix and to compact; only a range above every
// local snapshot is a truncation, any other call is a hint that there may be something to free.
func (l *Log) DeleteRange(minIndex, maxIndex uint64) error {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	l.mu.Lock()
	if planted.On(planted.FreeOnHint) && minIndex <= l.snapIdx {
		l.permit = max(l.permit, maxIndex)
	}
	if minIndex <= l.snapIdx && !(planted.On(planted.DeleteRangeByMax) && maxIndex >= l.lastLocked() && minIndex > l.base) {
		l.mu.Unlock()
		l.kickFree()
		return nil
	}
	defer l.mu.Unlock()
	if minIndex <= l.base {
		return l.fail(fmt.Errorf("truncation from %d at or below the base %d", minIndex, l.base))
	}
	if minIndex <= l.lastLocked() {
		l.cutLocked(minIndex)
	}
	return nil
}

// Close stops the background work and closes the files. A write in flight is waited for.
func (l *Log) Close() error {
	select {
	case <-l.stop:
		return nil
	default:
	}
	close(l.stop)
	l.fill.wake()
	l.done.Wait()
	l.wmu.Lock()
	defer l.wmu.Unlock()
	err := ErrClosed
	l.poison.CompareAndSwap(nil, &err)
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, f := range l.files {
		if f.refs == 0 {
			errs = append(errs, f.f.Close())
		}
		f.doomed = true // a reader that is left closes it
	}
	errs = append(errs, l.fill.close(), l.baseRec.close())
	return errors.Join(errs...)
}

func (l *Log) path(name string) string { return filepath.Join(l.cfg.Dir, name) }
