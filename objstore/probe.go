package objstore

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

// Capabilities are what a probe found.
type Capabilities struct {
	// CreateOnly: a second create-only Put of a key fails. Without it the store is refused.
	CreateOnly bool
	// Ranges: ranged and suffix reads give exactly the bytes asked for.
	Ranges bool
	// Listed: an object is listed as soon as it was put.
	Listed bool
	// Skew is this machine's clock minus the store's; HasDate says whether the store tells its time.
	Skew    time.Duration
	HasDate bool
}

// Probe tries what Estran needs of a store, below v1/probe/, and cleans up. Its errors say what is wrong in one of the classes.
func Probe(ctx context.Context, b Bucket) (Capabilities, error) {
	var c Capabilities
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	key := "v1/probe/" + hex.EncodeToString(id[:]) + ".tmp"
	body := bytes.Repeat([]byte("estran probe "), 100)
	if _, err := b.Put(ctx, key, Bytes(body), PutOptions{IfAbsent: true, WriterID: "probe-1"}); err != nil {
		return c, err
	}
	defer b.Delete(context.WithoutCancel(ctx), key)
	_, err := b.Put(ctx, key, Bytes(body), PutOptions{IfAbsent: true, WriterID: "probe-2"})
	if c.CreateOnly = errors.Is(err, ErrPrecondition); !c.CreateOnly {
		return c, &Error{Op: "put", Key: key, Kind: ErrUnsupported, Err: fmt.Errorf("a create-only Put replaced an object, or failed differently: %w", orNone(err))}
	}
	for _, r := range []Range{{5, 10}, {-7, -1}, {0, -1}} {
		off, n, _ := r.Resolve(int64(len(body)))
		got := make([]byte, n)
		if err := ReadFull(ctx, b, key, r, got); err != nil {
			return c, err
		}
		if !bytes.Equal(got, body[off:off+n]) {
			return c, &Error{Op: "get", Key: key, Kind: ErrUnsupported, Err: fmt.Errorf("range %+v gives other bytes", r)}
		}
	}
	c.Ranges = true
	for info, err := range b.List(ctx, "v1/probe/", "") {
		if err != nil {
			return c, err
		}
		c.Listed = c.Listed || info.Key == key
	}
	if err := b.Delete(ctx, key); err != nil {
		return c, err
	}
	if _, err := b.Head(ctx, key); !errors.Is(err, ErrNotFound) {
		return c, &Error{Op: "delete", Key: key, Kind: ErrUnsupported, Err: fmt.Errorf("a deleted object is still there: %w", orNone(err))}
	}
	if d, ok := b.(Dater); ok {
		if t, ok := d.StoreTime(); ok {
			c.Skew, c.HasDate = time.Since(t).Round(time.Second), true
		}
	}
	return c, nil
}

func orNone(err error) error {
	if err == nil {
		return errors.New("no error")
	}
	return err
}
