package tiering

import (
	"container/list"
	"context"
	"sync"

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
	order  *list.List // of *cached, newest first
	m      map[chunkKey]*list.Element
	flight map[chunkKey]*flight
	m2     *metrics
	wg     sync.WaitGroup
	ctx    context.Context
	cancel context.CancelFunc
}

type cached struct {
	key chunkKey
	c   *chunk
}

// flight is a fetch that is under way.
type flight struct {
	done chan struct{}
	c    *chunk
	err  error
}

func newCache(limit int64, m *metrics) *cache {
	ctx, cancel := context.WithCancel(context.Background())
	return &cache{limit: limit, order: list.New(), m: map[chunkKey]*list.Element{}, flight: map[chunkKey]*flight{}, m2: m, ctx: ctx, cancel: cancel}
}

// peek returns what is cached.
func (c *cache) peek(key chunkKey) *chunk {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.m[key]; e != nil {
		c.order.MoveToFront(e)
		return e.Value.(*cached).c
	}
	return nil
}

// start returns the fetch of key, beginning it if nobody has. It goes on whatever becomes of the caller.
func (c *cache) start(key chunkKey, fetch func(context.Context) (*chunk, error)) *flight {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.m[key]; e != nil {
		c.order.MoveToFront(e)
		f := &flight{done: make(chan struct{}), c: e.Value.(*cached).c}
		close(f.done)
		c.m2.cache.WithLabelValues("memory", "hit").Inc()
		return f
	}
	if f := c.flight[key]; f != nil {
		c.m2.coalesced.Inc()
		return f
	}
	c.m2.cache.WithLabelValues("memory", "miss").Inc()
	f := &flight{done: make(chan struct{})}
	c.flight[key] = f
	c.wg.Go(func() {
		f.c, f.err = fetch(c.ctx)
		c.mu.Lock()
		delete(c.flight, key)
		if f.err == nil {
			c.addLocked(key, f.c)
		}
		c.mu.Unlock()
		close(f.done)
	})
	return f
}

// get waits for a fetch until ctx ends.
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
		return nil, ctx.Err()
	}
}

func (c *cache) addLocked(key chunkKey, x *chunk) {
	c.m[key] = c.order.PushFront(&cached{key, x})
	c.size += x.bytes()
	for c.size > c.limit && c.order.Len() > 1 {
		last := c.order.Back()
		old := last.Value.(*cached)
		c.order.Remove(last)
		delete(c.m, old.key)
		c.size -= old.c.bytes()
		c.m2.evicted.Add(float64(old.c.bytes()))
	}
	c.m2.cacheBytes.Set(float64(c.size))
}

// drop forgets everything of an object.
func (c *cache) drop(s record.ShardID, n segment.Number) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, e := range c.m {
		if k.shard == s && k.object == n {
			c.size -= e.Value.(*cached).c.bytes()
			c.order.Remove(e)
			delete(c.m, k)
		}
	}
}

func (c *cache) close() {
	c.cancel()
	c.wg.Wait()
}
