package raftlog

import (
	"errors"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// gateFS lets a test hold a file operation, outside every lock of the file system below.
type gateFS struct {
	*memFS
	gate atomic.Pointer[func(op, name string)]
}

type gateFile struct {
	File
	name string
	fs   *gateFS
}

func newGateFS() *gateFS { return &gateFS{memFS: newMemFS()} }

func (g *gateFS) set(gate func(op, name string)) { g.gate.Store(&gate) }

func (g *gateFS) pass(op, name string) {
	if gate := g.gate.Load(); gate != nil {
		(*gate)(op, filepath.Base(name))
	}
}

func (g *gateFS) Create(name string) (File, error) {
	g.pass("create", name)
	f, err := g.memFS.Create(name)
	return &gateFile{f, name, g}, err
}

func (g *gateFS) Open(name string) (File, error) {
	f, err := g.memFS.Open(name)
	return &gateFile{f, name, g}, err
}

func (f *gateFile) WriteAt(p []byte, off int64) (int, error) {
	f.fs.pass("write", f.name)
	return f.File.WriteAt(p, off)
}

func (f *gateFile) WriteVec(bufs [][]byte, off int64) error {
	f.fs.pass("write", f.name)
	return f.File.WriteVec(bufs, off)
}

func (f *gateFile) Sync() error {
	f.fs.pass("sync", f.name)
	return f.File.Sync()
}

const hangTimeout = 8 * time.Second

// openWatched opens a log whose OnFatal is the channel told.
func openWatched(t *testing.T, fs FS) (l *Log, told chan error) {
	told = make(chan error, 2)
	return open(t, fs, func(c *Config) { c.HangTimeout, c.OnFatal = hangTimeout, func(err error) { told <- err } }), told
}

// wantHung waits, in the bubble's time, for the one ErrHung that a node is told.
func wantHung(t *testing.T, told <-chan error) {
	t.Helper()
	select {
	case err := <-told:
		if !errors.Is(err, ErrHung) {
			t.Errorf("told %v", err)
		}
	case <-time.After(2 * hangTimeout):
		t.Error("nobody was told that the disk hangs")
	}
	wantQuiet(t, told)
}

func wantQuiet(t *testing.T, told <-chan error) {
	t.Helper()
	select {
	case err := <-told:
		t.Errorf("told %v", err)
	case <-time.After(10 * hangTimeout):
	}
}

// A write or an fsync of an entry never returns: the node is told, once, and readers go on meanwhile.
func TestHungDisk(t *testing.T) {
	for _, op := range []string{"write", "sync"} {
		t.Run(op, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fs := newGateFS()
				l, told := openWatched(t, fs)
				store(t, l, command(1, 1, 1, 10))
				disk, current := make(chan struct{}), filepath.Base(l.cur.name)
				fs.set(func(o, name string) {
					if o == op && name == current {
						<-disk
					}
				})
				stored := make(chan error, 1)
				go func() { stored <- l.StoreLog(command(2, 1, 1, 10)) }()
				wantHung(t, told)
				if l.Stalled() <= hangTimeout {
					t.Errorf("stalled for %s", l.Stalled())
				}
				same(t, l, command(1, 1, 1, 10))
				close(disk)
				if err := <-stored; err != nil {
					t.Error(err)
				}
				if l.Stalled() != 0 {
					t.Errorf("stalled for %s after the write", l.Stalled())
				}
				same(t, l, command(2, 1, 1, 10))
			})
		})
	}
}

// Slow is not hung: many operations, each of them shorter than the timeout.
func TestSlowDiskIsNotHung(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newGateFS()
		l, told := openWatched(t, fs)
		store(t, l, command(1, 1, 1, 10))
		current := filepath.Base(l.cur.name)
		fs.set(func(op, name string) {
			if op == "sync" && name == current {
				time.Sleep(hangTimeout - time.Millisecond)
			}
		})
		for i := uint64(2); i < 12; i++ {
			store(t, l, command(i, 1, 1, 10))
		}
		wantQuiet(t, told)
	})
}

// fillFile stores entries until the next one of this size needs another file, and returns its index.
func fillFile(t *testing.T, l *Log, payload int) uint64 {
	next, size := uint64(1), alignUp(recordHeader+HeaderBytes+1+int64(payload))
	for l.cur == nil || l.pos+size+alignUp(int64(len(l.recs)+1)*indexEntry)+blockBytes <= l.cur.size {
		store(t, l, command(next, 1, 1, payload))
		next++
	}
	return next
}

// The disk hangs while the next file is being made and a write waits for it: that write hangs too.
func TestHungWhileAFileIsMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newGateFS()
		disk := make(chan struct{})
		l, told := openWatched(t, fs)
		fs.set(func(op, name string) {
			if op == "sync" && name == "0000000000000002.log" {
				<-disk
			}
		})
		next := fillFile(t, l, 50_000)
		wantQuiet(t, told) // nobody needs the file yet
		stored := make(chan error, 1)
		go func() { stored <- l.StoreLog(command(next, 1, 1, 50_000)) }()
		wantHung(t, told)
		if l.Stalled() <= hangTimeout {
			t.Errorf("stalled for %s", l.Stalled())
		}
		close(disk)
		if err := <-stored; err != nil {
			t.Error(err)
		}
		same(t, l, command(next, 1, 1, 50_000))
	})
}

// A disk that was full for long has not hung: the write that goes on when there is space again begins then.
func TestFullDiskIsNotHung(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newGateFS()
		fs.space = 8<<10 + 32<<10 + 256<<10 // base, reserve, one file
		l, told := openWatched(t, fs)
		next := fillFile(t, l, 50_000)
		stored := make(chan error, 1)
		go func() { stored <- l.StoreLog(command(next, 1, 1, 50_000)) }()
		time.Sleep(10 * hangTimeout)
		if !l.NoSpace() || l.Stalled() != 0 {
			t.Errorf("no space %v, stalled %s", l.NoSpace(), l.Stalled())
		}
		fs.set(func(op, name string) { // long enough for the watchdog to look
			if op == "sync" {
				time.Sleep(hangTimeout - time.Millisecond)
			}
		})
		fs.addSpace(4 << 20)
		if err := <-stored; err != nil {
			t.Error(err)
		}
		wantQuiet(t, told)
	})
}

// The disk is full when the log opens; first there is room for a file, later for the reserve too. Records are taken again only then, and without anybody's doing.
func TestNoSpaceEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newMemFS()
		fs.space = 8 << 10 // base
		l := open(t, fs, nil)
		time.Sleep(10 * time.Second)
		if !l.NoSpace() {
			t.Fatal("there is space for a file")
		}
		fs.addSpace(256<<10 + 16<<10)
		time.Sleep(10 * time.Second)
		if !l.NoSpace() {
			t.Error("there is space for the reserve")
		}
		fs.addSpace(1 << 20)
		time.Sleep(10 * time.Second)
		if l.NoSpace() {
			t.Error("still no space")
		}
		if _, err := fs.Open("/log/reserve"); err != nil {
			t.Error(err)
		}
		store(t, l, command(1, 1, 1, 10))
		if l.Poisoned() != nil {
			t.Error(l.Poisoned())
		}
	})
}

// Running out of a quota is running out of space.
func TestQuotaIsNoPoison(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newMemFS()
		fs.fullErr = syscall.EDQUOT
		fs.space = 8 << 10
		l := open(t, fs, nil)
		time.Sleep(10 * time.Second)
		if !l.NoSpace() || l.Poisoned() != nil {
			t.Errorf("no space %v, poisoned: %v", l.NoSpace(), l.Poisoned())
		}
		fs.addSpace(4 << 20)
		store(t, l, command(1, 1, 1, 10))
	})
}

// What is always admitted still finds room on a full disk: the reserve's, in small files.
func TestReserveServesEntriesOnAFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newMemFS()
		fs.space = 8<<10 + 1<<20 + 1<<20 + 100_000 // base, reserve, the first file; too little for the second
		l := open(t, fs, func(c *Config) { c.FileBytes = 8 << 20 })
		next := fillFile(t, l, 50_000)
		synctest.Wait()
		if !l.NoSpace() {
			t.Fatal("there is space")
		}
		stored := make(chan error, 1)
		go func() { stored <- l.StoreLog(command(next, 1, 1, 50_000)) }()
		select {
		case err := <-stored:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(time.Minute):
			t.Fatal("an entry found no room")
		}
		same(t, l, command(next, 1, 1, 50_000))
		if !l.NoSpace() {
			t.Error("the reserve is used and there is space again")
		}
	})
}

// What is kept as a cache only is given up when the disk is full.
func TestCacheGivesWayOnAFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newMemFS()
		fs.space = 8<<10 + 32<<10 + 4*256<<10 // base, reserve, four files
		l := open(t, fs, func(c *Config) { c.LocalRetention = 1 << 30 })
		for i := uint64(1); i <= 200; i++ { // 10 MB
			store(t, l, command(i, 1, 1, 50_000))
			l.Permit(i)
		}
		if base, _ := l.Base(); base < 150 {
			t.Errorf("base %d", base)
		}
		same(t, l, command(200, 1, 1, 50_000))
		time.Sleep(10 * time.Second)
		if l.NoSpace() {
			t.Error("no space with everything freed")
		}
	})
}

// A write waits for room; what makes room is the log's own freeing. So the wait must hold nothing that freeing needs.
func TestFreeingServesAWaitingWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newMemFS()
		fs.space = 8<<10 + 32<<10 + 4*256<<10 // base, reserve, four files
		l := open(t, fs, nil)
		var last atomic.Uint64
		stored := make(chan error, 1)
		go func() {
			for i := uint64(1); i <= 100; i++ {
				if err := l.StoreLog(command(i, 1, 1, 50_000)); err != nil {
					stored <- err
					return
				}
				last.Store(i)
			}
			stored <- nil
		}()
		time.Sleep(time.Minute)
		if !l.NoSpace() {
			t.Fatal("there is space")
		}
		for {
			before := last.Load()
			l.Permit(before)
			select {
			case err := <-stored:
				if err != nil {
					t.Error(err)
				}
				same(t, l, command(100, 1, 1, 50_000))
				return
			case <-time.After(time.Minute):
			}
			if last.Load() == before {
				t.Fatalf("stuck behind entry %d", before)
			}
		}
	})
}

// The small records hang too: the base, when the log is freed, and a vote, for which raft waits.
func TestHungRecords(t *testing.T) {
	for _, name := range []string{"base", "stable"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fs := newGateFS()
				l, told := openWatched(t, fs)
				s, err := OpenStable(fs, "/log", nil)
				if err != nil {
					t.Fatal(err)
				}
				l.WatchStable(s)
				for i := uint64(1); i <= 30; i++ {
					store(t, l, command(i, 1, 1, 50_000))
				}
				disk := make(chan struct{})
				fs.set(func(op, n string) {
					if op == "sync" && n == name+".tmp" { // as it was made
						<-disk
					}
				})
				set := make(chan error, 1)
				if name == "stable" {
					go func() { set <- s.SetUint64([]byte(keyCurrentTerm), 7) }()
				} else {
					l.Permit(30)
					set <- nil
				}
				wantHung(t, told)
				close(disk)
				if err := <-set; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// Without room for a snapshot's flag the snapshot waits: the node does not stop for it.
func TestNoRoomForAFlag(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newMemFS()
		l := open(t, fs, nil)
		store(t, l, command(1, 1, 1, 10), command(2, 1, 1, 10))
		s, err := OpenSnapshots(l)
		if err != nil {
			t.Fatal(err)
		}
		if err := writeSnapshot(t, s.Store(), 1, 1, "state"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the filler is at rest
		fs.mu.Lock()
		fs.space = 0
		fs.mu.Unlock()
		if err := s.Applied(2, 2); err != nil || !s.Waiting() {
			t.Errorf("applied: %v, waiting %v", err, s.Waiting())
		}
		fs.addSpace(1 << 20)
		if err := s.Applied(2, 2); err != nil || s.Waiting() {
			t.Errorf("with space again: %v, waiting %v", err, s.Waiting())
		}
	})
}

// What a peer holds is freed when its time is over, though nothing else happens.
func TestHoldEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, newMemFS(), nil)
		for i := uint64(1); i <= 100; i++ {
			store(t, l, command(i, 1, 5, 20_000))
		}
		l.HoldAt("peer", 40, time.Now().Add(time.Minute))
		l.Permit(100)
		synctest.Wait()
		if b, _ := l.Base(); b > 40 {
			t.Errorf("base %d with a peer at 40", b)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if b, _ := l.Base(); b < 80 {
			t.Errorf("base %d after the peer's time is over", b)
		}
	})
}
