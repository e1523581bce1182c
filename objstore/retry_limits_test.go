package objstore_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/mem"
)

// scripted answers GETs one after the other with what its script says; the last entry goes on.
type scripted struct {
	objstore.Bucket
	script []func(ctx context.Context, body io.ReadCloser) (io.ReadCloser, error)
	gets   int
}

func (s *scripted) Get(ctx context.Context, key string, r objstore.Range) (io.ReadCloser, objstore.Info, error) {
	do := s.script[min(s.gets, len(s.script)-1)]
	s.gets++
	rc, info, err := s.Bucket.Get(ctx, key, r)
	if err != nil {
		return nil, info, err
	}
	rc, err = do(ctx, rc)
	return rc, info, err
}

func whole(_ context.Context, b io.ReadCloser) (io.ReadCloser, error) { return b, nil }

func refuse(context.Context, io.ReadCloser) (io.ReadCloser, error) {
	return nil, kind(objstore.ErrUnavailable, true)
}

// cutAfter ends a body after n bytes.
func cutAfter(n int64) func(context.Context, io.ReadCloser) (io.ReadCloser, error) {
	return func(_ context.Context, b io.ReadCloser) (io.ReadCloser, error) {
		return io.NopCloser(io.LimitReader(b, n)), nil
	}
}

// drip gives a byte at a time with a pause before each.
func drip(pause time.Duration) func(context.Context, io.ReadCloser) (io.ReadCloser, error) {
	return func(ctx context.Context, b io.ReadCloser) (io.ReadCloser, error) {
		return io.NopCloser(&dripping{ctx, b, pause}), nil
	}
}

type dripping struct {
	ctx   context.Context
	b     io.Reader
	pause time.Duration
}

func (d *dripping) Read(p []byte) (int, error) {
	select {
	case <-time.After(d.pause):
		return d.b.Read(p[:1])
	case <-d.ctx.Done():
		return 0, d.ctx.Err()
	}
}

// What goes wrong with opening and with reading counts together: a GET is never asked for more often than the policy says, and goes on behind the last good byte.
func TestTriesOfAGet(t *testing.T) {
	data := []byte("0123456789")
	type answer = func(context.Context, io.ReadCloser) (io.ReadCloser, error)
	for _, c := range []struct {
		name   string
		script []answer
		gets   int
		want   error
	}{
		{"good", []answer{whole}, 1, nil},
		{"refused and cut by turns", []answer{refuse, cutAfter(1), refuse, cutAfter(1), refuse, cutAfter(1), whole}, 5, objstore.ErrUnavailable},
		{"refused three times, then cut", []answer{refuse, refuse, refuse, cutAfter(5), whole}, 5, nil},
		{"cut four times", []answer{cutAfter(2), cutAfter(2), cutAfter(2), cutAfter(2), whole}, 5, nil},
		{"cut for ever", []answer{cutAfter(1)}, 5, objstore.ErrTruncated},
		{"refused for ever once it has begun", []answer{cutAfter(1), refuse}, 5, objstore.ErrUnavailable},
		{"a slow body that moves", []answer{drip(4 * time.Second)}, 1, nil},
		{"one that stands still", []answer{drip(6 * time.Second), whole}, 2, nil},
		{"that stands still for ever", []answer{drip(6 * time.Second)}, 5, objstore.ErrTimeout},
		{"no answer for ever", []answer{func(ctx context.Context, _ io.ReadCloser) (io.ReadCloser, error) { <-ctx.Done(); return nil, ctx.Err() }}, 5, objstore.ErrTimeout},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &scripted{Bucket: mem.New(), script: c.script}
				b := objstore.Retry(s, objstore.Policy{}, nil)
				if _, err := b.Put(t.Context(), "k.x", objstore.Bytes(data), objstore.PutOptions{}); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(data))
				err := objstore.ReadFull(t.Context(), b, "k.x", objstore.Whole, got)
				if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) || err == nil && !bytes.Equal(got, data) {
					t.Errorf("%q %v, want %v", got, err, c.want)
				}
				if s.gets != c.gets {
					t.Errorf("%d requests, want %d", s.gets, c.gets)
				}
			})
		})
	}
}

// The watchdog watches the store, not the caller: a body may be opened long before it is read, and read with pauses.
func TestCallerMayTakeItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{Bucket: mem.New(), script: []func(context.Context, io.ReadCloser) (io.ReadCloser, error){drip(time.Second)}}
		b := objstore.Retry(s, objstore.Policy{}, nil)
		if _, err := b.Put(t.Context(), "k.x", objstore.Bytes([]byte("value")), objstore.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		rc, _, err := b.Get(t.Context(), "k.x", objstore.Whole)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		var got []byte
		for range 5 {
			time.Sleep(time.Minute)
			p := make([]byte, 1)
			if _, err := io.ReadFull(rc, p); err != nil {
				t.Fatal(err)
			}
			got = append(got, p...)
		}
		if string(got) != "value" || s.gets != 1 {
			t.Errorf("%q in %d requests", got, s.gets)
		}
	})
}

// deleter fails to delete some keys, in one answer for all.
type deleter struct {
	objstore.Bucket
	fail  func(call int, key string) error
	calls [][]string
}

func (d *deleter) Delete(_ context.Context, keys ...string) error {
	slices.Sort(keys)
	d.calls = append(d.calls, slices.Clone(keys))
	failed := map[string]error{}
	for _, k := range keys {
		if err := d.fail(len(d.calls), k); err != nil {
			failed[k] = err
		}
	}
	if len(failed) > 0 {
		return &objstore.DeleteError{Failed: failed}
	}
	return nil
}

// Of many deletions those that may succeed later are repeated, whatever else is wrong with others, and all that were not done are told in the end.
func TestDeletionsOfWhichSomeAreDenied(t *testing.T) {
	keys := []string{"a.x", "b.x", "c.x", "d.x", "e.x", "f.x"}
	for _, c := range []struct {
		name  string
		fail  func(call int, key string) error
		calls string
		left  string
	}{
		{"one is denied, the others wait", func(call int, key string) error {
			switch {
			case key == "c.x":
				return kind(objstore.ErrAccess, false)
			case call < 3 && key > "b.x":
				return kind(objstore.ErrThrottled, true)
			}
			return nil
		}, "abcdef def def", "c"},
		{"all denied", func(int, string) error { return kind(objstore.ErrAccess, false) }, "abcdef", "abcdef"},
		{"two for ever, one denied", func(_ int, key string) error {
			switch key {
			case "a.x":
				return kind(objstore.ErrAccess, false)
			case "b.x", "f.x":
				return kind(objstore.ErrThrottled, true)
			}
			return nil
		}, "abcdef bf bf bf", "abf"},
	} {
		for range 10 { // the order of a map must not decide
			synctest.Test(t, func(t *testing.T) {
				d := &deleter{Bucket: mem.New(), fail: c.fail}
				err := objstore.Retry(d, quick, nil).Delete(t.Context(), slices.Clone(keys)...)
				var calls []string
				for _, k := range d.calls {
					calls = append(calls, strings.ReplaceAll(strings.Join(k, ""), ".x", ""))
				}
				if got := strings.Join(calls, " "); got != c.calls {
					t.Errorf("%s: asked for %q, want %q", c.name, got, c.calls)
				}
				var de *objstore.DeleteError
				left := ""
				if errors.As(err, &de) {
					for _, k := range keys {
						if de.Failed[k] != nil {
							left += strings.TrimSuffix(k, ".x")
						}
					}
				}
				if left != c.left || len(de.Failed) != len(left) {
					t.Errorf("%s: %q are said to be left, want %q: %v", c.name, left, c.left, err)
				}
			})
		}
	}
}

// However long a store is away, what is asked of it stays in proportion: the budget is earned by what succeeds.
func TestRetryBudgetIsEarnedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, b := faulty()
		if _, err := b.Put(t.Context(), "k.x", objstore.Bytes(nil), objstore.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		down := objstore.Rule{Op: "head", P: 1, Err: kind(objstore.ErrUnavailable, true)}
		count := func(n int) int {
			f.Trace()
			for range n {
				_, _ = b.Head(t.Context(), "k.x")
			}
			return len(f.Trace())
		}
		f.Set(down)
		if n := count(1000); n != 1000+20 {
			t.Errorf("%d requests for 1000 calls", n)
		}
		f.Set()
		count(50) // earn five
		f.Set(down)
		if n := count(100); n < 100+4 || n > 100+5 {
			t.Errorf("%d requests for 100 calls after 50 that succeeded", n)
		}
	})
}

// Once Put has returned its body is not read any more, whatever the transport is still doing: its owner may have closed what it reads from.
func TestBodyIsGivenBack(t *testing.T) {
	k := &keeper{Bucket: mem.New()}
	b := objstore.Retry(k, quick, nil)
	lent := &countedBody{data: "value"}
	if _, err := b.Put(t.Context(), "k.x", objstore.Body{R: lent, Size: 5}, objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	before := lent.reads
	for _, body := range k.bodies {
		if n, err := body.R.ReadAt(make([]byte, 5), 0); n > 0 || err == nil {
			t.Errorf("%d bytes were read after the Put", n)
		}
	}
	if lent.reads != before || len(k.bodies) != 2 || before == 0 {
		t.Errorf("%d reads during the Put, %d after it, %d tries", before, lent.reads-before, len(k.bodies))
	}
}

// keeper keeps bodies, and refuses the first.
type keeper struct {
	objstore.Bucket
	bodies []objstore.Body
}

func (k *keeper) Put(ctx context.Context, key string, b objstore.Body, o objstore.PutOptions) (objstore.Info, error) {
	if k.bodies = append(k.bodies, b); len(k.bodies) == 1 {
		return objstore.Info{}, kind(objstore.ErrThrottled, true)
	}
	return k.Bucket.Put(ctx, key, b, o)
}

type countedBody struct {
	data  string
	reads int
}

func (c *countedBody) ReadAt(p []byte, off int64) (int, error) {
	c.reads++
	return strings.NewReader(c.data).ReadAt(p, off)
}
