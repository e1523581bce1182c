package tiering

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// chunkKey names a piece of an object: whole index blocks of one run.
type chunkKey struct {
	shard  record.ShardID
	object segment.Number
	run    uint32 // Run.IndexAt: unique within an object
	chunk  int    // -1 = the run's index
}

// chunk is what the cache holds: checked bytes, or a parsed index.
type chunk struct {
	data   []byte
	blocks []segment.Block // of the index, or the blocks that data holds
	parts  []span          // of the index: how blocks are put together into chunks
}

// span is blocks[from:to] of a run.
type span struct{ from, to int }

func (c *chunk) bytes() int64 { return int64(len(c.data)) + int64(len(c.blocks))*48 + 100 }

// cache is a byte-bounded LRU with single-flight. Bytes in it have been checked and are never changed.
type cache struct {
	mu     sync.Mutex
	limit  int64
	size   int64
	ahead  int64      // bytes that were fetched ahead, or are being, and that nobody has asked for yet
	order  *list.List // of *cached, newest first
	m      map[chunkKey]*list.Element
	flight map[chunkKey]*flight
	failed map[chunkKey]failure // fetches that failed after all who had asked were gone: the next who asks is told
	m2     *metrics
	wg     sync.WaitGroup
	ctx    context.Context
	cancel context.CancelFunc
}

type cached struct {
	key    chunkKey
	c      *chunk
	unread bool // counted in cache.ahead
}

// flight is a fetch that is under way.
type flight struct {
	done    chan struct{}
	c       *chunk
	err     error
	ahead   int64 // its part of cache.ahead; 0 once somebody waits for it
	left    bool  // somebody asked for it and did not wait until it was done
	waiting int   // how many wait for it
}

// errPending: who asked has gone before the fetch was done.
var errPending = errors.New("tiering: not here yet")

// failure is the end of a fetch that nobody waited for.
type failure struct {
	err   error
	until time.Time // older news are no news
}

const (
	failureKept = 10 * time.Second
	failuresMax = 1000
)

func newCache(limit int64, m *metrics) *cache {
	ctx, cancel := context.WithCancel(context.Background())
	return &cache{limit: limit, order: list.New(), m: map[chunkKey]*list.Element{}, flight: map[chunkKey]*flight{}, failed: map[chunkKey]failure{}, m2: m, ctx: ctx, cancel: cancel}
}

// peek returns what is cached.
func (c *cache) peek(key chunkKey) *chunk {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.m[key]; e != nil {
		return c.touchLocked(e)
	}
	return nil
}

func (c *cache) touchLocked(e *list.Element) *chunk {
	c.order.MoveToFront(e)
	x := e.Value.(*cached)
	c.readLocked(x)
	return x.c
}

func (c *cache) readLocked(x *cached) {
	if x.unread {
		x.unread = false
		c.ahead -= x.c.bytes()
	}
}

// start returns the fetch of key, beginning it if nobody has. It goes on whatever becomes of the caller.
func (c *cache) start(key chunkKey, fetch func(context.Context) (*chunk, error)) *flight {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.m[key]; e != nil {
		f := &flight{done: make(chan struct{}), c: c.touchLocked(e)}
		close(f.done)
		c.m2.cache.WithLabelValues("memory", "hit").Inc()
		return f
	}
	if f := c.flight[key]; f != nil {
		c.ahead -= f.ahead
		f.ahead = 0
		f.waiting++
		c.m2.coalesced.Inc()
		return f
	}
	if x, ok := c.failed[key]; ok {
		delete(c.failed, key)
		if time.Now().Before(x.until) {
			f := &flight{done: make(chan struct{}), err: x.err}
			close(f.done)
			return f
		}
	}
	c.m2.cache.WithLabelValues("memory", "miss").Inc()
	f := c.flyLocked(key, 0, fetch)
	f.waiting++
	return f
}

// startAhead begins the fetch of about size bytes that nobody has asked for yet. It reports false if what was fetched ahead and is not used yet has half of the cache:
// more would push out what somebody is about to read.
func (c *cache) startAhead(key chunkKey, size int64, fetch func(context.Context) (*chunk, error)) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.m[key] != nil || c.flight[key] != nil:
		return true
	case c.ahead+size > c.limit/2:
		return false
	}
	c.m2.cache.WithLabelValues("memory", "ahead").Inc()
	c.flyLocked(key, size, fetch)
	return true
}

func (c *cache) flyLocked(key chunkKey, ahead int64, fetch func(context.Context) (*chunk, error)) *flight {
	f := &flight{done: make(chan struct{}), ahead: ahead}
	c.flight[key] = f
	c.ahead += ahead
	c.wg.Go(func() {
		f.c, f.err = fetch(c.ctx)
		c.mu.Lock()
		delete(c.flight, key)
		c.ahead -= f.ahead
		switch {
		case f.err == nil:
			c.addLocked(key, f.c, f.ahead > 0)
		case f.left && f.waiting == 0:
			if len(c.failed) >= failuresMax {
				clear(c.failed)
			}
			c.failed[key] = failure{f.err, time.Now().Add(failureKept)}
		}
		close(f.done)
		c.mu.Unlock()
	})
	return f
}

// get waits for a fetch until ctx ends. A fetch that fails later is told to the next who asks: who never waits must learn of it too.
func (c *cache) get(ctx context.Context, key chunkKey, fetch func(context.Context) (*chunk, error)) (*chunk, error) {
	f := c.start(key, fetch)
	select {
	case <-f.done: // also when ctx has ended: what is here is here
		return f.c, f.err
	default:
	}
	select {
	case <-f.done:
		return f.c, f.err
	case <-ctx.Done():
		c.mu.Lock()
		defer c.mu.Unlock()
		select {
		case <-f.done: // just now
			return f.c, f.err
		default:
		}
		f.waiting--
		f.left = true
		return nil, fmt.Errorf("%w: %w", errPending, ctx.Err())
	}
}

func (c *cache) addLocked(key chunkKey, x *chunk, unread bool) {
	c.m[key] = c.order.PushFront(&cached{key, x, unread})
	c.size += x.bytes()
	if unread {
		c.ahead += x.bytes()
	}
	for c.size > c.limit && c.order.Len() > 1 {
		last := c.order.Back()
		old := last.Value.(*cached)
		c.removeLocked(last)
		c.m2.evicted.Add(float64(old.c.bytes()))
	}
	c.m2.cacheBytes.Set(float64(c.size))
}

// used says that a sequential reader has read the chunk to its end: it is the first to make room.
func (c *cache) used(key chunkKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.m[key]; e != nil {
		c.order.MoveToBack(e)
	}
}

func (c *cache) removeLocked(e *list.Element) {
	x := e.Value.(*cached)
	c.readLocked(x)
	c.order.Remove(e)
	delete(c.m, x.key)
	c.size -= x.c.bytes()
	c.m2.cacheBytes.Set(float64(c.size))
}

// drop forgets everything of an object.
func (c *cache) drop(s record.ShardID, n segment.Number) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, e := range c.m {
		if k.shard == s && k.object == n {
			c.removeLocked(e)
		}
	}
}

func (c *cache) close() {
	c.cancel()
	c.wg.Wait()
}
