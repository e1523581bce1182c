package raftlog

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// iovMax is the kernel's limit of buffers in one call.
const iovMax = 1024

// WriteVec implements File with pwritev.
func (f *osFile) WriteVec(bufs [][]byte, off int64) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	for len(bufs) > 0 {
		var n int
		var werr error
		err := conn.Write(func(fd uintptr) bool {
			n, werr = unix.Pwritev(int(fd), bufs[:min(len(bufs), iovMax)], off)
			return true
		})
		if err != nil {
			return err
		}
		switch {
		case werr == unix.EINTR:
			continue
		case werr != nil:
			return fmt.Errorf("pwritev %s at %d: %w", f.Name(), off, werr)
		case n == 0:
			return fmt.Errorf("pwritev %s at %d: %w", f.Name(), off, io.ErrShortWrite)
		}
		off += int64(n)
		bufs = consume(bufs, n)
	}
	return nil
}

// consume drops the first n bytes of bufs without changing the caller's slices.
func consume(bufs [][]byte, n int) [][]byte {
	for len(bufs) > 0 && n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs = bufs[1:]
	}
	if n > 0 {
		rest := make([][]byte, len(bufs))
		copy(rest, bufs)
		rest[0] = rest[0][n:]
		bufs = rest
	}
	return bufs
}

// Pace implements File with sync_file_range.
func (f *osFile) Pace(off int64) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = conn.Control(func(fd uintptr) {
		if off > 0 {
			serr = unix.SyncFileRange(int(fd), 0, off, unix.SYNC_FILE_RANGE_WAIT_BEFORE)
		}
		if serr == nil {
			serr = unix.SyncFileRange(int(fd), off, 0, unix.SYNC_FILE_RANGE_WRITE)
		}
	})
	switch {
	case err != nil:
		return err
	case errors.Is(serr, unix.ENOSYS), errors.Is(serr, unix.EINVAL), errors.Is(serr, unix.ESPIPE): // not on this file system
		return nil
	case serr != nil:
		return fmt.Errorf("sync_file_range %s at %d: %w", f.Name(), off, serr)
	}
	return nil
}

// Sync implements File with fdatasync: the files are written in advance, so no metadata changes.
func (f *osFile) Sync() error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := conn.Control(func(fd uintptr) {
		for {
			if serr = unix.Fdatasync(int(fd)); serr != unix.EINTR {
				return
			}
		}
	}); err != nil {
		return err
	}
	if serr != nil {
		return fmt.Errorf("fdatasync %s: %w", f.Name(), serr)
	}
	return nil
}
