package raftlog

import (
	"bytes"
	"fmt"
	"time"

	"github.com/estran/estran/localstack/planted"
	"github.com/hashicorp/raft"
)

// tail holds the newest entries in memory. The bytes are those that raft was given: immutable, owned by the garbage collector. Of lent commands it holds the Data, copied.
type tail struct {
	ents  []tailEnt // consecutive; the last is the log's last
	bytes int64
}

type tailEnt struct {
	*raft.Log
	onDisk bool  // the payload is not here
	size   int64 // what the entry keeps from the garbage collector, its own structures included; a payload that is not here counts as if it were
}

func (t *tail) push(e *raft.Log, lent bool, limit int64) {
	if n := len(t.ents); n > 0 && t.ents[n-1].Index+1 != e.Index {
		*t = tail{}
	}
	c := tailEnt{Log: &raft.Log{Index: e.Index, Term: e.Term, Type: e.Type, Data: e.Data, Extensions: e.Extensions, AppendedAt: e.AppendedAt}}
	c.size = int64(cap(e.Data)+cap(e.Extensions)) + 160
	if lent {
		c.Data = bytes.Clone(e.Data)
	}
	if lent && !planted.On(planted.LentPayloadKept) {
		if c.onDisk = e.Type == raft.LogCommand && len(e.Extensions) > 0; c.onDisk {
			c.Extensions = nil
		} else {
			c.Extensions = bytes.Clone(e.Extensions)
		}
	}
	t.ents = append(t.ents, c)
	t.bytes += c.size
	drop := 0
	for t.bytes > limit && drop < len(t.ents)-1 {
		t.bytes -= t.ents[drop].size
		t.ents[drop] = tailEnt{}
		drop++
	}
	t.ents = t.ents[drop:]
}

func (t *tail) cut(min uint64) {
	for n := len(t.ents); n > 0 && t.ents[n-1].Index >= min; n-- {
		t.bytes -= t.ents[n-1].size
		t.ents[n-1] = tailEnt{}
		t.ents = t.ents[:n-1]
	}
}

func (t *tail) get(index uint64) (e tailEnt, ok bool) {
	if len(t.ents) == 0 || index < t.ents[0].Index || index > t.ents[len(t.ents)-1].Index {
		return tailEnt{}, false
	}
	return t.ents[index-t.ents[0].Index], true
}

// Lend says that the bytes of these entries are the caller's, who will use them for something else: StoreLogs, given the same structures before back is called, keeps nothing of
// them. It is for entries from a peer, whose payload is read once more only when this node comes to lead.
func (l *Log) Lend(es []*raft.Log) (back func()) {
	if len(es) == 0 {
		return func() {}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range es {
		l.lent[e] = struct{}{}
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, e := range es {
			delete(l.lent, e)
		}
	}
}

// Entry is an entry that is open for reading. Release must be called once.
type Entry struct {
	Type       raft.LogType
	AppendedAt time.Time
	// Data is the entry's Data, checked against its CRC. It must not be changed; it stays valid after Release.
	Data []byte
	// Payload is the whole payload if it is in memory, else nil. It must not be changed; it stays valid after Release.
	Payload []byte
	// PayloadLen is the payload's length in bytes.
	PayloadLen int

	payloadCRC uint32
	l          *Log
	file       *logFile
	at         int64 // of the payload in file
}

// InMemory reports whether reading the entry touches no disk.
func (e *Entry) InMemory() bool { return e.file == nil }

// Entry opens the entry with this index and term, or returns ErrGone: an index alone is no identity.
func (l *Log) Entry(index, term uint64) (Entry, error) {
	l.mu.RLock()
	if index <= l.base || index > l.lastLocked() {
		base := l.base
		l.mu.RUnlock()
		return Entry{}, fmt.Errorf("%w: %d, the log begins behind %d", ErrGone, index, base)
	}
	at := l.ents[index-l.base-1]
	if at.term != term {
		l.mu.RUnlock()
		return Entry{}, fmt.Errorf("%w: entry %d has term %d, not %d", ErrGone, index, at.term, term)
	}
	if e, ok := l.tail.get(index); ok && !e.onDisk {
		l.mu.RUnlock()
		return Entry{Type: e.Type, AppendedAt: e.AppendedAt, Data: e.Data, Payload: e.Extensions, PayloadLen: len(e.Extensions)}, nil
	}
	l.mu.RUnlock()
	l.mu.Lock() // again, to count the reader; the entry may have been freed in between
	if index <= l.base || index > l.lastLocked() || l.ents[index-l.base-1] != at {
		l.mu.Unlock()
		return Entry{}, fmt.Errorf("%w: %d was freed", ErrGone, index)
	}
	f := l.files[at.file]
	f.refs++
	l.mu.Unlock()
	e, err := l.readEntry(f, int64(at.pos), index, term)
	if err != nil {
		l.release(f)
		return Entry{}, err
	}
	return e, nil
}

// firstRead covers header and directory of most entries in one pread.
const firstRead = 8192

func (l *Log) readEntry(f *logFile, pos int64, index, term uint64) (Entry, error) {
	buf := make([]byte, min(firstRead, f.size-pos))
	if _, err := f.f.ReadAt(buf, pos); err != nil {
		return Entry{}, fmt.Errorf("raftlog: reading entry %d from %s at %d: %w", index, f.name, pos, err)
	}
	h, ok := decodeRecord(buf)
	if !ok || h.index != index || h.term != term || h.gen != f.gen || pos+h.size() > f.size {
		return Entry{}, fmt.Errorf("%w: header of entry %d in %s at %d", ErrCorrupt, index, f.name, pos)
	}
	data := buf[recordHeader:min(len(buf), recordHeader+int(h.dataLen))]
	if len(data) < int(h.dataLen) {
		data = append(make([]byte, 0, h.dataLen), data...)
		rest := data[len(data):h.dataLen]
		if _, err := f.f.ReadAt(rest, pos+int64(len(buf))); err != nil {
			return Entry{}, fmt.Errorf("raftlog: reading entry %d from %s at %d: %w", index, f.name, pos, err)
		}
		data = data[:h.dataLen]
	}
	if crcOf(data) != h.dataCRC {
		return Entry{}, fmt.Errorf("%w: data of entry %d in %s at %d", ErrCorrupt, index, f.name, pos)
	}
	var out raft.Log
	h.log(&out, data)
	return Entry{Type: out.Type, AppendedAt: out.AppendedAt, Data: data, PayloadLen: int(h.extLen), payloadCRC: h.extCRC, l: l, file: f,
		at: pos + recordHeader + int64(h.dataLen)}, nil
}

// ReadPayload fills p with the payload's bytes from off on. What is read from disk is not checked here: the reader checks the CRC of
// each batch that it takes, or calls Verify.
func (e *Entry) ReadPayload(p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > int64(e.PayloadLen) {
		return fmt.Errorf("raftlog: %d bytes at %d of a payload of %d", len(p), off, e.PayloadLen)
	}
	if e.file == nil {
		copy(p, e.Payload[off:])
		return nil
	}
	if _, err := e.file.f.ReadAt(p, e.at+off); err != nil {
		return fmt.Errorf("raftlog: reading payload from %s at %d: %w", e.file.name, e.at+off, err)
	}
	return nil
}

// Where tells where the payload lies, for messages about damage.
func (e *Entry) Where() string {
	if e.file == nil {
		return "memory"
	}
	return fmt.Sprintf("%s at %d", e.file.name, e.at)
}

// Release gives the entry's file back; the file is not reused before.
func (e *Entry) Release() {
	if e.file != nil {
		e.l.release(e.file)
		e.file = nil
	}
}

func (l *Log) release(f *logFile) {
	l.mu.Lock()
	f.refs--
	recycle := f.refs == 0 && f.doomed
	l.mu.Unlock()
	if recycle {
		l.fill.recycle(f)
	}
}

// Bytes returns how many bytes of log lie above the base, and how many of them may not be freed yet, both as written.
func (l *Log) Bytes() (all, unfree int64) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.bytesAboveLocked(l.base), l.bytesAboveLocked(max(l.base, l.permit))
}

// SinceSnapshot is how many bytes were written above the newest complete local snapshot: what a restart replays.
func (l *Log) SinceSnapshot() int64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.bytesAboveLocked(max(l.base, l.snapIdx))
}

// bytesAboveLocked is how many bytes were written from entry index+1 on.
func (l *Log) bytesAboveLocked(index uint64) int64 {
	if index >= l.lastLocked() {
		return 0
	}
	at := l.ents[index-l.base]
	f := l.files[at.file]
	return l.written - (f.start + int64(at.pos))
}

// NoSpace reports that the disk has no room for another log file: the free budget is 0 until it has.
func (l *Log) NoSpace() bool { return l.fill.noSpace.Load() }

// Holds reports whether the log has an entry with this index and term above its base.
func (l *Log) Holds(index, term uint64) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return index > l.base && index <= l.lastLocked() && l.ents[index-l.base-1].term == term
}
