package raftlog

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Sizes of files: the first is small so that a start waits for nothing, then they double.
const (
	firstFileBytes = 1 << 20
	reserveMax     = 8 << 20
	fillChunk      = 1 << 20
	spaceRetry     = time.Second
)

// filler makes log files in advance, in the background: written with zeros, or recycled. A file that it hands out is durable with its
// header, so taking it costs nothing.
type filler struct {
	l       *Log
	mu      sync.Mutex
	cond    *sync.Cond
	next    *logFile // ready
	want    int64    // size that a waiting taker needs
	free    []*logFile
	gen     uint64 // last generation given out
	size    int64  // of the next file to make
	err     error
	noSpace atomic.Bool
}

func (p *filler) init(l *Log) { p.l, p.cond = l, sync.NewCond(&p.mu) }

func (p *filler) wake() {
	p.mu.Lock()
	p.cond.Broadcast()
	p.mu.Unlock()
}

// take returns the next file, of at least need bytes. It waits while there is no space on the disk.
func (p *filler) take(need int64, stop <-chan struct{}) (*logFile, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.want = need
	for {
		select {
		case <-stop:
			return nil, ErrClosed
		default:
		}
		if p.err != nil {
			return nil, p.err
		}
		if f := p.next; f != nil {
			if f.size >= need {
				p.next, p.want = nil, 0
				p.cond.Broadcast()
				return f, nil
			}
			p.next = nil // too small for this batch: it goes back, a larger one is made
			p.free = append(p.free, f)
		}
		p.cond.Broadcast()
		p.cond.Wait()
	}
}

// recycle gives a freed file back.
func (p *filler) recycle(f *logFile) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if stopped(p.l.stop) {
		_ = f.f.Close() // the last reader after Close
		return
	}
	p.free = append(p.free, f)
	p.cond.Broadcast()
}

// run is the filler's goroutine.
func (p *filler) run(stop <-chan struct{}) {
	for {
		p.mu.Lock()
		for p.next != nil && len(p.free) <= 1 && !stopped(stop) {
			p.cond.Wait()
		}
		if stopped(stop) {
			p.cond.Broadcast()
			p.mu.Unlock()
			return
		}
		if p.next != nil { // enough is ready: what was freed beyond one file goes
			f := p.free[0]
			p.free = p.free[1:]
			p.mu.Unlock()
			p.drop(f)
			continue
		}
		size := max(p.size, alignUp(p.want))
		old := p.pickLocked(size)
		p.gen++
		gen := p.gen
		p.mu.Unlock()
		f, err := p.make(gen, size, old)
		p.mu.Lock()
		switch {
		case err == nil:
			p.next, p.size = f, min(max(p.size, firstFileBytes)*2, p.l.cfg.FileBytes)
			if p.noSpace.Swap(false) {
				p.l.log.Info("disk has space again", "dir", p.l.cfg.Dir)
				if err := p.reserve(); err != nil {
					p.l.log.Warn("cannot make the reserve again", "err", err)
				}
			}
		case errors.Is(err, syscall.ENOSPC):
			p.mu.Unlock()
			p.starve(stop)
			p.mu.Lock()
		default:
			p.err = err
		}
		p.cond.Broadcast()
		p.mu.Unlock()
		if err != nil && !errors.Is(err, syscall.ENOSPC) {
			return
		}
	}
}

func stopped(stop <-chan struct{}) bool {
	select {
	case <-stop:
		return true
	default:
		return false
	}
}

// pickLocked takes a free file of at least size bytes.
func (p *filler) pickLocked(size int64) *logFile {
	for i, f := range p.free {
		if f.size >= size {
			p.free = append(p.free[:i], p.free[i+1:]...)
			return f
		}
	}
	return nil
}

// drop removes a file from the disk.
func (p *filler) drop(f *logFile) {
	err := errors.Join(f.f.Close(), p.l.fs.Remove(f.name))
	if err != nil {
		p.l.log.Warn("cannot remove a freed log file", "file", f.name, "err", err)
	}
}

// make writes a file in advance or takes an old one, and gives it the header of generation gen.
func (p *filler) make(gen uint64, size int64, old *logFile) (*logFile, error) {
	fs, dir := p.l.fs, p.l.cfg.Dir
	name := p.l.path(fmt.Sprintf("%016x.log", gen))
	var f File
	var err error
	if old != nil {
		f, size = old.f, old.size
		if _, err = f.WriteAt(encodeFileHeader(p.l.cfg.Group, gen, size), 0); err == nil {
			if err = f.Sync(); err == nil {
				err = fs.Rename(old.name, name)
			}
		}
	} else {
		if f, err = fs.Create(name); err == nil {
			err = zeroFill(f, size)
		}
		if err == nil {
			err = f.Sync() // a valid header must mean that the whole file is there
		}
		if err == nil {
			if _, err = f.WriteAt(encodeFileHeader(p.l.cfg.Group, gen, size), 0); err == nil {
				err = f.Sync()
			}
		}
	}
	if err == nil {
		err = fs.SyncDir(dir)
	}
	if err != nil {
		if f != nil {
			err = errors.Join(fmt.Errorf("raftlog: making %s: %w", name, err), f.Close())
			if old == nil {
				_ = fs.Remove(name) // a leftover is recognised at the next open
			}
		}
		return nil, err
	}
	return &logFile{gen: gen, name: name, f: f, size: size}, nil
}

func zeroFill(f File, size int64) error {
	chunk := make([]byte, min(fillChunk, size))
	for off := int64(0); off < size; off += int64(len(chunk)) {
		if _, err := f.WriteAt(chunk[:min(int64(len(chunk)), size-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// starve is called when the disk is full: the reserve is given back and the free budget is 0 until a file can be made.
func (p *filler) starve(stop <-chan struct{}) {
	if !p.noSpace.Swap(true) {
		p.l.log.Error("disk full: no new log file can be made, records are refused until there is space", "dir", p.l.cfg.Dir)
		if err := p.l.fs.Remove(p.l.path("reserve")); err != nil && !errors.Is(err, os.ErrNotExist) {
			p.l.log.Warn("cannot release the reserve", "err", err)
		}
	}
	select {
	case <-time.After(spaceRetry):
	case <-stop:
	}
}

// reserve makes the file whose space a full disk gives back. Without space for it the log still opens.
func (p *filler) reserve() error {
	f, err := p.l.fs.Create(p.l.path("reserve"))
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err == nil {
		err = errors.Join(zeroFill(f, min(reserveMax, p.l.cfg.FileBytes/8)), f.Close())
	}
	if errors.Is(err, syscall.ENOSPC) {
		p.noSpace.Store(true)
		_ = p.l.fs.Remove(p.l.path("reserve")) // half of it would be of no use
		return nil
	}
	return err
}

func (p *filler) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	if p.next != nil {
		errs = append(errs, p.next.f.Close())
	}
	for _, f := range p.free {
		errs = append(errs, f.f.Close())
	}
	p.next, p.free = nil, nil
	return errors.Join(errs...)
}
