package raftlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
)

const (
	abMagic    = "ESTRNAB1"
	abOverhead = 24 // magic, sequence, length, CRC
)

// abFile is a small durable record with two slots that are written in turn, so that a torn write leaves the old one.
type abFile struct {
	mu   sync.Mutex
	f    File
	seq  uint64
	val  []byte
	busy stopwatch // a write in flight
}

// openAB opens or creates the file. A file in which a slot was written and none is valid is corrupt.
func openAB(fs FS, dir, name string) (*abFile, error) {
	path := filepath.Join(dir, name)
	f, err := fs.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return createAB(fs, dir, name)
	}
	if err != nil {
		return nil, fmt.Errorf("raftlog: opening %s: %w", path, err)
	}
	a := &abFile{f: f}
	buf := make([]byte, 2*blockBytes)
	if _, err := f.ReadAt(buf, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, errors.Join(fmt.Errorf("raftlog: reading %s: %w", path, err), f.Close())
	}
	written := false
	for slot := range 2 {
		b := buf[slot*blockBytes : (slot+1)*blockBytes]
		written = written || len(bytes.TrimLeft(b, "\x00")) > 0
		if v, seq, ok := decodeAB(b); ok && seq > a.seq {
			a.val, a.seq = v, seq
		}
	}
	if written && a.seq == 0 {
		return nil, errors.Join(fmt.Errorf("%w: %s has no valid slot", ErrCorrupt, path), f.Close())
	}
	return a, nil
}

func createAB(fs FS, dir, name string) (*abFile, error) {
	path, tmp := filepath.Join(dir, name), filepath.Join(dir, name+".tmp")
	if err := fs.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	f, err := fs.Create(tmp)
	if err != nil {
		return nil, fmt.Errorf("raftlog: creating %s: %w", path, err)
	}
	_, err = f.WriteAt(make([]byte, 2*blockBytes), 0)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = fs.Rename(tmp, path)
	}
	if err == nil {
		err = fs.SyncDir(dir)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("raftlog: creating %s: %w", path, err), f.Close())
	}
	return &abFile{f: f}, nil
}

func decodeAB(b []byte) (val []byte, seq uint64, ok bool) {
	be := binary.BigEndian
	n := be.Uint32(b[16:])
	if string(b[:8]) != abMagic || n > blockBytes-abOverhead || be.Uint32(b[20+n:]) != crcOf(b[:20+n]) {
		return nil, 0, false
	}
	return append([]byte(nil), b[20:20+n]...), be.Uint64(b[8:]), true
}

// get returns the value; nil if none was ever set.
func (a *abFile) get() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.val
}

// set makes val durable.
func (a *abFile) set(val []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(val) > blockBytes-abOverhead {
		return fmt.Errorf("raftlog: value of %d bytes", len(val))
	}
	b := make([]byte, blockBytes)
	be := binary.BigEndian
	copy(b, abMagic)
	be.PutUint64(b[8:], a.seq+1)
	be.PutUint32(b[16:], uint32(len(val)))
	copy(b[20:], val)
	be.PutUint32(b[20+len(val):], crcOf(b[:20+len(val)]))
	a.busy.start()
	defer a.busy.end()
	if _, err := a.f.WriteAt(b, int64((a.seq+1)%2)*blockBytes); err != nil {
		return err
	}
	if err := a.f.Sync(); err != nil {
		return err
	}
	a.seq++
	a.val = append([]byte(nil), val...)
	return nil
}

func (a *abFile) close() error {
	if a == nil {
		return nil
	}
	return a.f.Close()
}
