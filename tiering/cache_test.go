package tiering

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/estran/estran/tiering/segment"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func newTestCache(t *testing.T, limit int64) *cache {
	c := newCache(limit, newMetrics(prometheus.NewRegistry()))
	t.Cleanup(c.close)
	return c
}

func numbered(n int) chunkKey { return chunkKey{shard: shard, object: segment.Number(n), chunk: 0} }

func of(size int) func(context.Context) (*chunk, error) {
	return func(context.Context) (*chunk, error) { return &chunk{data: make([]byte, size)}, nil }
}

// verify counts anew what the cache counts as it goes, and asserts its bounds.
func (c *cache) verify(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	var size, ahead int64
	for e := c.order.Front(); e != nil; e = e.Next() {
		x := e.Value.(*cached)
		size += x.c.bytes()
		if x.unread {
			ahead += x.c.bytes()
		}
		if c.m[x.key] != e {
			t.Fatalf("%v is in the order and not in the table", x.key)
		}
	}
	for _, f := range c.flight {
		ahead += f.ahead
	}
	switch {
	case size != c.size || len(c.m) != c.order.Len():
		t.Fatalf("the cache holds %d bytes in %d chunks, it counts %d in %d", size, c.order.Len(), c.size, len(c.m))
	case ahead != c.ahead:
		t.Fatalf("%d bytes were fetched ahead, %d are counted", ahead, c.ahead)
	case size > c.limit && c.order.Len() > 1:
		t.Fatalf("%d bytes, at most %d", size, c.limit)
	case testutil.ToFloat64(c.m2.cacheBytes) != float64(size):
		t.Fatalf("the metric says %v, it is %d", testutil.ToFloat64(c.m2.cacheBytes), size)
	}
}

// Whatever is done in whatever order: what is counted is what is there, and it stays within its bounds.
func TestCacheCounts(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			const limit = 10_000
			c := newTestCache(t, limit)
			var open []chan struct{} // fetches that are under way
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			for range 300 {
				key := numbered(rng.IntN(20))
				size := rng.IntN(limit / 3)
				gate := make(chan struct{})
				fetch := func(context.Context) (*chunk, error) {
					<-gate
					if size%10 == 0 {
						return nil, errDown
					}
					return &chunk{data: make([]byte, size)}, nil
				}
				open = append(open, gate)
				switch rng.IntN(6) {
				case 0, 1:
					c.startAhead(key, limit/4, fetch)
				case 2, 3:
					_, _ = c.get(ended, key, fetch)
				case 4:
					c.peek(key)
				case 5:
					c.used(key)
				}
				if rng.IntN(20) == 0 {
					c.drop(shard, key.object)
				}
				for len(open) > rng.IntN(8) { // in any order
					i := rng.IntN(len(open))
					close(open[i])
					open = append(open[:i], open[i+1:]...)
				}
				synctest.Wait()
				c.verify(t)
			}
			for _, g := range open {
				close(g)
			}
			synctest.Wait()
			c.verify(t)
			if len(c.flight) > 0 {
				t.Errorf("%d fetches are under way for ever", len(c.flight))
			}
		})
	}
}

// Many who want the same cause one fetch; they get the same bytes, and none has to fetch again.
func TestCacheSingleFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCache(t, 1<<20)
		gate := make(chan struct{})
		var fetches atomic.Int32
		fetch := func(context.Context) (*chunk, error) {
			fetches.Add(1)
			<-gate
			return &chunk{data: []byte("x")}, nil
		}
		got := make([]*chunk, 50)
		var wg sync.WaitGroup
		for i := range got {
			wg.Go(func() { got[i], _ = c.get(t.Context(), numbered(1), fetch) })
		}
		synctest.Wait()
		close(gate)
		wg.Wait()
		for _, x := range got {
			if x == nil || x != got[0] {
				t.Fatal("not all have the same")
			}
		}
		if _, err := c.get(t.Context(), numbered(1), fetch); err != nil || fetches.Load() != 1 {
			t.Errorf("%d fetches, %v", fetches.Load(), err)
		}
	})
}

// A fetch that failed fails for all who waited for it, and is not remembered: the next one begins anew.
func TestCacheFailureIsNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCache(t, 1<<20)
		gate := make(chan struct{})
		fail := func(context.Context) (*chunk, error) { <-gate; return nil, errDown }
		errs := make(chan error, 10)
		for range cap(errs) {
			go func() {
				_, err := c.get(t.Context(), numbered(1), fail)
				errs <- err
			}()
		}
		synctest.Wait()
		close(gate)
		for range cap(errs) {
			if err := <-errs; !errors.Is(err, errDown) {
				t.Errorf("%v", err)
			}
		}
		if x, err := c.get(t.Context(), numbered(1), of(1)); err != nil || x == nil {
			t.Errorf("after the failure: %v", err)
		}
		c.verify(t)
	})
}

// What was read last stays; what a sequential reader has finished goes first; a chunk larger than the cache is there alone.
func TestCacheOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCache(t, 4*1100)
		have := func(want ...int) {
			t.Helper()
			synctest.Wait()
			c.mu.Lock()
			defer c.mu.Unlock()
			var got []int
			for e := c.order.Front(); e != nil; e = e.Next() {
				got = append(got, int(e.Value.(*cached).key.object))
			}
			if len(got) != len(want) {
				t.Fatalf("there are %v, want %v", got, want)
			}
			for i := range got {
				if got[i] != want[i] {
					t.Fatalf("there are %v, want %v", got, want)
				}
			}
		}
		for n := range 4 {
			_, _ = c.get(t.Context(), numbered(n), of(1000))
		}
		have(3, 2, 1, 0)
		c.peek(numbered(0))
		have(0, 3, 2, 1)
		_, _ = c.get(t.Context(), numbered(4), of(1000))
		have(4, 0, 3, 2)
		c.used(numbered(0))
		_, _ = c.get(t.Context(), numbered(5), of(1000))
		have(5, 4, 3, 2)
		_, _ = c.get(t.Context(), numbered(6), of(50_000))
		have(6)
		_, _ = c.get(t.Context(), numbered(7), of(1))
		have(7)
		c.verify(t)
	})
}

// What nobody has asked for has half of the cache at most, also while it is under way; somebody who comes for it makes room for more.
func TestCacheAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCache(t, 10_000)
		gate := make(chan struct{})
		slow := func(context.Context) (*chunk, error) { <-gate; return &chunk{data: make([]byte, 1900)}, nil } // 2000 with what it costs
		for n := range 2 {
			if !c.startAhead(numbered(n), 2500, slow) {
				t.Fatalf("fetch %d was not begun", n)
			}
		}
		if c.startAhead(numbered(2), 2500, slow) {
			t.Error("more than half")
		}
		if !c.startAhead(numbered(1), 2500, slow) {
			t.Error("what is under way is not refused")
		}
		done := make(chan struct{})
		go func() { _, _ = c.get(t.Context(), numbered(0), slow); close(done) }()
		synctest.Wait()
		if !c.startAhead(numbered(2), 2500, slow) {
			t.Error("one was asked for: there is room")
		}
		close(gate)
		<-done
		synctest.Wait()
		c.verify(t)
		if c.ahead != 4000 {
			t.Errorf("%d bytes ahead, want 4000", c.ahead)
		}
		c.peek(numbered(1))
		c.peek(numbered(1))
		if c.ahead != 2000 {
			t.Errorf("%d bytes ahead after one was read, want 2000", c.ahead)
		}
		c.verify(t)
	})
}

// Close ends what is under way and waits for it.
func TestCacheClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCache(t, 1000)
		ended := false
		c.startAhead(numbered(1), 1, func(ctx context.Context) (*chunk, error) { <-ctx.Done(); ended = true; return nil, ctx.Err() })
		c.close()
		if !ended {
			t.Error("a fetch outlives its cache")
		}
	})
}
