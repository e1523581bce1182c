// Package objstore is Estran's view of an object store: immutable bytes by key. It owns the Bucket interface, its error classes, retries and
// fault injection; adapters (mem, fs, s3, minio) know one outside system each and not one another. It knows nothing of Kafka.
//
// The invariant: a Put is all or nothing, and with IfAbsent no object is ever replaced.
package objstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"
)

// Bucket is a place for objects. All methods are safe for concurrent use and strongly consistent: what Put returned is seen by every later Get,
// Head and List. Errors are *Error.
type Bucket interface {
	// Put stores the object whole or not at all. With IfAbsent and an existing object it fails with ErrPrecondition, unless that object was written
	// by the same WriterID: then an earlier try of this very Put has succeeded.
	Put(ctx context.Context, key string, b Body, o PutOptions) (Info, error)
	// Get returns exactly the bytes of r, or fails: with ErrTruncated, from Read, if fewer come.
	Get(ctx context.Context, key string, r Range) (io.ReadCloser, Info, error)
	Head(ctx context.Context, key string) (Info, error)
	// List yields the objects whose keys begin with prefix and follow startAfter, in the order of their keys.
	List(ctx context.Context, prefix, startAfter string) iter.Seq2[Info, error]
	// Delete removes objects; one that is missing counts as removed. A *DeleteError lists those that were not.
	Delete(ctx context.Context, keys ...string) error
	Close() error
}

// Creator is a Bucket that can create its bucket; it does nothing if the bucket exists.
type Creator interface {
	CreateBucket(ctx context.Context) error
}

// Dater is a Bucket that tells the store's time, from the Date header of its last answer; ok is false if it has none.
type Dater interface {
	StoreTime() (t time.Time, ok bool)
}

// Body is what a Put stores. It can be read again for a retry.
type Body struct {
	R    io.ReaderAt
	Size int64
}

// Bytes is the Body of b.
func Bytes(b []byte) Body { return Body{bytesAt(b), int64(len(b))} }

type bytesAt []byte

func (b bytesAt) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(b)) {
		return 0, io.EOF
	}
	n := copy(p, b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Reader returns the body as a stream from its start.
func (b Body) Reader() *io.SectionReader { return io.NewSectionReader(b.R, 0, b.Size) }

// PutOptions change what Put does.
type PutOptions struct {
	IfAbsent bool
	// CRC32C is the body's checksum; the store verifies it where it can.
	CRC32C *uint32
	// WriterID names the attempt. It is stored with the object.
	WriterID string
}

// Range selects bytes: Len < 0 means to the end, Off < 0 the last -Off bytes. An end beyond the object is clamped.
type Range struct{ Off, Len int64 }

// Whole is the range of all bytes.
var Whole = Range{0, -1}

// Resolve returns offset and length for an object of size bytes; ok is false if the range begins beyond it.
func (r Range) Resolve(size int64) (off, n int64, ok bool) {
	off = r.Off
	if off < 0 {
		off = max(0, size+off)
	}
	if off > size || off == size && size > 0 {
		return 0, 0, false
	}
	n = size - off
	if r.Len >= 0 && r.Off >= 0 {
		n = min(n, r.Len)
	}
	return off, n, true
}

// Info describes an object. What a store does not tell is zero.
type Info struct {
	Key      string
	Size     int64
	ETag     string // opaque
	CRC32C   *uint32
	Modified time.Time
	WriterID string
}

// Error classes, for errors.Is.
var (
	ErrNotFound           = errors.New("object not found")
	ErrBucketNotFound     = errors.New("bucket not found")
	ErrPrecondition       = errors.New("precondition failed")
	ErrConflict           = errors.New("conflicting operation")
	ErrRange              = errors.New("range not satisfiable")
	ErrThrottled          = errors.New("throttled")
	ErrUnavailable        = errors.New("store unavailable")
	ErrTimeout            = errors.New("timed out")
	ErrAccess             = errors.New("access denied")
	ErrExpiredCredentials = errors.New("credentials expired or unknown")
	ErrRegion             = errors.New("wrong region")
	ErrCorrupt            = errors.New("checksum mismatch")
	ErrTruncated          = errors.New("truncated")
	ErrUnsupported        = errors.New("not supported by the store")
	ErrInvalidKey         = errors.New("invalid key")
)

// Error is every error of a Bucket.
type Error struct {
	Op, Key    string
	Status     int    // HTTP; 0 if there was no answer
	Code       string // the store's own
	Kind       error  // one of the classes
	Retryable  bool
	RetryAfter time.Duration
	Err        error // the SDK's
}

// Error names operation, key, class and cause.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s: %v", e.Op, e.Key, e.Kind)
	if e.Code != "" && !strings.Contains(e.Kind.Error(), e.Code) {
		fmt.Fprintf(&b, " (%d %s)", e.Status, e.Code)
	}
	if e.Err != nil {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	return b.String()
}

// Unwrap returns class and cause.
func (e *Error) Unwrap() []error { return []error{e.Kind, e.Err} }

// DeleteError lists the keys that were not deleted.
type DeleteError struct{ Failed map[string]error }

// Error names one of them.
func (e *DeleteError) Error() string {
	for k, err := range e.Failed {
		return fmt.Sprintf("%d objects were not deleted, one of them %s: %v", len(e.Failed), k, err)
	}
	return "no object failed"
}

// Unwrap returns the causes.
func (e *DeleteError) Unwrap() (out []error) {
	for _, err := range e.Failed {
		out = append(out, err)
	}
	return out
}

const (
	keyMax       = 900
	componentMax = 200
)

// CheckKey accepts the keys that every store takes: lower-case letters, digits, ".", "_", "=", "-", in components of at most 200 bytes.
func CheckKey(key string) error {
	bad := func(why string) error {
		return &Error{Op: "check", Key: fmt.Sprintf("%.100q", key), Kind: ErrInvalidKey, Err: errors.New(why)}
	}
	if key == "" || len(key) > keyMax {
		return bad("its length is not 1 to 900")
	}
	for part := range strings.SplitSeq(key, "/") {
		if part == "" || part == "." || part == ".." || len(part) > componentMax {
			return bad("a component is empty, a dot, or longer than 200")
		}
	}
	for _, c := range []byte(key) {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || strings.IndexByte("._=-/", c) >= 0) {
			return bad(fmt.Sprintf("it contains %q", c))
		}
	}
	return nil
}

// Prefixed returns the part of b below prefix, which ends in "/" or is empty. Closing it closes b.
func Prefixed(b Bucket, prefix string) Bucket {
	if prefix == "" {
		return b
	}
	return &prefixed{b, strings.TrimSuffix(prefix, "/") + "/"}
}

type prefixed struct {
	Bucket
	prefix string
}

func (p *prefixed) Put(ctx context.Context, key string, b Body, o PutOptions) (Info, error) {
	i, err := p.Bucket.Put(ctx, p.prefix+key, b, o)
	i.Key = key
	return i, err
}

func (p *prefixed) Get(ctx context.Context, key string, r Range) (io.ReadCloser, Info, error) {
	rc, i, err := p.Bucket.Get(ctx, p.prefix+key, r)
	i.Key = key
	return rc, i, err
}

func (p *prefixed) Head(ctx context.Context, key string) (Info, error) {
	i, err := p.Bucket.Head(ctx, p.prefix+key)
	i.Key = key
	return i, err
}

func (p *prefixed) List(ctx context.Context, prefix, startAfter string) iter.Seq2[Info, error] {
	if startAfter != "" {
		startAfter = p.prefix + startAfter
	}
	return func(yield func(Info, error) bool) {
		for i, err := range p.Bucket.List(ctx, p.prefix+prefix, startAfter) {
			i.Key = strings.TrimPrefix(i.Key, p.prefix)
			if !yield(i, err) {
				return
			}
		}
	}
}

func (p *prefixed) Delete(ctx context.Context, keys ...string) error {
	full := make([]string, len(keys))
	for i, k := range keys {
		full[i] = p.prefix + k
	}
	return p.Bucket.Delete(ctx, full...)
}

// CreateBucket implements Creator if the bucket does.
func (p *prefixed) CreateBucket(ctx context.Context) error {
	if c, ok := p.Bucket.(Creator); ok {
		return c.CreateBucket(ctx)
	}
	return nil
}

// StoreTime implements Dater if the bucket does.
func (p *prefixed) StoreTime() (time.Time, bool) {
	if d, ok := p.Bucket.(Dater); ok {
		return d.StoreTime()
	}
	return time.Time{}, false
}

// SizeOf returns the size of an object that a store has answered a ranged GET from, with n bytes and a Content-Range header or none. It fails with ErrUnsupported if
// these are other bytes than were asked for, as from a store or a proxy that takes no notice of ranges.
func (r Range) SizeOf(n int64, contentRange string) (size int64, err error) {
	first, size := int64(0), n
	if contentRange != "" {
		var last int64
		if _, err := fmt.Sscanf(contentRange, "bytes %d-%d/%d", &first, &last, &size); err != nil {
			return 0, fmt.Errorf("%w: Content-Range %q", ErrUnsupported, contentRange)
		}
	}
	if off, _, ok := r.Resolve(size); !ok || off != first {
		return 0, fmt.Errorf("%w: range %+v was asked for, what came begins at %d of %d", ErrUnsupported, r, first, size)
	}
	return size, nil
}

// ReadFull reads a range whole. A short answer is ErrTruncated.
func ReadFull(ctx context.Context, b Bucket, key string, r Range, p []byte) error {
	rc, _, err := b.Get(ctx, key, r)
	if err != nil {
		return err
	}
	defer rc.Close()
	if _, err := io.ReadFull(rc, p); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return &Error{Op: "get", Key: key, Kind: ErrTruncated, Retryable: true, Err: err}
		}
		if _, ok := errors.AsType[*Error](err); ok {
			return err
		}
		return &Error{Op: "get", Key: key, Kind: ErrUnavailable, Retryable: true, Err: err}
	}
	return nil
}
