// Package mem is a Bucket in memory: the twin of the real ones, for tests and for throw-away nodes.
package mem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/estran/estran/objstore"
)

// Bucket implements objstore.Bucket.
type Bucket struct {
	mu   sync.RWMutex
	m    map[string]object
	etag int
	now  func() time.Time
}

type object struct {
	data []byte
	info objstore.Info
}

var _ objstore.Bucket = (*Bucket)(nil)

// New returns an empty bucket.
func New() *Bucket { return &Bucket{m: map[string]object{}, now: time.Now} }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Put implements objstore.Bucket.
func (b *Bucket) Put(ctx context.Context, key string, body objstore.Body, o objstore.PutOptions) (objstore.Info, error) {
	if err := objstore.CheckKey(key); err != nil {
		return objstore.Info{}, err
	}
	data := make([]byte, body.Size)
	if _, err := io.ReadFull(body.Reader(), data); err != nil {
		return objstore.Info{}, fmt.Errorf("put %s: reading the body: %w", key, err)
	}
	if err := ctx.Err(); err != nil {
		return objstore.Info{}, err
	}
	crc := crc32.Checksum(data, castagnoli)
	if o.CRC32C != nil && *o.CRC32C != crc {
		return objstore.Info{}, &objstore.Error{Op: "put", Key: key, Kind: objstore.ErrCorrupt, Err: fmt.Errorf("body has CRC32C %08x, %08x was announced", crc, *o.CRC32C)}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if old, ok := b.m[key]; ok && o.IfAbsent {
		if o.WriterID != "" && old.info.WriterID == o.WriterID {
			return old.info, nil
		}
		return objstore.Info{}, &objstore.Error{Op: "put", Key: key, Kind: objstore.ErrPrecondition}
	}
	b.etag++
	info := objstore.Info{Key: key, Size: body.Size, ETag: fmt.Sprint(b.etag), CRC32C: &crc, Modified: b.now(), WriterID: o.WriterID}
	b.m[key] = object{data, info}
	return info, nil
}

func (b *Bucket) find(op, key string) (object, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	o, ok := b.m[key]
	if !ok {
		return o, &objstore.Error{Op: op, Key: key, Kind: objstore.ErrNotFound}
	}
	return o, nil
}

// Get implements objstore.Bucket.
func (b *Bucket) Get(ctx context.Context, key string, r objstore.Range) (io.ReadCloser, objstore.Info, error) {
	if err := ctx.Err(); err != nil {
		return nil, objstore.Info{}, err
	}
	o, err := b.find("get", key)
	if err != nil {
		return nil, objstore.Info{}, err
	}
	off, n, ok := r.Resolve(int64(len(o.data)))
	if !ok {
		return nil, objstore.Info{}, &objstore.Error{Op: "get", Key: key, Kind: objstore.ErrRange}
	}
	return io.NopCloser(bytes.NewReader(o.data[off : off+n])), o.info, nil
}

// Head implements objstore.Bucket.
func (b *Bucket) Head(_ context.Context, key string) (objstore.Info, error) {
	o, err := b.find("head", key)
	return o.info, err
}

// List implements objstore.Bucket.
func (b *Bucket) List(ctx context.Context, prefix, startAfter string) iter.Seq2[objstore.Info, error] {
	return func(yield func(objstore.Info, error) bool) {
		b.mu.RLock()
		keys := slices.Sorted(maps.Keys(b.m))
		b.mu.RUnlock()
		for _, k := range keys {
			if !strings.HasPrefix(k, prefix) || k <= startAfter {
				continue
			}
			o, err := b.find("list", k)
			if errors.Is(err, objstore.ErrNotFound) {
				continue // deleted while it was listed
			}
			if !yield(o.info, ctx.Err()) {
				return
			}
		}
	}
}

// Delete implements objstore.Bucket.
func (b *Bucket) Delete(_ context.Context, keys ...string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, k := range keys {
		delete(b.m, k)
	}
	return nil
}

// Corrupt flips a bit of an object, for tests.
func (b *Bucket) Corrupt(key string, at int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	o := b.m[key]
	o.data = bytes.Clone(o.data)
	o.data[at] ^= 1
	b.m[key] = o
}

// Close implements objstore.Bucket.
func (b *Bucket) Close() error { return nil }
