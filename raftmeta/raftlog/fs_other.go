//go:build !linux

package raftlog

// WriteVec implements File, a buffer at a time.
func (f *osFile) WriteVec(bufs [][]byte, off int64) error {
	for _, b := range bufs {
		if _, err := f.WriteAt(b, off); err != nil {
			return err
		}
		off += int64(len(b))
	}
	return nil
}

// Sync implements File; on darwin this is F_FULLFSYNC.
func (f *osFile) Sync() error { return f.File.Sync() }

// Pace implements File by doing nothing.
func (*osFile) Pace(int64) error { return nil }
