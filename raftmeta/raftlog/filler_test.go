package raftlog

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// zeroFS sees how far the file in the making is.
type zeroFS struct {
	*memFS
	made atomic.Int64
}

type zeroFile struct {
	File
	fs *zeroFS
}

func (z *zeroFS) Create(name string) (File, error) {
	f, err := z.memFS.Create(name)
	return zeroFile{f, z}, err
}

func (f zeroFile) Pace(off int64) error {
	f.fs.made.Store(off + fillChunk)
	return f.File.Pace(off)
}

// A file is made while the one before it is used, not at once: fsyncs wait behind zeros. It is there in time, and at once for who waits for it.
func TestFilesAreMadeAtThePaceOfUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const file, step = 8 << 20, fillChunk + 8<<20/256 // a chunk, and what is lost to rounding
		fs := &zeroFS{memFS: newMemFS()}
		l := open(t, fs, func(c *Config) { c.FileBytes = file })
		index := uint64(0)
		write := func(n int) {
			index++
			store(t, l, command(index, 1, 5, n))
			synctest.Wait()
		}
		write(10)
		for l.cur.size < file || l.pos > file/16 {
			write(64 << 10)
		}
		for gen := l.cur.gen; l.pos < file*4/5 && l.cur.gen == gen; write(64 << 10) {
			made, most := fs.made.Load(), l.pos*5/4+file/16
			if made > most+step {
				t.Fatalf("%d bytes of the next file are made when %d of this one are used", made, l.pos)
			}
			if made < min(most-step, file) {
				t.Fatalf("only %d bytes of the next file are made when %d of this one are used", made, l.pos)
			}
		}
		if l.fill.next == nil {
			t.Fatalf("the next file is not there when %d of %d bytes are used", l.pos, file)
		}
		for gen := l.cur.gen; l.cur.gen == gen; {
			write(64 << 10)
		}
		done := make(chan error, 1)
		go func() { done <- l.StoreLogs([]*raft.Log{command(index+1, 1, 5, 2*file)}) }() // larger than any file, and the next has just been begun
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(time.Minute):
			t.Fatal("who waits for a file waits for ever")
		}
		if l.cur.size < 2*file {
			t.Errorf("a batch of %d bytes is in a file of %d", 2*file, l.cur.size)
		}
	})
}

// A disk that was full and has room again is noticed while nothing is written: records are refused until then.
func TestSpaceIsRegainedWithoutWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newMemFS()
		l := open(t, fs, func(c *Config) { c.FileBytes = 8 << 20 })
		store(t, l, command(1, 1, 5, 10))
		synctest.Wait()
		fs.mu.Lock()
		fs.space = 100 << 10 // not a chunk
		fs.mu.Unlock()
		for i := uint64(2); !l.NoSpace(); i++ {
			if l.pos > l.cur.size*3/4 {
				t.Fatal("the filler has not noticed that the disk is full")
			}
			store(t, l, command(i, 1, 5, 10_000))
			synctest.Wait()
		}
		fs.addSpace(64 << 20)
		for range 10 {
			time.Sleep(spaceRetry)
			synctest.Wait()
		}
		if l.NoSpace() {
			t.Error("the log still says that the disk is full")
		}
	})
}
