// Package fs is a Bucket in a directory: atomic and durable on one machine, for development and for several processes of one machine.
package fs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/estran/estran/objstore"
)

// Bucket implements objstore.Bucket. An object is a file below dir; what S3 keeps beside it (checksum, writer) stands behind the bytes, in a trailer.
type Bucket struct {
	dir string
	seq atomic.Uint64
}

var _ objstore.Bucket = (*Bucket)(nil)

const tmpDir = ".tmp"

// Open opens or creates the directory and removes what crashed writers left.
func Open(dir string) (*Bucket, error) {
	if err := os.MkdirAll(filepath.Join(dir, tmpDir), 0o755); err != nil {
		return nil, fmt.Errorf("object directory: %w", err)
	}
	b := &Bucket{dir: dir}
	left, err := os.ReadDir(filepath.Join(dir, tmpDir))
	if err != nil {
		return nil, fmt.Errorf("object directory: %w", err)
	}
	for _, e := range left {
		if pid, _, ok := strings.Cut(e.Name(), "-"); ok && !alive(pid) {
			if err := os.Remove(filepath.Join(dir, tmpDir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("object directory: %w", err)
			}
		}
	}
	return b, nil
}

// trailer is what is kept behind the bytes: JSON, its length in 4 bytes, magic.
type trailer struct {
	Size   int64
	CRC32C uint32
	Writer string
}

const trailerMagic = "ESTROBJ1"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (b *Bucket) path(key string) string { return filepath.Join(b.dir, filepath.FromSlash(key)) }

// Put implements objstore.Bucket: written beside, synced, then linked (IfAbsent: atomic also between processes) or renamed into place.
func (b *Bucket) Put(ctx context.Context, key string, body objstore.Body, o objstore.PutOptions) (objstore.Info, error) {
	if err := objstore.CheckKey(key); err != nil {
		return objstore.Info{}, err
	}
	tmp := filepath.Join(b.dir, tmpDir, fmt.Sprintf("%d-%d", os.Getpid(), b.seq.Add(1)))
	crc, err := writeObject(ctx, tmp, body, o)
	defer os.Remove(tmp) // after a rename there is nothing left to remove
	if err != nil {
		return objstore.Info{}, b.fault("put", key, err)
	}
	if o.CRC32C != nil && *o.CRC32C != crc {
		return objstore.Info{}, &objstore.Error{Op: "put", Key: key, Kind: objstore.ErrCorrupt, Err: fmt.Errorf("body has CRC32C %08x, %08x was announced", crc, *o.CRC32C)}
	}
	dst := b.path(key)
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return objstore.Info{}, b.fault("put", key, err)
	}
	if o.IfAbsent {
		err = os.Link(tmp, dst)
	} else {
		err = os.Rename(tmp, dst)
	}
	if errors.Is(err, fs.ErrExist) {
		if old, herr := b.Head(ctx, key); herr == nil && o.WriterID != "" && old.WriterID == o.WriterID {
			return old, nil
		}
		return objstore.Info{}, &objstore.Error{Op: "put", Key: key, Kind: objstore.ErrPrecondition}
	}
	if err == nil {
		err = b.syncUp(filepath.Dir(dst))
	}
	if err != nil {
		return objstore.Info{}, b.fault("put", key, err)
	}
	return b.Head(ctx, key)
}

func writeObject(ctx context.Context, name string, body objstore.Body, o objstore.PutOptions) (crc uint32, err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	sum := crc32.New(castagnoli)
	buf := make([]byte, 256<<10)
	for r := body.Reader(); ; {
		n, rerr := io.ReadFull(r, buf)
		_, _ = sum.Write(buf[:n]) // never fails
		if _, err := f.Write(buf[:n]); err != nil {
			return 0, err
		}
		if rerr == io.EOF || rerr == io.ErrUnexpectedEOF {
			break
		}
		if rerr != nil {
			return 0, rerr
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
	}
	t, err := json.Marshal(trailer{body.Size, sum.Sum32(), o.WriterID})
	if err != nil {
		return 0, err
	}
	t = append(t, byte(len(t)>>24), byte(len(t)>>16), byte(len(t)>>8), byte(len(t)))
	if _, err := f.Write(append(t, trailerMagic...)); err != nil {
		return 0, err
	}
	return sum.Sum32(), f.Sync()
}

// syncUp makes a new name durable: the directory, and those above it that may be new.
func (b *Bucket) syncUp(dir string) error {
	for ; len(dir) >= len(b.dir); dir = filepath.Dir(dir) {
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		if err := errors.Join(d.Sync(), d.Close()); err != nil {
			return err
		}
		if dir == b.dir {
			break
		}
	}
	return nil
}

func (b *Bucket) fault(op, key string, err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	e := &objstore.Error{Op: op, Key: key, Kind: objstore.ErrUnavailable, Retryable: true, Err: err}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Kind, e.Retryable, e.Err = objstore.ErrNotFound, false, nil
	case errors.Is(err, fs.ErrPermission):
		e.Kind, e.Retryable = objstore.ErrAccess, false
	}
	return e
}

// open returns the file and its trailer.
func (b *Bucket) open(op, key string) (*os.File, objstore.Info, error) {
	if err := objstore.CheckKey(key); err != nil {
		return nil, objstore.Info{}, err
	}
	f, err := os.Open(b.path(key))
	if err != nil {
		return nil, objstore.Info{}, b.fault(op, key, err)
	}
	info, err := readTrailer(f, key)
	if err != nil {
		return nil, info, errors.Join(&objstore.Error{Op: op, Key: key, Kind: objstore.ErrCorrupt, Err: err}, f.Close())
	}
	return f, info, nil
}

func readTrailer(f *os.File, key string) (objstore.Info, error) {
	fi, err := f.Stat()
	if err != nil {
		return objstore.Info{}, err
	}
	tail := make([]byte, min(fi.Size(), 4096))
	if _, err := f.ReadAt(tail, fi.Size()-int64(len(tail))); err != nil {
		return objstore.Info{}, err
	}
	if len(tail) < 12 || string(tail[len(tail)-8:]) != trailerMagic {
		return objstore.Info{}, errors.New("no trailer: not written by this program, or cut short")
	}
	l := tail[len(tail)-12:]
	n := int(l[0])<<24 | int(l[1])<<16 | int(l[2])<<8 | int(l[3])
	if n > len(tail)-12 {
		return objstore.Info{}, fmt.Errorf("trailer of %d bytes", n)
	}
	var t trailer
	if err := json.Unmarshal(tail[len(tail)-12-n:len(tail)-12], &t); err != nil {
		return objstore.Info{}, err
	}
	if t.Size != fi.Size()-12-int64(n) {
		return objstore.Info{}, fmt.Errorf("%d bytes, the trailer says %d", fi.Size()-12-int64(n), t.Size)
	}
	return objstore.Info{Key: key, Size: t.Size, ETag: fmt.Sprintf("%08x-%d-%d", t.CRC32C, t.Size, fi.ModTime().UnixNano()), CRC32C: &t.CRC32C, Modified: fi.ModTime(), WriterID: t.Writer}, nil
}

type section struct {
	io.Reader
	io.Closer
}

// Get implements objstore.Bucket.
func (b *Bucket) Get(ctx context.Context, key string, r objstore.Range) (io.ReadCloser, objstore.Info, error) {
	if err := ctx.Err(); err != nil {
		return nil, objstore.Info{}, err
	}
	f, info, err := b.open("get", key)
	if err != nil {
		return nil, info, err
	}
	off, n, ok := r.Resolve(info.Size)
	if !ok {
		return nil, info, errors.Join(&objstore.Error{Op: "get", Key: key, Kind: objstore.ErrRange}, f.Close())
	}
	return section{io.NewSectionReader(f, off, n), f}, info, nil
}

// Head implements objstore.Bucket.
func (b *Bucket) Head(_ context.Context, key string) (objstore.Info, error) {
	f, info, err := b.open("head", key)
	if err != nil {
		return info, err
	}
	return info, f.Close()
}

// List implements objstore.Bucket. Keys sort as S3 sorts them because no key is a directory of another.
func (b *Bucket) List(ctx context.Context, prefix, startAfter string) iter.Seq2[objstore.Info, error] {
	return func(yield func(objstore.Info, error) bool) {
		var keys []string
		root := b.path(prefix[:strings.LastIndexByte(prefix, '/')+1])
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			rel, _ := filepath.Rel(b.dir, path)
			key := filepath.ToSlash(rel)
			if d.IsDir() {
				if d.Name() == tmpDir {
					return filepath.SkipDir
				}
				return ctx.Err()
			}
			if strings.HasPrefix(key, prefix) && key > startAfter {
				keys = append(keys, key)
			}
			return nil
		})
		if err != nil {
			yield(objstore.Info{}, b.fault("list", prefix, err))
			return
		}
		slices.Sort(keys)
		for _, k := range keys {
			info, err := b.Head(ctx, k)
			if errors.Is(err, objstore.ErrNotFound) {
				continue
			}
			if !yield(info, err) {
				return
			}
		}
	}
}

// Delete implements objstore.Bucket.
func (b *Bucket) Delete(_ context.Context, keys ...string) error {
	failed := map[string]error{}
	for _, k := range keys {
		err := objstore.CheckKey(k)
		if err == nil {
			if err = os.Remove(b.path(k)); errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
		}
		if err != nil {
			failed[k] = b.fault("delete", k, err)
		}
	}
	if len(failed) > 0 {
		return &objstore.DeleteError{Failed: failed}
	}
	return nil
}

// Close implements objstore.Bucket.
func (b *Bucket) Close() error { return nil }
