package raftlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/raft"
)

// Open opens or creates the log in cfg.Dir and recovers it as FORMAT.md says. It returns ErrCorrupt if durable entries are damaged and
// ErrVersion if a newer program wrote them.
func Open(cfg Config) (*Log, error) {
	l := newLog(cfg)
	if err := l.recover(); err != nil {
		for _, f := range l.files {
			err = errors.Join(err, f.f.Close())
		}
		return nil, errors.Join(err, l.fill.close(), l.baseRec.close())
	}
	l.done.Go(func() { l.fill.run(l.stop) })
	l.done.Go(l.watch)
	l.done.Go(l.freeLoop)
	return l, nil
}

func newLog(cfg Config) *Log {
	if cfg.FS == nil {
		cfg.FS = OS{}
	}
	if cfg.FileBytes == 0 {
		cfg.FileBytes = 64 << 20
	}
	if cfg.TailBytes == 0 {
		cfg.TailBytes = 16 << 20
	}
	if cfg.HangTimeout == 0 {
		cfg.HangTimeout = 30 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	l := &Log{cfg: cfg, fs: cfg.FS, log: cfg.Logger, files: map[uint32]*logFile{}, holds: map[string]hold{}, lent: map[*raft.Log]struct{}{}, stop: make(chan struct{}), kick: make(chan struct{}, 1)}
	l.fill.init(l)
	return l
}

func (l *Log) recover() error {
	if err := l.fs.MkdirAll(l.cfg.Dir); err != nil {
		return fmt.Errorf("raftlog: %w", err)
	}
	var err error
	if l.baseRec, err = openAB(l.fs, l.cfg.Dir, "base"); err != nil {
		return err
	}
	if v := l.baseRec.get(); v != nil {
		if len(v) != 16 {
			return fmt.Errorf("%w: base record of %d bytes", ErrCorrupt, len(v))
		}
		l.base, l.baseTerm = binary.BigEndian.Uint64(v), binary.BigEndian.Uint64(v[8:])
	}
	files, err := l.openFiles()
	if err != nil {
		return err
	}
	if err := l.loadFiles(files); err != nil {
		return err
	}
	l.fill.size = firstFileBytes
	for _, f := range l.order {
		l.fill.size = min(max(l.fill.size, f.size*2), l.cfg.FileBytes)
	}
	l.fill.size = min(l.fill.size, l.cfg.FileBytes)
	if err := l.fill.reserve(); full(err) {
		l.fill.declareFull() // the log opens all the same
	} else if err != nil {
		return fmt.Errorf("raftlog: making the reserve: %w", err)
	}
	l.fill.busy.end()
	return nil
}

// openFiles opens every log file with a valid header, in order of generation, and removes those that were being made.
func (l *Log) openFiles() ([]*logFile, error) {
	names, err := l.fs.List(l.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("raftlog: %w", err)
	}
	var files []*logFile
	for _, n := range names {
		hex, ok := strings.CutSuffix(n, ".log")
		if !ok {
			continue
		}
		if _, err := strconv.ParseUint(hex, 16, 64); err != nil {
			return files, fmt.Errorf("raftlog: foreign file %s", l.path(n))
		}
		f, err := l.fs.Open(l.path(n))
		if err != nil {
			return files, fmt.Errorf("raftlog: %w", err)
		}
		lf := &logFile{name: l.path(n), f: f}
		lf.gen, lf.size, err = l.readFileHeader(lf)
		if errors.Is(err, errNoHeader) && l.holdsRecords(f) { // the header is written last, and into one sector
			err = fmt.Errorf("%w: %s holds records and has no valid header", ErrCorrupt, lf.name)
		}
		if err != nil {
			err = errors.Join(err, f.Close())
			if !errors.Is(err, errNoHeader) {
				return files, err
			}
			l.log.Info("removing a log file that was being made", "file", lf.name)
			if err := l.fs.Remove(lf.name); err != nil {
				return files, fmt.Errorf("raftlog: %w", err)
			}
			continue
		}
		files = append(files, lf)
		if other := l.files[uint32(lf.gen)]; other != nil { // a generation is used once: one of them is a copy
			return files, errors.Join(fmt.Errorf("%w: %s and %s are both of generation %d", ErrCorrupt, other.name, lf.name, lf.gen), f.Close())
		}
		l.files[uint32(lf.gen)] = lf
		l.fill.gen = max(l.fill.gen, lf.gen)
	}
	slices.SortFunc(files, func(a, b *logFile) int { return int(int64(a.gen) - int64(b.gen)) })
	// A crash between the new header and the rename leaves the old name: the header counts. What had the new name was being made, and is gone.
	for _, lf := range files {
		if own := l.path(fmt.Sprintf("%016x.log", lf.gen)); own != lf.name {
			if slices.ContainsFunc(files, func(o *logFile) bool { return o.name == own }) { // no crash leaves that
				return files, fmt.Errorf("%w: %s is of generation %d, and there is %s", ErrCorrupt, lf.name, lf.gen, own)
			}
			if err := l.fs.Rename(lf.name, own); err != nil {
				return files, fmt.Errorf("raftlog: %w", err)
			}
			lf.name = own
		}
	}
	return files, nil
}

// holdsRecords reports whether a batch of this group was ever written into a file.
func (l *Log) holdsRecords(f File) bool {
	b := make([]byte, recordHeader)
	if _, err := f.ReadAt(b, blockBytes); err != nil {
		return false
	}
	h, ok := decodeRecord(b)
	return ok && h.group == l.cfg.Group
}

func (l *Log) readFileHeader(f *logFile) (gen uint64, size int64, err error) {
	h := make([]byte, blockBytes)
	if _, err := f.f.ReadAt(h, 0); err != nil {
		if errors.Is(err, io.EOF) {
			return 0, 0, errNoHeader
		}
		return 0, 0, fmt.Errorf("raftlog: reading %s: %w", f.name, err)
	}
	gen, size, err = decodeFileHeader(h, l.cfg.Group)
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w", f.name, err)
	}
	if real, err := f.f.Size(); err != nil || real < size {
		return 0, 0, fmt.Errorf("%w: %s has %d of %d bytes: %v", ErrCorrupt, f.name, real, size, err)
	}
	return gen, size, nil
}

// loadFiles builds the entry table: closed files by their index, the last one by a scan.
func (l *Log) loadFiles(files []*logFile) error {
	open := -1 // the file with records but without index
	for i, f := range files {
		recs, batch, end, err := l.readIndex(f)
		if err != nil {
			return err
		}
		closed := end > 0
		if !closed {
			if recs, batch, end, err = l.scan(f); err != nil {
				return err
			}
		}
		if len(recs) == 0 {
			delete(l.files, uint32(f.gen))
			l.fill.free = append(l.fill.free, f)
			continue
		}
		if open >= 0 {
			return fmt.Errorf("%w: %s has records but %s, before it, has no index", ErrCorrupt, f.name, files[open].name)
		}
		if !closed {
			open = i
			if err := l.closeFile(f, end, recs, batch); err != nil {
				return err
			}
		}
		l.batch = max(l.batch, batch)
		if err := l.adopt(f, recs, end); err != nil {
			return err
		}
	}
	l.dropBelowBase()
	return nil
}

// adopt appends a file's records to the entry table; a record replaces the log from its index on.
func (l *Log) adopt(f *logFile, recs []idxEntry, end int64) error {
	f.start = l.written - blockBytes
	l.order = append(l.order, f)
	for _, r := range recs {
		f.last = max(f.last, r.index)
		if r.index <= l.base {
			l.ents = l.ents[:0] // what follows replaces what was there
			continue
		}
		if r.index > l.lastLocked()+1 {
			return fmt.Errorf("%w: %s holds entry %d, the log ends at %d (base %d)", ErrCorrupt, f.name, r.index, l.lastLocked(), l.base)
		}
		l.ents = append(l.ents[:r.index-l.base-1], ent{uint32(f.gen), r.pos, r.term})
	}
	l.written = f.start + end
	return nil
}

// dropBelowBase gives back the files in which no entry above the base lives.
func (l *Log) dropBelowBase() {
	used := map[uint32]bool{}
	for _, e := range l.ents {
		used[e.file] = true
	}
	keep := l.order[:0]
	for i, f := range l.order {
		if !used[uint32(f.gen)] && (f.last <= l.base || i < len(l.order)-1) {
			delete(l.files, uint32(f.gen))
			l.fill.free = append(l.fill.free, f)
			continue
		}
		keep = append(keep, f)
	}
	l.order = keep
}

// readIndex reads the index of a closed file; end, where its batches end, is 0 if the file was not closed.
func (l *Log) readIndex(f *logFile) (recs []idxEntry, batch uint64, end int64, err error) {
	t := make([]byte, trailerBytes)
	if _, err := f.f.ReadAt(t, f.size-blockBytes); err != nil {
		return nil, 0, 0, fmt.Errorf("raftlog: reading the trailer of %s: %w", f.name, err)
	}
	be := binary.BigEndian
	if string(t[:8]) != indexMagic || be.Uint32(t[44:]) != crcOf(t[:44]) || be.Uint64(t[8:]) != f.gen {
		return nil, 0, 0, nil
	}
	pos, n := int64(be.Uint64(t[16:])), int64(be.Uint64(t[24:]))
	if pos < blockBytes || n > (f.size-pos)/indexEntry {
		return nil, 0, 0, fmt.Errorf("%w: trailer of %s", ErrCorrupt, f.name)
	}
	b := make([]byte, n*indexEntry)
	if _, err := f.f.ReadAt(b, pos); err != nil {
		return nil, 0, 0, fmt.Errorf("raftlog: reading the index of %s: %w", f.name, err)
	}
	if be.Uint32(t[40:]) != crcOf(b) {
		// Index and trailer share one fsync: a crash within it may keep only the trailer. The batches were durable before; they are
		// scanned, and if the file is not the last one that holds records, loadFiles calls it corrupt.
		return nil, 0, 0, nil
	}
	recs = make([]idxEntry, n)
	for i := range recs {
		e := b[i*indexEntry:]
		recs[i] = idxEntry{be.Uint64(e), be.Uint64(e[8:]), be.Uint32(e[16:])}
	}
	return recs, be.Uint64(t[32:]), pos, nil
}

// closeFile writes a file's index and trailer: no batch is added to it any more.
func (l *Log) closeFile(f *logFile, end int64, recs []idxEntry, batch uint64) error {
	be := binary.BigEndian
	b := make([]byte, 0, len(recs)*indexEntry)
	for _, r := range recs {
		b = be.AppendUint64(b, r.index)
		b = be.AppendUint64(b, r.term)
		b = be.AppendUint32(b, r.pos)
	}
	t := append(make([]byte, 0, blockBytes), indexMagic...)
	t = be.AppendUint64(t, f.gen)
	t = be.AppendUint64(t, uint64(end))
	t = be.AppendUint64(t, uint64(len(recs)))
	t = be.AppendUint64(t, batch)
	t = be.AppendUint32(t, crcOf(b))
	t = be.AppendUint32(t, crcOf(t))
	l.writing.start()
	defer l.writing.end()
	if _, err := f.f.WriteAt(b, end); err != nil {
		return fmt.Errorf("writing the index of %s: %w", f.name, err)
	}
	if _, err := f.f.WriteAt(t[:blockBytes], f.size-blockBytes); err != nil {
		return fmt.Errorf("writing the trailer of %s: %w", f.name, err)
	}
	if err := f.f.Sync(); err != nil {
		return fmt.Errorf("syncing the index of %s: %w", f.name, err)
	}
	return nil
}

// scan reads the batches of a file that was not closed. It stops at the first batch that is not whole; end is where that begins.
func (l *Log) scan(f *logFile) (recs []idxEntry, batch uint64, end int64, err error) {
	data := make([]byte, f.size)
	if _, err := f.f.ReadAt(data, 0); err != nil {
		return nil, 0, 0, fmt.Errorf("raftlog: reading %s: %w", f.name, err)
	}
	pos := int64(blockBytes)
	for {
		got, n, num := scanBatch(data, pos, f.gen, l.cfg.Group, batch)
		if n == 0 {
			break
		}
		recs = append(recs, got...)
		batch, pos = num, pos+n
	}
	// What stands behind must be unwritten, of an older generation, or pieces of the one batch that was being written.
	for at := pos; at+recordHeader <= f.size; at += blockBytes {
		if h, ok := decodeRecord(data[at:]); ok && h.gen == f.gen && h.group == l.cfg.Group && int64(h.start)*blockBytes > pos {
			return nil, 0, 0, fmt.Errorf("%w: the batch in %s at %d is damaged, batch %d stands behind it at %d", ErrCorrupt, f.name, pos, h.batch, at)
		}
	}
	return recs, batch, pos, nil
}

// scanBatch reads the batch at pos; n is its length on disk, 0 if there is no whole batch.
func scanBatch(data []byte, pos int64, gen uint64, group uint32, before uint64) (recs []idxEntry, n int64, num uint64) {
	at := pos
	for at+recordHeader <= int64(len(data)) {
		h, ok := decodeRecord(data[at:])
		if !ok || h.gen != gen || h.group != group || int64(h.start)*blockBytes != pos || at+h.size() > int64(len(data)) {
			return nil, 0, 0
		}
		if len(recs) == 0 {
			if num = h.batch; before != 0 && num != before+1 {
				return nil, 0, 0
			}
		} else if h.batch != num || h.index != recs[len(recs)-1].index+1 {
			return nil, 0, 0
		}
		body := data[at+recordHeader : at+h.size()]
		if crcOf(body[:h.dataLen]) != h.dataCRC || crcOf(body[h.dataLen:]) != h.extCRC {
			return nil, 0, 0
		}
		recs = append(recs, idxEntry{h.index, h.term, uint32(at)})
		at += h.size()
		if h.flags&flagLast != 0 {
			return recs, alignUp(at - pos), num
		}
	}
	return nil, 0, 0
}
