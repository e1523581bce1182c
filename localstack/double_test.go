package localstack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"testing"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/objtest"
	"github.com/estran/estran/objstore/open"
)

var sdks = []string{"aws", "s3compatible"}

// double starts a scripted store and opens it through an SDK, with a policy whose pauses are short, and whose limits are so only where they are to pass.
func double(t *testing.T, sdk string, steps ...Step) (*Double, objstore.Bucket) {
	t.Helper()
	d := NewDouble()
	t.Cleanup(d.Close)
	for _, kv := range d.Env() {
		k, v, _ := bytes.Cut([]byte(kv), []byte("="))
		t.Setenv(string(k), string(v))
	}
	limit := time.Minute
	if slices.ContainsFunc(steps, waits) {
		limit = 200 * time.Millisecond
	}
	b, err := open.Bucket(t.Context(), d.URL("bucket")+"&provider="+sdk, objstore.Policy{Tries: doubleTries, First: time.Microsecond, Last: time.Millisecond,
		Stall: limit, GetHeader: limit, PutBase: limit}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return d, b
}

const doubleTries = 4

// waits: the step ends by a limit of time, which a slow machine may reach once more.
func waits(s Step) bool { return s.Silent || s.Stall > 0 }

func TestDoubleKeepsTheContract(t *testing.T) {
	for _, sdk := range sdks {
		t.Run(sdk, func(t *testing.T) {
			_, b := double(t, sdk)
			objtest.Run(t, func(*testing.T) objstore.Bucket { return b })
		})
	}
}

// What goes wrong with a write: what is repeated, how often, and what it comes to. Both SDKs behave alike; neither repeats anything by itself.
func TestDoublePut(t *testing.T) {
	data := bytes.Repeat([]byte("segment"), 10_000)
	crc := crc32.Checksum(data, castagnoli)
	for _, c := range []struct {
		name  string
		step  Step
		want  error
		calls []string
	}{
		{"throttled twice", Step{Status: 503, Code: "SlowDown", Times: 2}, nil, []string{"put", "put", "put"}},
		{"throttled for ever", Step{Status: 503, Code: "SlowDown"}, objstore.ErrThrottled, []string{"put", "put", "put", "put"}},
		{"429", Step{Status: 429, Times: 1}, nil, []string{"put", "put"}},
		{"500", Step{Status: 500, Code: "InternalError", Times: 1}, nil, []string{"put", "put"}},
		{"502", Step{Status: 502, Times: 1}, nil, []string{"put", "put"}},
		{"504", Step{Status: 504, Times: 1}, nil, []string{"put", "put"}},
		{"reset", Step{Reset: true, Times: 1}, nil, []string{"put", "put"}},
		{"reset for ever", Step{Reset: true}, objstore.ErrUnavailable, []string{"put", "put", "put", "put"}},
		{"answer lost", Step{Op: "put", Reset: true, Effect: true, Times: 1}, nil, []string{"put", "put", "head"}},
		{"500 after the effect", Step{Op: "put", Status: 500, Code: "InternalError", Effect: true, Times: 1}, nil, []string{"put", "put", "head"}},
		{"conflict", Step{Status: 409, Code: "ConditionalRequestConflict", Times: 1}, nil, []string{"put", "put"}},
		{"damaged on the way", Step{Status: 400, Code: "BadDigest", Times: 1}, nil, []string{"put", "put"}},
		{"denied", Step{Status: 403, Code: "AccessDenied"}, objstore.ErrAccess, []string{"put"}},
		{"token expired", Step{Status: 400, Code: "ExpiredToken"}, objstore.ErrExpiredCredentials, []string{"put"}},
		{"unknown key", Step{Status: 403, Code: "InvalidAccessKeyId"}, objstore.ErrExpiredCredentials, []string{"put"}},
		{"no bucket", Step{Status: 404, Code: "NoSuchBucket"}, objstore.ErrBucketNotFound, []string{"put"}},
		{"wrong region", Step{Status: 301, Code: "PermanentRedirect"}, objstore.ErrRegion, []string{"put"}},
		{"not implemented", Step{Status: 501, Code: "NotImplemented"}, objstore.ErrUnsupported, []string{"put"}},
		{"no answer", Step{Silent: true, Times: 1}, nil, []string{"put", "put"}},
		{"other ETag", Step{ETag: `"0"`}, nil, []string{"put"}},
	} {
		for _, sdk := range sdks {
			t.Run(c.name+"/"+sdk, func(t *testing.T) {
				d, b := double(t, sdk, c.step)
				d.Script(c.step)
				_, err := b.Put(t.Context(), "k.x", objstore.Bytes(data), objstore.PutOptions{IfAbsent: true, CRC32C: &crc, WriterID: "w"})
				if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
					t.Errorf("%v, want %v", err, c.want)
				}
				if calls := ops(d.Calls()); !slices.Equal(calls, c.calls) && !(waits(c.step) && len(calls) > len(c.calls)) {
					t.Errorf("requests %v, want %v", calls, c.calls)
				}
				if got, ok := d.Object("k.x"); ok != (c.want == nil) || ok && !bytes.Equal(got, data) {
					t.Errorf("the store has %d bytes (%v), %d were sent", len(got), ok, len(data))
				}
			})
		}
	}
}

func ops(calls []string) (out []string) {
	for _, c := range calls {
		op, _, _ := bytes.Cut([]byte(c), []byte(" "))
		out = append(out, string(op))
	}
	return out
}

// What goes wrong with a read: it goes on behind the last good byte, and what comes in the end is right or an error.
func TestDoubleGet(t *testing.T) {
	data := make([]byte, 100_000)
	for i := range data {
		data[i] = byte(i * i >> 8)
	}
	for _, c := range []struct {
		name string
		step Step
		want error
		gets int
	}{
		{"good", Step{Op: "put"}, nil, 1},
		{"cut", Step{Op: "get", Cut: 3000, Times: 2}, nil, 3},
		{"cut for ever", Step{Op: "get", Cut: 1}, objstore.ErrTruncated, doubleTries},
		{"stalls", Step{Op: "get", Stall: 5000, Times: 1}, nil, 2},
		{"no answer", Step{Op: "get", Silent: true, Times: 1}, nil, 2},
		{"no answer for ever", Step{Op: "get", Silent: true}, objstore.ErrTimeout, doubleTries},
		{"throttled", Step{Op: "get", Status: 503, Code: "SlowDown", Times: 1}, nil, 2},
		{"reset", Step{Op: "get", Reset: true, Times: 1}, nil, 2},
		{"gone", Step{Op: "get", Status: 404, Code: "NoSuchKey"}, objstore.ErrNotFound, 1},
		{"no bucket", Step{Op: "get", Status: 404, Code: "NoSuchBucket"}, objstore.ErrBucketNotFound, 1},
		{"denied", Step{Op: "get", Status: 403, Code: "AccessDenied"}, objstore.ErrAccess, 1},
	} {
		for _, sdk := range sdks {
			for _, rg := range []objstore.Range{objstore.Whole, {Off: 1000, Len: 80_000}} {
				t.Run(fmt.Sprintf("%s/%s/%d", c.name, sdk, rg.Off), func(t *testing.T) {
					d, b := double(t, sdk, c.step)
					if _, err := b.Put(t.Context(), "k.x", objstore.Bytes(data), objstore.PutOptions{}); err != nil {
						t.Fatal(err)
					}
					d.Script(c.step)
					d.Calls()
					off, n, _ := rg.Resolve(int64(len(data)))
					got := make([]byte, n)
					err := objstore.ReadFull(t.Context(), b, "k.x", rg, got)
					if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
						t.Errorf("%v, want %v", err, c.want)
					}
					if err == nil && !bytes.Equal(got, data[off:off+n]) {
						t.Error("other bytes")
					}
					if calls := d.Calls(); len(calls) != c.gets && !(waits(c.step) && len(calls) > c.gets) {
						t.Errorf("%d requests, want %d: %v", len(calls), c.gets, calls)
					}
				})
			}
		}
	}
}

// An object that is replaced while it is read is never put together from two.
func TestDoubleObjectChangesWhileItIsRead(t *testing.T) {
	for _, sdk := range sdks {
		t.Run(sdk, func(t *testing.T) {
			d, b := double(t, sdk)
			put := func(c byte) {
				if _, err := b.Put(t.Context(), "k.x", objstore.Bytes(bytes.Repeat([]byte{c}, 50_000)), objstore.PutOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			put('a')
			d.Script(Step{Op: "get", Cut: 1000, Times: 1})
			rc, _, err := b.Get(t.Context(), "k.x", objstore.Whole)
			if err != nil {
				t.Fatal(err)
			}
			defer rc.Close()
			put('b')
			got := make([]byte, 50_000)
			n := 0
			for err == nil && n < len(got) {
				var m int
				m, err = rc.Read(got[n:])
				n += m
			}
			if !errors.Is(err, objstore.ErrConflict) || bytes.IndexByte(got[:n], 'b') >= 0 {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
}

// Of many deletions only those that failed are asked for again.
func TestDoubleDelete(t *testing.T) {
	for _, sdk := range sdks {
		t.Run(sdk, func(t *testing.T) {
			d, b := double(t, sdk)
			var keys []string
			for i := range 20 {
				keys = append(keys, fmt.Sprintf("k%02d.x", i))
				if _, err := b.Put(t.Context(), keys[i], objstore.Bytes([]byte("v")), objstore.PutOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			d.Calls()
			d.Script(Step{Op: "delete each", Key: "k07", Code: "AccessDenied"})
			err := b.Delete(t.Context(), keys...)
			var de *objstore.DeleteError
			if !errors.As(err, &de) || len(de.Failed) != 1 || !errors.Is(err, objstore.ErrAccess) {
				t.Errorf("one denied: %v", err)
			}
			for i, k := range keys {
				if _, ok := d.Object(k); ok != (i == 7) {
					t.Errorf("%s is there: %v", k, ok)
				}
			}
			d.Script()
			if err := b.Delete(t.Context(), keys...); err != nil {
				t.Errorf("again: %v", err)
			}
			d.Script(Step{Op: "delete", Status: 503, Code: "SlowDown", Times: 1})
			d.Calls()
			if err := b.Delete(t.Context(), "k07.x"); err != nil || len(d.Calls()) != 2 {
				t.Errorf("throttled once: %v", err)
			}
		})
	}
}

// A store that says when to come back is not asked before; its clock is known.
func TestDoubleRetryAfterAndDate(t *testing.T) {
	for _, sdk := range sdks {
		t.Run(sdk, func(t *testing.T) {
			d, b := double(t, sdk)
			d.Script(Step{Op: "head", Status: 503, Code: "SlowDown", RetryAfter: 30})
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := b.Head(ctx, "k.x"); err == nil || len(d.Calls()) != 1 {
				t.Errorf("asked again within the 30 s that the store said: %v", err)
			}
			for _, skew := range []time.Duration{0, time.Hour, -10 * 365 * 24 * time.Hour} {
				d.Script(Step{Date: skew})
				_, _ = b.Head(t.Context(), "k.x") // there is none; the answer has a date
				at, ok := b.(objstore.Dater).StoreTime()
				if diff := time.Until(at) - skew; !ok || diff.Abs() > time.Minute {
					t.Errorf("skew %s: the store's time is %s away (%v)", skew, time.Until(at), ok)
				}
			}
		})
	}
}
