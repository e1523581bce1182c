package raftlog

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// memFS is a file system in memory that knows which bytes are durable. A crash keeps a random part of what was not synced: sectors of
// data one by one, names as a prefix of the operations. It can fail or crash at the n-th operation that changes something.
type memFS struct {
	mu      sync.Mutex
	files   map[string]*memInode
	dirs    map[string]bool
	durable map[string]*memInode // names as of the last SyncDir
	pending []func(map[string]*memInode)
	ops     int
	failAt  int // 0 = never
	failErr error
	dead    bool
	space   int64 // bytes left; < 0 = no limit
	fullErr error // what a write without space gives
	trace   func(op string)
}

type memInode struct {
	data    []byte // what readers see
	durable []byte
	dirty   map[int64]bool // sectors written since the last sync
}

const sector = 512

var errCrashed = errors.New("crashed")

func newMemFS() *memFS {
	return &memFS{files: map[string]*memInode{}, dirs: map[string]bool{}, durable: map[string]*memInode{}, space: -1, fullErr: syscall.ENOSPC}
}

// step counts an operation and fails it if its turn has come.
func (m *memFS) step(op string) error {
	if m.dead {
		return errCrashed
	}
	m.ops++
	if m.trace != nil {
		m.trace(op)
	}
	if m.failAt > 0 && m.ops >= m.failAt {
		if m.failErr == nil {
			m.dead = true
			return errCrashed
		}
		if m.ops == m.failAt {
			return m.failErr
		}
	}
	return nil
}

// addSpace makes room on a disk with a limit.
func (m *memFS) addSpace(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.space += n
}

// crash returns what a machine would find after a power cut now.
func (m *memFS) crash(rng *rand.Rand) *memFS {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dead = true
	n := newMemFS()
	for d := range m.dirs {
		n.dirs[d] = true
	}
	names := map[string]*memInode{}
	for k, v := range m.durable {
		names[k] = v
	}
	if len(m.pending) > 0 {
		for _, f := range m.pending[:rng.IntN(len(m.pending)+1)] {
			f(names)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) { // in order: one seed, one crash
		ino := names[name]
		c := &memInode{data: slices.Clone(ino.durable), dirty: map[int64]bool{}}
		for _, s := range slices.Sorted(maps.Keys(ino.dirty)) {
			if rng.IntN(2) == 0 {
				continue
			}
			end := min((s+1)*sector, int64(len(ino.data)))
			for int64(len(c.data)) < end {
				c.data = append(c.data, 0)
			}
			copy(c.data[s*sector:end], ino.data[s*sector:end])
		}
		c.durable = slices.Clone(c.data)
		n.files[name], n.durable[name] = c, c
	}
	return n
}

func (m *memFS) MkdirAll(dir string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dirs[dir] = true
	return nil
}

func (m *memFS) Create(name string) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.step("create " + filepath.Base(name)); err != nil {
		return nil, err
	}
	if m.files[name] != nil {
		return nil, fmt.Errorf("%s: %w", name, os.ErrExist)
	}
	ino := &memInode{dirty: map[int64]bool{}}
	m.files[name] = ino
	m.pending = append(m.pending, func(d map[string]*memInode) { d[name] = ino })
	return &memFile{m, ino, name}, nil
}

func (m *memFS) Open(name string) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ino := m.files[name]
	if ino == nil {
		return nil, fmt.Errorf("%s: %w", name, os.ErrNotExist)
	}
	return &memFile{m, ino, name}, nil
}

func (m *memFS) Rename(from, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.step("rename " + filepath.Base(from) + " " + filepath.Base(to)); err != nil {
		return err
	}
	ino := m.files[from]
	if ino == nil {
		return fmt.Errorf("%s: %w", from, os.ErrNotExist)
	}
	delete(m.files, from)
	m.files[to] = ino
	m.pending = append(m.pending, func(d map[string]*memInode) { delete(d, from); d[to] = ino })
	return nil
}

func (m *memFS) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	ino := m.files[name]
	if ino == nil {
		return fmt.Errorf("%s: %w", name, os.ErrNotExist)
	}
	if err := m.step("remove " + filepath.Base(name)); err != nil {
		return err
	}
	if m.space >= 0 {
		m.space += int64(len(ino.data))
	}
	delete(m.files, name)
	m.pending = append(m.pending, func(d map[string]*memInode) { delete(d, name) })
	return nil
}

func (m *memFS) List(dir string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for n := range m.files {
		if rest, ok := strings.CutPrefix(n, dir+"/"); ok && !strings.Contains(rest, "/") {
			out = append(out, rest)
		}
	}
	slices.Sort(out)
	return out, nil
}

func (m *memFS) SyncDir(dir string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.step("syncdir " + filepath.Base(dir)); err != nil {
		return err
	}
	for _, f := range m.pending {
		f(m.durable)
	}
	m.pending = nil
	return nil
}

type memFile struct {
	m    *memFS
	ino  *memInode
	name string
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if off >= int64(len(f.ino.data)) {
		return 0, io.EOF
	}
	n := copy(p, f.ino.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.WriteVec([][]byte{p}, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (f *memFile) WriteVec(bufs [][]byte, off int64) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	stepErr := f.m.step(fmt.Sprintf("write %s %d", filepath.Base(f.name), off))
	if stepErr != nil && !errors.Is(stepErr, errCrashed) {
		return stepErr // an injected error has no effect; a crash leaves a part of the write
	}
	for _, b := range bufs {
		end := off + int64(len(b))
		if grow := end - int64(len(f.ino.data)); grow > 0 {
			if f.m.space >= 0 {
				if f.m.space -= grow; f.m.space < 0 {
					f.m.space += grow
					return f.m.fullErr
				}
			}
			f.ino.data = append(f.ino.data, make([]byte, grow)...)
		}
		copy(f.ino.data[off:], b)
		for s := off / sector; s*sector < end; s++ {
			f.ino.dirty[s] = true
		}
		off = end
	}
	return stepErr
}

func (f *memFile) Sync() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.m.step("sync " + filepath.Base(f.name)); err != nil {
		return err
	}
	if grow := len(f.ino.data) - len(f.ino.durable); grow > 0 {
		f.ino.durable = append(f.ino.durable, make([]byte, grow)...)
	}
	for s := range f.ino.dirty {
		end := min((s+1)*sector, int64(len(f.ino.data)))
		copy(f.ino.durable[s*sector:end], f.ino.data[s*sector:end])
	}
	clear(f.ino.dirty)
	return nil
}

func (f *memFile) Size() (int64, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return int64(len(f.ino.data)), nil
}

func (f *memFile) Close() error { return nil }

// Pace makes nothing durable: a crash behind it loses what one before it loses.
func (f *memFile) Pace(int64) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return f.m.step("pace " + filepath.Base(f.name))
}
