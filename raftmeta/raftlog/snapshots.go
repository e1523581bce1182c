package raftlog

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/estran/estran/localstack/planted"
	"github.com/hashicorp/raft"
)

const (
	snapMagic   = "ESTRNSNP"
	snapTrailer = 16
	snapMetaMax = 1 << 20
)

// ErrStale: a newer snapshot exists, or the state already contains the received one.
var ErrStale = errors.New("raftlog: stale snapshot")

// Snapshots is the snapshot store of a group, beside its log. A snapshot is installable once everything that was hot at its index has
// been sealed; only installable ones are shown to peers, and the log may be freed only up to the newest of them.
type Snapshots struct {
	fs  FS
	dir string
	log *Log

	mu      sync.Mutex
	snaps   []*snapshot // newest first
	seq     uint32
	install *pendingInstall
}

type snapshot struct {
	name        string
	meta        raft.SnapshotMeta
	installable bool
	c           uint64 // index at whose application it became installable
}

// pendingInstall is a snapshot that the transport is about to hand to raft.
type pendingInstall struct {
	index, term, c uint64
	applied        func() uint64
	refused        bool
}

// OpenSnapshots opens the store of log's directory, drops what a crash left half made, and finishes an install that a crash cut off.
func OpenSnapshots(l *Log) (*Snapshots, error) {
	s := &Snapshots{fs: l.fs, dir: l.path("snapshots"), log: l}
	if err := s.fs.MkdirAll(s.dir); err != nil {
		return nil, fmt.Errorf("raftlog: %w", err)
	}
	names, err := s.fs.List(s.dir)
	if err != nil {
		return nil, fmt.Errorf("raftlog: %w", err)
	}
	for _, n := range names {
		if strings.HasSuffix(n, ".tmp") {
			if err := s.fs.Remove(filepath.Join(s.dir, n)); err != nil {
				return nil, fmt.Errorf("raftlog: %w", err)
			}
			continue
		}
		if !strings.HasSuffix(n, ".snap") {
			continue
		}
		snap, err := s.readMeta(n)
		if err != nil {
			return nil, err
		}
		s.snaps = append(s.snaps, snap)
		var i, t uint64
		var seq uint32
		if _, err := fmt.Sscanf(n, "%016x-%016x-%08x.snap", &i, &t, &seq); err == nil {
			s.seq = max(s.seq, seq)
		}
	}
	s.sortLocked()
	if err := s.dropDamaged(); err != nil {
		return nil, err
	}
	if i := s.newestInstallableLocked(); i != nil && !l.Holds(i.meta.Index, i.meta.Term) {
		if err := l.Install(i.meta.Index, i.meta.Term); err != nil { // does nothing if the base is not below it
			return nil, err
		}
	}
	base, _ := l.Base()
	if base > 0 && (len(s.snaps) == 0 || s.snaps[0].meta.Index < base) {
		return nil, fmt.Errorf("%w: the log begins behind %d and no snapshot reaches that far: this node must rejoin as a new one", ErrCorrupt, base)
	}
	s.publishLocked()
	return s, nil
}

// dropDamaged removes snapshots whose state is not what was written, so that nothing is freed on the word of one. If none is left that the log goes on from, all stay as they are.
func (s *Snapshots) dropDamaged() error {
	base, _ := s.log.Base()
	var damaged []error
	left := s.snaps[:0:0]
	for _, x := range s.snaps {
		err := s.check(x.name)
		switch {
		case err == nil:
			left = append(left, x)
		case errors.Is(err, ErrCorrupt):
			damaged = append(damaged, err)
		default:
			return err
		}
	}
	if len(damaged) == 0 {
		return nil
	}
	if base > 0 && (len(left) == 0 || left[0].meta.Index < base) {
		return fmt.Errorf("%w; the log begins behind %d and no other snapshot reaches that far", errors.Join(damaged...), base)
	}
	s.log.log.Warn("snapshots are damaged, an older one or the log itself takes their place", "err", errors.Join(damaged...))
	for _, x := range s.snaps {
		if slices.Contains(left, x) {
			continue
		}
		if err := s.removeFiles(x.name); err != nil {
			return err
		}
	}
	s.snaps = left
	return nil
}

// check reads a snapshot whole.
func (s *Snapshots) check(name string) error {
	f, err := s.fs.Open(filepath.Join(s.dir, name))
	if err != nil {
		return fmt.Errorf("raftlog: %w", err)
	}
	_, _, _, err = checkSnapshot(f, name)
	return errors.Join(err, f.Close())
}

func (s *Snapshots) sortLocked() {
	slices.SortStableFunc(s.snaps, func(a, b *snapshot) int {
		if a.meta.Index != b.meta.Index {
			return int(int64(b.meta.Index) - int64(a.meta.Index))
		}
		return strings.Compare(b.name, a.name)
	})
}

// publishLocked tells the log what it may free and what it must not take for a truncation.
func (s *Snapshots) publishLocked() {
	if len(s.snaps) > 0 {
		s.log.SetSnapshot(s.snaps[0].meta.Index)
	}
	if i := s.newestInstallableLocked(); i != nil {
		s.log.Permit(i.meta.Index)
	}
}

func (s *Snapshots) newestInstallableLocked() *snapshot {
	for _, x := range s.snaps {
		if x.installable {
			return x
		}
	}
	return nil
}

// readMeta reads a snapshot's header and flag; the state is checked when it is opened.
func (s *Snapshots) readMeta(name string) (*snapshot, error) {
	f, err := s.fs.Open(filepath.Join(s.dir, name))
	if err != nil {
		return nil, fmt.Errorf("raftlog: %w", err)
	}
	defer f.Close()
	meta, _, err := readSnapHeader(f, name)
	if err != nil {
		return nil, err
	}
	snap := &snapshot{name: name, meta: meta}
	flag, err := s.fs.Open(filepath.Join(s.dir, name+".inst"))
	if errors.Is(err, os.ErrNotExist) {
		return snap, nil
	}
	if err != nil {
		return nil, fmt.Errorf("raftlog: %w", err)
	}
	defer flag.Close()
	b := make([]byte, 12)
	if _, err := flag.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("raftlog: %w", err)
	}
	if binary.BigEndian.Uint32(b[8:]) == crcOf(b[:8]) { // a torn flag is none: it is set again
		snap.installable, snap.c = true, binary.BigEndian.Uint64(b)
	}
	return snap, nil
}

func readSnapHeader(f File, name string) (meta raft.SnapshotMeta, end int64, err error) {
	be := binary.BigEndian
	h := make([]byte, 16)
	if _, err := f.ReadAt(h, 0); err != nil {
		return meta, 0, fmt.Errorf("%w: snapshot %s: %v", ErrCorrupt, name, err)
	}
	if string(h[:8]) != snapMagic {
		return meta, 0, fmt.Errorf("%w: snapshot %s has no magic", ErrCorrupt, name)
	}
	if v := be.Uint32(h[8:]); v != formatVersion {
		return meta, 0, fmt.Errorf("%w: snapshot %s of version %d", ErrVersion, name, v)
	}
	n := be.Uint32(h[12:])
	if n > snapMetaMax {
		return meta, 0, fmt.Errorf("%w: snapshot %s has a header of %d bytes", ErrCorrupt, name, n)
	}
	b := make([]byte, 16+int(n)+4)
	if _, err := f.ReadAt(b, 0); err != nil {
		return meta, 0, fmt.Errorf("%w: snapshot %s: %v", ErrCorrupt, name, err)
	}
	if be.Uint32(b[16+n:]) != crcOf(b[:16+n]) {
		return meta, 0, fmt.Errorf("%w: header of snapshot %s", ErrCorrupt, name)
	}
	if err := json.Unmarshal(b[16:16+n], &meta); err != nil {
		return meta, 0, fmt.Errorf("%w: header of snapshot %s: %v", ErrCorrupt, name, err)
	}
	return meta, int64(len(b)), nil
}

// Applied tells that the state has been applied up to index and that its oldest hot entry is oldest (or none: MaxUint64). It makes
// snapshots installable and lets the log free what is below them. A snapshot without room for its flag waits for the next call.
func (s *Snapshots) Applied(index, oldest uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := false
	for _, x := range s.snaps {
		if x.installable || !planted.On(planted.SnapshotShownEarly) && x.meta.Index >= oldest || x.meta.Index > index {
			continue
		}
		if err := s.flagLocked(x, index); full(err) {
			s.log.log.Warn("no room for a snapshot's flag, it waits", "snapshot", x.name, "err", err)
			continue // the next application tries again
		} else if err != nil {
			return err
		}
		changed = true
	}
	if changed {
		s.publishLocked()
		return s.reapLocked()
	}
	return nil
}

// Waiting reports whether a snapshot is not yet installable.
func (s *Snapshots) Waiting() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.snaps) > 0 && !s.snaps[0].installable
}

func (s *Snapshots) flagLocked(x *snapshot, c uint64) error {
	b := binary.BigEndian.AppendUint64(nil, c)
	b = binary.BigEndian.AppendUint32(b, crcOf(b))
	path := filepath.Join(s.dir, x.name+".inst")
	if err := s.fs.Remove(path + ".tmp"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("raftlog: %w", err)
	}
	f, err := s.fs.Create(path + ".tmp")
	if err != nil {
		return fmt.Errorf("raftlog: %w", err)
	}
	_, err = f.WriteAt(b, 0)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		if err = s.fs.Rename(path+".tmp", path); err == nil {
			err = s.fs.SyncDir(s.dir)
		}
	}
	if err != nil {
		return fmt.Errorf("raftlog: marking snapshot %s: %w", x.name, err)
	}
	x.installable, x.c = true, c
	return nil
}

// reapLocked keeps the newest snapshot, the newest installable one and the oldest that still waits.
func (s *Snapshots) reapLocked() error {
	inst := s.newestInstallableLocked()
	var waiting *snapshot
	for _, x := range s.snaps {
		if x == inst {
			break
		}
		waiting = x
	}
	keep := s.snaps[:0:0]
	for i, x := range s.snaps {
		if i == 0 || x == inst || x == waiting {
			keep = append(keep, x)
			continue
		}
		if err := s.removeFiles(x.name); err != nil {
			return err
		}
	}
	s.snaps = keep
	return nil
}

// removeFiles removes a snapshot and its flag.
func (s *Snapshots) removeFiles(name string) error {
	for _, n := range []string{name, name + ".inst"} {
		if err := s.fs.Remove(filepath.Join(s.dir, n)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("raftlog: %w", err)
		}
	}
	return nil
}

// InstallableAt is the index at whose application the snapshot (index, term) became installable; its own index if there is no such snapshot any more.
func (s *Snapshots) InstallableAt(index, term uint64) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.snaps {
		if x.meta.Index == index && x.meta.Term == term && x.installable {
			return x.c
		}
	}
	return index
}

// ExpectInstall announces that the transport hands raft the snapshot (index, term), installable since c. applied is asked on raft's
// main goroutine whether the state is already past it.
func (s *Snapshots) ExpectInstall(index, term, c uint64, applied func() uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.install = &pendingInstall{index: index, term: term, c: c, applied: applied}
}

// InstallRefused reports whether the announced install was stale: the transport then answers Success, since raft would resend for ever.
func (s *Snapshots) InstallRefused() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.install != nil && s.install.refused
}

// Store returns the raft.SnapshotStore for one raft instance: the first List is the node's own start and shows everything, later ones
// are on behalf of peers and show installable snapshots only.
func (s *Snapshots) Store() raft.SnapshotStore { return &snapshotView{Snapshots: s} }

// All returns the raft.SnapshotStore that shows everything: for BootstrapCluster and HasExistingState.
func (s *Snapshots) All() raft.SnapshotStore { return &snapshotView{Snapshots: s, all: true} }

type snapshotView struct {
	*Snapshots
	all     bool
	started bool
}

// List implements raft.SnapshotStore, newest first.
func (v *snapshotView) List() ([]*raft.SnapshotMeta, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	own := v.all || !v.started
	v.started = true
	var out []*raft.SnapshotMeta
	for _, x := range v.snaps {
		if own || x.installable {
			m := x.meta
			out = append(out, &m)
		}
	}
	return out, nil
}

// Open implements raft.SnapshotStore. The state's checksum is verified before the first byte is given out.
func (s *Snapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, err := s.fs.Open(filepath.Join(s.dir, id))
	if err != nil {
		return nil, nil, fmt.Errorf("raftlog: %w", err)
	}
	meta, size, at, err := checkSnapshot(f, id)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	meta.Size = size
	return &meta, &snapReader{io.NewSectionReader(f, at, size), f}, nil
}

type snapReader struct {
	io.Reader
	f File
}

func (r *snapReader) Close() error { return r.f.Close() }

func checkSnapshot(f File, name string) (meta raft.SnapshotMeta, size, at int64, err error) {
	meta, at, err = readSnapHeader(f, name)
	if err != nil {
		return meta, 0, 0, err
	}
	total, err := f.Size()
	if err != nil {
		return meta, 0, 0, fmt.Errorf("raftlog: %w", err)
	}
	t := make([]byte, snapTrailer)
	if total < at+snapTrailer {
		return meta, 0, 0, fmt.Errorf("%w: snapshot %s is cut short", ErrCorrupt, name)
	}
	if _, err := f.ReadAt(t, total-snapTrailer); err != nil {
		return meta, 0, 0, fmt.Errorf("raftlog: reading snapshot %s: %w", name, err)
	}
	be := binary.BigEndian
	size = int64(be.Uint64(t))
	if be.Uint32(t[12:]) != crcOf(t[:12]) || size != total-at-snapTrailer {
		return meta, 0, 0, fmt.Errorf("%w: trailer of snapshot %s", ErrCorrupt, name)
	}
	sum := &crcWriter{}
	if _, err := io.Copy(sum, io.NewSectionReader(f, at, size)); err != nil {
		return meta, 0, 0, fmt.Errorf("raftlog: reading snapshot %s: %w", name, err)
	}
	if sum.crc != be.Uint32(t[8:]) {
		return meta, 0, 0, fmt.Errorf("%w: state of snapshot %s", ErrCorrupt, name)
	}
	return meta, size, at, nil
}

// Create implements raft.SnapshotStore. For an announced install it decides, on raft's main goroutine, whether it is stale.
func (s *Snapshots) Create(v raft.SnapshotVersion, index, term uint64, conf raft.Configuration, confIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.install
	received := in != nil && in.index == index && in.term == term
	if received && (index <= in.applied() || s.log.Holds(index, term)) {
		in.refused = true
		return nil, ErrStale
	}
	s.seq++
	k := &sink{s: s, received: received}
	if received {
		k.c = in.c
	}
	k.meta = raft.SnapshotMeta{Version: v, Index: index, Term: term, Configuration: conf, ConfigurationIndex: confIndex}
	k.meta.ID = fmt.Sprintf("%016x-%016x-%08x.snap", index, term, s.seq)
	f, err := s.fs.Create(filepath.Join(s.dir, k.meta.ID+".tmp"))
	if err != nil {
		return nil, fmt.Errorf("raftlog: %w", err)
	}
	k.f = f
	return k, k.writeHeader()
}

// sink writes one snapshot.
type sink struct {
	s        *Snapshots
	meta     raft.SnapshotMeta
	f        File
	at       int64
	size     int64
	crc      crcWriter
	received bool
	c        uint64
	done     bool
}

type crcWriter struct{ crc uint32 }

func (w *crcWriter) Write(p []byte) (int, error) {
	w.crc = crcUpdate(w.crc, p)
	return len(p), nil
}

func (k *sink) writeHeader() error {
	meta, err := json.Marshal(k.meta)
	if err != nil {
		return err
	}
	b := bytes.NewBufferString(snapMagic)
	be := binary.BigEndian
	h := be.AppendUint32(b.Bytes(), formatVersion)
	h = be.AppendUint32(h, uint32(len(meta)))
	h = append(h, meta...)
	h = be.AppendUint32(h, crcOf(h))
	_, err = k.f.WriteAt(h, 0)
	k.at = int64(len(h))
	return err
}

// ID implements raft.SnapshotSink.
func (k *sink) ID() string { return k.meta.ID }

// Write implements raft.SnapshotSink.
func (k *sink) Write(p []byte) (int, error) {
	n, err := k.f.WriteAt(p, k.at+k.size)
	k.size += int64(n)
	_, _ = k.crc.Write(p[:n]) // never fails
	return n, err
}

// Cancel implements raft.SnapshotSink.
func (k *sink) Cancel() error {
	if k.done {
		return nil
	}
	k.done = true
	return errors.Join(k.f.Close(), k.s.fs.Remove(k.path()+".tmp"))
}

func (k *sink) path() string { return filepath.Join(k.s.dir, k.meta.ID) }

// Close implements raft.SnapshotSink: the snapshot is durable when it returns, and a received one has become the log's base.
func (k *sink) Close() error {
	if k.done {
		return nil
	}
	s := k.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if !k.received && len(s.snaps) > 0 && s.snaps[0].meta.Index > k.meta.Index {
		return errors.Join(ErrStale, k.Cancel()) // raft must not move its last snapshot back
	}
	k.done = true
	if err := k.finish(); err != nil {
		return fmt.Errorf("raftlog: snapshot %s: %w", k.meta.ID, err)
	}
	x := &snapshot{name: k.meta.ID, meta: k.meta}
	x.meta.Size = k.size
	for _, old := range s.snaps {
		if old.meta.Index == k.meta.Index && old.installable && !k.received {
			if err := s.flagLocked(x, old.c); err != nil { // a new snapshot of an index inherits its flag
				return err
			}
		}
	}
	if k.received {
		if err := s.flagLocked(x, k.c); err != nil {
			return err
		}
		if err := s.log.Install(k.meta.Index, k.meta.Term); err != nil {
			return err
		}
	}
	s.snaps = append(s.snaps, x)
	s.sortLocked()
	s.publishLocked()
	return s.reapLocked()
}

func (k *sink) finish() error {
	be := binary.BigEndian
	t := be.AppendUint64(nil, uint64(k.size))
	t = be.AppendUint32(t, k.crc.crc)
	t = be.AppendUint32(t, crcOf(t))
	_, err := k.f.WriteAt(t, k.at+k.size)
	if err == nil {
		err = k.f.Sync()
	}
	if err = errors.Join(err, k.f.Close()); err != nil {
		return err
	}
	if err := k.s.fs.Rename(k.path()+".tmp", k.path()); err != nil {
		return err
	}
	return k.s.fs.SyncDir(k.s.dir)
}
