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
	fillChunk      = 256 << 10
	spaceRetry     = time.Second
)

// A file is made at the pace at which the one before it is used, so that a busy disk is never asked for many zeros at once: fsyncs wait behind them. Shares are in 1024ths of a
// file; the one in the making is at most a quarter and fillAhead ahead, so it is there when three quarters of the other are used.
const (
	whole     = 1024
	fillAhead = whole / 16
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
	noSpace atomic.Bool // there is no room for a file, or none for the reserve

	used   atomic.Int64 // share of the file that is written to; whole while there is none
	resume atomic.Int64 // share at which the filler, which rests, goes on; more than whole while it does not rest

	waiting stopwatch // a taker
	busy    stopwatch // the filler's operation in flight
}

func (p *filler) init(l *Log) {
	p.l, p.cond = l, sync.NewCond(&p.mu)
	p.used.Store(whole)
	p.resume.Store(whole + 1)
}

// advance says how far the file that is written to has been used.
func (p *filler) advance(pos, size int64) {
	p.used.Store(share(pos, size))
	if p.used.Load() >= p.resume.Load() {
		p.wake()
	}
}

func share(pos, size int64) int64 { return pos * whole / size }

// keepPace returns when the file in the making, of size bytes, may be written to at off. It does so at once if somebody waits for the file, or if records are refused until it is there.
func (p *filler) keepPace(off, size int64, stop <-chan struct{}) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resume.Store((share(off, size) - fillAhead) * 4 / 5)
	defer p.resume.Store(whole + 1)
	for p.want == 0 && !p.noSpace.Load() && p.used.Load() < p.resume.Load() && !stopped(stop) {
		p.cond.Wait()
	}
	if stopped(stop) {
		return ErrClosed
	}
	return nil
}

func (p *filler) wake() {
	p.mu.Lock()
	p.cond.Broadcast()
	p.mu.Unlock()
}

// take returns the next file if there is one of at least need bytes, else nil: the caller awaits it.
func (p *filler) take(need int64) (*logFile, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.next
	if f == nil || f.size < need {
		return nil, p.err
	}
	p.next, p.want = nil, 0
	p.cond.Broadcast()
	return f, nil
}

// await returns when there is a file of at least need bytes to take. It waits while there is no space on the disk; the caller must not
// hold what freeing the log needs.
func (p *filler) await(need int64, stop <-chan struct{}) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.want = need
	p.waiting.start()
	defer p.waiting.end()
	for {
		if stopped(stop) {
			return ErrClosed
		}
		if p.err != nil {
			return p.err
		}
		if f := p.next; f != nil {
			if f.size >= need {
				return nil
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
		for p.next != nil && !p.plentyLocked() && !stopped(stop) {
			if p.noSpace.Load() {
				p.mu.Unlock()
				p.pause(stop)
				p.regain()
				p.mu.Lock()
				continue
			}
			p.cond.Wait()
		}
		if stopped(stop) {
			p.cond.Broadcast()
			p.mu.Unlock()
			return
		}
		if p.next != nil { // enough is ready: what was freed beyond that goes
			f := p.free[0]
			p.free = p.free[1:]
			p.mu.Unlock()
			p.drop(f)
			continue
		}
		size := p.sizeLocked()
		old := p.pickLocked(size)
		p.gen++
		gen := p.gen
		p.mu.Unlock()
		f, err := p.make(gen, size, old, stop)
		if full(err) {
			p.starve(stop)
			continue
		}
		p.mu.Lock()
		p.next, p.err = f, err
		if err == nil && !p.noSpace.Load() {
			p.size = min(max(p.size, firstFileBytes)*2, p.l.cfg.FileBytes)
		}
		p.cond.Broadcast()
		p.mu.Unlock()
		if err != nil {
			return
		}
		if p.noSpace.Load() {
			p.regain()
		}
	}
}

// plentyLocked reports whether more freed files are there than are kept beside the next one. Files are freed many at a time, when a round of sealing has made a snapshot
// installable, and then nothing for as long; writing over one costs a fraction of making another, whose every page is touched for the first time.
func (p *filler) plentyLocked() bool {
	if len(p.free) == 0 {
		return false
	}
	if p.noSpace.Load() {
		return true
	}
	bytes := int64(0)
	for _, f := range p.free[1:] { // one is always kept
		bytes += f.size
	}
	return bytes > p.l.cfg.LocalRetention/2
}

// sizeLocked is the size of the file to make. On a full disk it is a small one: it is for the entries that are always admitted, such
// as the commits that let the log be freed, and the space that the reserve gave back must do for them.
func (p *filler) sizeLocked() int64 {
	size := p.size
	if p.noSpace.Load() {
		size = min(firstFileBytes, p.l.cfg.FileBytes)
	}
	return max(size, alignUp(p.want))
}

// full reports whether err says that there is no room on the disk, for anybody or for this user.
func full(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

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
func (p *filler) make(gen uint64, size int64, old *logFile, stop <-chan struct{}) (*logFile, error) {
	fs := p.l.fs
	name := p.l.path(fmt.Sprintf("%016x.log", gen))
	var f File
	header := func() error {
		_, err := f.WriteAt(encodeFileHeader(p.l.cfg.Group, gen, size), 0)
		return err
	}
	sync := func() error { return f.Sync() }
	steps := []func() error{
		func() (err error) { f, err = fs.Create(name); return err },
		func() error { return p.zeroFill(f, size, func(off int64) error { return p.keepPace(off, size, stop) }) },
		sync, // a valid header must mean that the whole file is there
		header, sync,
	}
	if old != nil {
		f, size = old.f, old.size
		steps = []func() error{header, sync, func() error { return fs.Rename(old.name, name) }}
	}
	for _, step := range append(steps, func() error { return fs.SyncDir(p.l.cfg.Dir) }) {
		p.busy.start()
		err := step()
		p.busy.end()
		if err == nil {
			continue
		}
		if f == nil {
			return nil, fmt.Errorf("raftlog: making %s: %w", name, err)
		}
		err = errors.Join(fmt.Errorf("raftlog: making %s: %w", name, err), f.Close())
		if old == nil {
			_ = fs.Remove(name) // a leftover is recognised at the next open
		}
		return nil, err
	}
	return &logFile{gen: gen, name: name, f: f, size: size}, nil
}

// zeroFill leaves the disk's queue to those who wait for it: no more than a chunk or two of zeros are in it at a time. before is called before each.
func (p *filler) zeroFill(f File, size int64, before func(off int64) error) error {
	chunk := make([]byte, min(fillChunk, size))
	for off := int64(0); off < size; off += int64(len(chunk)) {
		p.busy.end() // a chunk that never ends is a hang; many chunks and the rest between them are not
		if err := before(off); err != nil {
			return err
		}
		p.busy.start()
		if _, err := f.WriteAt(chunk[:min(int64(len(chunk)), size-off)], off); err != nil {
			return err
		}
		if err := f.Pace(off); err != nil {
			return err
		}
	}
	return nil
}

// starve is called when the disk is full. The free budget is 0 until there is room for a file and the reserve. The first time what can
// be given back is: the reserve, and what is kept only as a cache.
func (p *filler) starve(stop <-chan struct{}) {
	if !p.declareFull() {
		p.pause(stop)
		return
	}
	if err := p.l.fs.Remove(p.l.path("reserve")); err != nil && !errors.Is(err, os.ErrNotExist) {
		p.l.log.Warn("cannot release the reserve", "err", err)
	}
}

// declareFull begins the time without space; it reports whether it had not begun before.
func (p *filler) declareFull() bool {
	if p.noSpace.Swap(true) {
		return false
	}
	p.l.log.Error("disk full: there is no room for a log file and the reserve, records are refused until there is", "dir", p.l.cfg.Dir)
	p.l.kickFree()
	return true
}

func (p *filler) pause(stop <-chan struct{}) {
	select {
	case <-time.After(spaceRetry):
	case <-stop:
	}
}

// regain ends the time without space if the reserve can be made again.
func (p *filler) regain() {
	p.busy.start()
	defer p.busy.end()
	err := p.reserve()
	if full(err) {
		return
	}
	if err != nil {
		p.l.log.Warn("cannot make the reserve again", "err", err)
	}
	p.noSpace.Store(false)
	p.l.log.Info("disk has space again", "dir", p.l.cfg.Dir)
}

// reserve makes the file whose space a full disk gives back.
func (p *filler) reserve() error {
	f, err := p.l.fs.Create(p.l.path("reserve"))
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err == nil {
		err = errors.Join(p.zeroFill(f, min(reserveMax, p.l.cfg.FileBytes/8), func(int64) error { return nil }), f.Close())
	}
	if full(err) {
		_ = p.l.fs.Remove(p.l.path("reserve")) // half of it would be of no use
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
