package raftlog

import (
	"fmt"
	"os"
	"sync"
	"time"
)

// writerEnv makes the test program a writer process: "DIRECTORY TERM MODE". It writes until it is killed, and says on its standard output
// what has been acknowledged.
const writerEnv = "ESTRAN_RAFTLOG_WRITER"

// entryOf is the writer's entry: all of it follows from index and term.
func entryOf(index, term uint64) (dir, payload int) {
	return int(index % 97), int(index * 7919 % 60_000)
}

// lazyFS is a file system whose fsync does nothing.
type lazyFS struct{ FS }

type lazyFile struct{ File }

func (f lazyFS) Create(name string) (File, error) { return lazy(f.FS.Create(name)) }
func (f lazyFS) Open(name string) (File, error)   { return lazy(f.FS.Open(name)) }
func (lazyFS) SyncDir(string) error               { return nil }
func (lazyFile) Sync() error                      { return nil }

func lazy(f File, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	return lazyFile{f}, nil
}

// The writer's modes.
const (
	writeAndFree = "free"  // frees behind itself
	writeLazily  = "lazy"  // never syncs
	writeToFull  = "whole" // frees nothing
)

func writer(spec string) error {
	var dir, mode string
	var term uint64
	if _, err := fmt.Sscan(spec, &dir, &term, &mode); err != nil {
		return fmt.Errorf("%s=%q: %w", writerEnv, spec, err)
	}
	var mu sync.Mutex
	say := func(what string, n uint64) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintln(os.Stdout, what, n)
	}
	cfg := Config{Dir: dir, Group: 7, FileBytes: 4 << 20, TailBytes: 1 << 20}
	if mode == writeLazily {
		cfg.FS = lazyFS{OS{}}
	}
	l, err := Open(cfg)
	if err != nil {
		return err
	}
	last, _ := l.LastIndex()
	say("open", last)
	go func() {
		for was := false; ; time.Sleep(time.Millisecond) { // polling a state that has no event
			now := l.NoSpace()
			if now && !was {
				say("full", 0)
			}
			if was && !now {
				say("space", 0)
			}
			was = now
		}
	}()
	for i := last + 1; ; i++ {
		d, p := entryOf(i, term)
		if err := l.StoreLog(command(i, term, d, p)); err != nil {
			return err
		}
		say("acked", i)
		if mode == writeAndFree && i > 100 {
			l.Permit(i - 100)
		}
	}
}
