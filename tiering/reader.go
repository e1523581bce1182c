package tiering

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sort"
	"sync"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

const (
	// chunkBytes is the size of a GET of sealed data, but for the end of a run.
	chunkBytes = 2 << 20
	// aheadMax is how many chunks are fetched ahead of a sequential reader.
	aheadMax = 4
	// streamsMax bounds the readers that are remembered.
	streamsMax = 4096
)

// Reader reads a partition as one log, whatever tier its bytes are in. Safe for concurrent use.
type Reader struct {
	cfg    Config
	hot    HotLog
	cat    View
	bucket objstore.Bucket
	m      *metrics
	cache  *cache
	gets   chan struct{}

	mu      sync.Mutex
	streams map[record.TopicPartition]*list.Element
	recent  *list.List // of *stream
}

// stream remembers where a partition was last read from objects, to fetch ahead of sequential readers.
type stream struct {
	tp    record.TopicPartition
	next  record.Offset
	ahead int
}

// NewReader returns a Reader; t gives settings and metrics.
func NewReader(t *Tiering, hot HotLog) *Reader {
	return newReader(t.cfg, t.cat, hot, t.bucket, t.m)
}

// NewReadOnly returns the Reader of a node that changes nothing: it gets objects from the bucket, and does nothing else with it.
func NewReadOnly(cfg Config, view View, hot HotLog, bucket objstore.Bucket) *Reader {
	cfg.defaults()
	return newReader(cfg, view, hot, bucket, newMetrics(cfg.Registerer))
}

func newReader(cfg Config, view View, hot HotLog, bucket objstore.Bucket, m *metrics) *Reader {
	return &Reader{cfg: cfg, hot: hot, cat: view, bucket: bucket, m: m, cache: newCache(cfg.CacheBytes, m), gets: make(chan struct{}, cfg.ColdReads),
		streams: map[record.TopicPartition]*list.Element{}, recent: list.New()}
}

// Close ends fetches that are under way.
func (r *Reader) Close() { r.cache.close() }

// Read returns whole batches from the one that holds `from` on. Below the log start and above the high watermark it fails with ErrOutOfRange; at
// or above l.UpTo the result is empty. If bytes must come from the object store and are not there when ctx ends, the result is empty too: the fetch goes on and
// a later Read finds them, or is told why not. An offset is never skipped: what cannot be read is ErrStorage.
func (r *Reader) Read(ctx context.Context, tp record.TopicPartition, from record.Offset, l Limits) (Result, error) {
	b, ok := r.cat.Bounds(tp)
	switch {
	case !ok:
		return Result{}, ErrUnknownPartition
	case from < b.LogStart || from > b.HighWatermark:
		return Result{}, fmt.Errorf("%w: %d, the log is %d to %d", ErrOutOfRange, from, b.LogStart, b.HighWatermark)
	case from >= l.UpTo:
		return Result{Next: from}, nil
	}
	res, err := r.hot.ReadHot(ctx, tp, from, l)
	if !errors.Is(err, ErrNotLocal) {
		return res, err
	}
	res, err = r.readObjects(ctx, tp, from, l)
	switch {
	case err == nil:
		return res, nil
	case errors.Is(err, errPending):
		return Result{Next: from, Tier: TierObject}, nil
	}
	// The object may have gone since the manifest was read: look once more.
	if b, ok = r.cat.Bounds(tp); !ok {
		return Result{}, ErrUnknownPartition
	} else if from < b.LogStart {
		return Result{}, fmt.Errorf("%w: %d, the log is %d to %d", ErrOutOfRange, from, b.LogStart, b.HighWatermark)
	}
	if res, again := r.readObjects(ctx, tp, from, l); again == nil {
		return res, nil
	}
	if hot, herr := r.hot.ReadHot(ctx, tp, from, l); herr == nil {
		return hot, nil
	}
	r.cfg.Logger.Error("sealed data cannot be read", "component", "tier", "partition", tp, "offset", from, "err", err)
	return Result{}, fmt.Errorf("%w: %s at offset %d: %w", ErrStorage, tp, from, err)
}

// readObjects reads from the chunk that holds `from`, and goes on through chunks that are already here.
func (r *Reader) readObjects(ctx context.Context, tp record.TopicPartition, from record.Offset, l Limits) (Result, error) {
	res := Result{Next: from, Tier: TierObject}
	ahead := r.sequential(tp, from)
	for {
		runs := r.cat.Runs(tp, res.Next, 2)
		if len(runs) == 0 || runs[0].Run.StartOffset > res.Next {
			if res.Bytes > 0 {
				break
			}
			return res, fmt.Errorf("no run holds offset %d", res.Next)
		}
		c, k, err := r.chunkAt(ctx, &runs[0], res.Next, res.Bytes > 0)
		if err != nil {
			if res.Bytes > 0 {
				break
			}
			return res, err
		}
		if c == nil { // not here yet: answer with what there is
			r.prefetch(runs, k, ahead)
			break
		}
		before := res.Next
		full, err := take(c.data, l, &res)
		if err != nil {
			r.cache.drop(runs[0].Object.Shard, runs[0].Object.Number)
			return res, err
		}
		if !full {
			r.cache.used(keyOf(&runs[0], k))
		}
		r.prefetch(runs, k+1, ahead)
		if full || res.Next == before || res.Next > runs[0].Run.EndOffset && len(runs) < 2 {
			break
		}
	}
	r.remember(tp, res.Next, ahead)
	return res, nil
}

// take adds batches of checked data from res.Next on; full is true when a limit was reached.
func take(data []byte, l Limits, res *Result) (full bool, err error) {
	start, end := -1, 0
	for at := 0; at < len(data); {
		b, _, err := record.Next(data[at:])
		if err != nil {
			return false, fmt.Errorf("%w: %w", segment.ErrCorrupt, err)
		}
		if b.LastOffset() < res.Next {
			at += len(b)
			continue
		}
		if b.BaseOffset() >= l.UpTo || res.Bytes+len(b) > l.MaxBytes && (res.Bytes > 0 || !l.AtLeastOne) {
			full = true
			break
		}
		if start < 0 {
			start = at
		}
		at += len(b)
		end = at
		res.Bytes += len(b)
		res.Next = b.LastOffset() + 1
	}
	if start >= 0 {
		res.Buffers = append(res.Buffers, data[start:end:end])
	}
	return full, nil
}

// sequential returns how far ahead of this read to fetch.
func (r *Reader) sequential(tp record.TopicPartition, from record.Offset) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.streams[tp]; e != nil {
		if s := e.Value.(*stream); s.next == from {
			return min(max(1, 2*s.ahead), aheadMax)
		}
	}
	return 1
}

func (r *Reader) remember(tp record.TopicPartition, next record.Offset, ahead int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.streams[tp]
	if e == nil {
		e = r.recent.PushFront(&stream{tp: tp})
		r.streams[tp] = e
		if r.recent.Len() > streamsMax {
			last := r.recent.Back()
			r.recent.Remove(last)
			delete(r.streams, last.Value.(*stream).tp)
		}
	}
	s := e.Value.(*stream)
	s.next, s.ahead = next, ahead
	r.recent.MoveToFront(e)
}

// index returns a run's index.
func (r *Reader) index(ctx context.Context, ref *RunRef) (*chunk, error) {
	return r.cache.get(ctx, keyOf(ref, -1), func(ctx context.Context) (*chunk, error) {
		var blocks []segment.Block
		_, err := r.fetchChecked(ctx, &ref.Object, ref.Object.Size-int64(ref.Run.IndexAt), int64(ref.Run.IndexBytes), func(data []byte) (err error) {
			blocks, err = segment.ParseIndex(data)
			return err
		})
		if err != nil {
			return nil, err
		}
		c := &chunk{blocks: blocks}
		for i := 0; i < len(blocks); {
			j, n := i, int64(0)
			for j < len(blocks) && (j == i || n+int64(blocks[j].Length) <= chunkBytes) {
				n += int64(blocks[j].Length)
				j++
			}
			c.parts = append(c.parts, span{i, j})
			i = j
		}
		return c, nil
	})
}

func keyOf(ref *RunRef, n int) chunkKey {
	return chunkKey{ref.Object.Shard, ref.Object.Number, ref.Run.IndexAt, n}
}

// chunkAt returns the chunk of a run that holds offset, and its number. With onlyCached it returns nil if that would have to be waited for.
func (r *Reader) chunkAt(ctx context.Context, ref *RunRef, offset record.Offset, onlyCached bool) (*chunk, int, error) {
	if onlyCached && r.cache.peek(keyOf(ref, -1)) == nil {
		return nil, 0, nil
	}
	idx, err := r.index(ctx, ref)
	if err != nil {
		return nil, 0, err
	}
	k := sort.Search(len(idx.parts), func(i int) bool { return idx.blocks[idx.parts[i].to-1].Last >= offset })
	if k == len(idx.parts) {
		return nil, 0, fmt.Errorf("%w: the index of object %d does not reach offset %d", segment.ErrCorrupt, ref.Object.Number, offset)
	}
	if onlyCached {
		return r.cache.peek(keyOf(ref, k)), k, nil
	}
	c, err := r.cache.get(ctx, keyOf(ref, k), func(ctx context.Context) (*chunk, error) { return r.fill(ctx, ref, idx, k) })
	return c, k, err
}

// fill fetches chunk k of a run and checks every block of it.
func (r *Reader) fill(ctx context.Context, ref *RunRef, idx *chunk, k int) (*chunk, error) {
	blocks := idx.blocks[idx.parts[k].from:idx.parts[k].to]
	first, last := blocks[0], blocks[len(blocks)-1]
	n := last.Position + int64(last.Length) - first.Position
	data, err := r.fetchChecked(ctx, &ref.Object, first.Position, n, func(data []byte) error {
		for i := range blocks {
			at := blocks[i].Position - first.Position
			if at < 0 || at+int64(blocks[i].Length) > n {
				return fmt.Errorf("%w: index of object %d", segment.ErrCorrupt, ref.Object.Number)
			}
			if err := blocks[i].Check(data[at : at+int64(blocks[i].Length)]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &chunk{data: data}, nil
}

// fetchChecked fetches bytes of an object that must pass check. Damage on the way is not damage in the store: they are fetched twice.
func (r *Reader) fetchChecked(ctx context.Context, o *segment.Object, off, n int64, check func([]byte) error) ([]byte, error) {
	var err error
	for try := range 2 {
		var data []byte
		if data, err = r.fetch(ctx, o, off, n); err != nil {
			return nil, err
		}
		if err = check(data); err == nil {
			return data, nil
		}
		r.m.corruption.WithLabelValues("object").Inc()
		r.cfg.Logger.Error("sealed data is damaged", "component", "tier", "key", o.Key(), "at", off, "bytes", n, "try", try+1, "err", err)
	}
	return nil, err
}

func (r *Reader) fetch(ctx context.Context, o *segment.Object, off, n int64) ([]byte, error) {
	select {
	case r.gets <- struct{}{}:
		defer func() { <-r.gets }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	data := make([]byte, n)
	return data, objstore.ReadFull(ctx, r.bucket, o.Key(), objstore.Range{Off: off, Len: n}, data)
}

// prefetch begins the fetch of the next chunks: of this run, and then of the one behind it.
func (r *Reader) prefetch(runs []RunRef, k, ahead int) {
	for i := range runs {
		ref := runs[i]
		idx := r.cache.peek(keyOf(&ref, -1))
		if idx == nil {
			if ahead > 0 {
				r.cache.wg.Go(func() { // the index first, its chunks at the next read
					_, _ = r.index(r.cache.ctx, &ref)
				})
			}
			return
		}
		for ; k < len(idx.parts) && ahead > 0; k++ {
			n := k // k goes on while the fetch runs
			if !r.cache.startAhead(keyOf(&ref, n), chunkBytes, func(ctx context.Context) (*chunk, error) { return r.fill(ctx, &ref, idx, n) }) {
				return
			}
			ahead--
		}
		k = 0
	}
}

// OffsetForTimestamp returns the first record whose timestamp is at least ts, from the log start up to upTo (exclusive), with its timestamp and leader epoch
// (-1 = unknown); ok is false if there is none. Timestamps may be out of order, so nothing is skipped by searching.
func (r *Reader) OffsetForTimestamp(ctx context.Context, tp record.TopicPartition, ts record.Timestamp, upTo record.Offset) (off record.Offset, at record.Timestamp, ok bool, err error) {
	b, known := r.cat.Bounds(tp)
	if !known {
		return 0, 0, false, ErrUnknownPartition
	}
	from := b.LogStart
	for from < b.SealedEnd {
		runs := r.cat.Runs(tp, from, runsPerLook)
		if len(runs) == 0 {
			break
		}
		for i := range runs {
			if runs[i].Run.MaxTimestamp >= ts {
				off, at, ok, err = r.timeInRun(ctx, &runs[i], ts, from)
				if err != nil {
					return 0, 0, false, fmt.Errorf("%w: %w", ErrStorage, err)
				}
				if ok {
					return off, at, off < upTo, nil
				}
			}
			from = runs[i].Run.EndOffset + 1
		}
	}
	off, at, ok, err = r.timeInHot(ctx, tp, ts, max(from, b.LogStart))
	return off, at, ok && off < upTo, err
}

func (r *Reader) timeInRun(ctx context.Context, ref *RunRef, ts record.Timestamp, from record.Offset) (off record.Offset, at record.Timestamp, ok bool, err error) {
	idx, err := r.index(ctx, ref)
	if err != nil {
		return 0, 0, false, err
	}
	for _, p := range idx.parts {
		for _, blk := range idx.blocks[p.from:p.to] {
			if blk.MaxTimestamp < ts || blk.Last < from {
				continue
			}
			c, _, err := r.chunkAt(ctx, ref, blk.First, false)
			if err != nil {
				return 0, 0, false, err
			}
			for data := c.data; len(data) > 0; {
				var b record.Batch
				if b, data, err = record.Next(data); err != nil {
					return 0, 0, false, err
				}
				if b.LastOffset() < from {
					continue
				}
				if off, at, ok, err = record.FirstAtOrAfter(b, ts, from); err != nil || ok {
					return off, at, ok, err
				}
			}
			break // the whole chunk was looked at
		}
	}
	return 0, 0, false, nil
}

// hotLook bounds the batches of one look at the hot log's headers, in bytes of batches.
const hotLook = 256 << 20

// timeInHot looks at the headers of what is hot and reads only a batch that may hold the record.
func (r *Reader) timeInHot(ctx context.Context, tp record.TopicPartition, ts record.Timestamp, from record.Offset) (off record.Offset, at record.Timestamp, ok bool, err error) {
	err = r.eachHot(ctx, tp, from, func(h record.Batch) (bool, error) {
		if h.MaxTimestamp() < ts {
			return true, nil
		}
		b, err := r.hotBatch(ctx, tp, h, from)
		if err != nil || b == nil {
			return false, err
		}
		off, at, ok, err = record.FirstAtOrAfter(b, ts, from)
		return !ok, err
	})
	return off, at, ok, err
}

// hotBatch reads the hot batch whose header is h; nil if it is not there any more.
func (r *Reader) hotBatch(ctx context.Context, tp record.TopicPartition, h record.Batch, from record.Offset) (record.Batch, error) {
	res, err := r.hot.ReadHot(ctx, tp, max(h.BaseOffset(), from), Limits{MaxBytes: 1, AtLeastOne: true, UpTo: h.LastOffset() + 1})
	if err != nil || res.Bytes == 0 {
		return nil, err
	}
	var data []byte
	for _, b := range res.Buffers {
		data = append(data, b...)
	}
	if res.Release != nil {
		res.Release()
	}
	b, _, err := record.Next(data)
	return b, err
}

// eachHot calls f with the header of every hot batch that ends at or behind `from`, until f says stop.
func (r *Reader) eachHot(ctx context.Context, tp record.TopicPartition, from record.Offset, f func(header record.Batch) (more bool, err error)) error {
	hr, ok := r.cat.HotRange(tp)
	if !ok {
		return nil
	}
	hr.Start = max(hr.Start, from)
	s, known := r.cat.ShardOf(tp)
	for known && hr.Start <= hr.End {
		batches, err := r.cat.Batches(ctx, s, hr, hotLook)
		if err != nil || len(batches) == 0 {
			return err
		}
		for i := range batches {
			h := record.Batch(batches[i].Header[:])
			if more, err := f(h); err != nil || !more {
				return err
			}
			hr.Start = h.LastOffset() + 1
		}
	}
	return nil
}

// MaxTimestamp returns the first record with the largest timestamp; ok is false in an empty partition.
func (r *Reader) MaxTimestamp(ctx context.Context, tp record.TopicPartition, upTo record.Offset) (off record.Offset, at record.Timestamp, ok bool, err error) {
	b, known := r.cat.Bounds(tp)
	if !known {
		return 0, 0, false, ErrUnknownPartition
	}
	best := record.Timestamp(-1)
	for from := b.LogStart; from < b.SealedEnd; {
		runs := r.cat.Runs(tp, from, runsPerLook)
		if len(runs) == 0 {
			break
		}
		for i := range runs {
			newest := runs[i].Run.MaxTimestamp
			if from == b.LogStart && newest > best { // the log may begin within this run, behind its newest record
				if newest, err = r.newestInRun(ctx, &runs[i], from); err != nil {
					return 0, 0, false, fmt.Errorf("%w: %w", ErrStorage, err)
				}
			}
			best = max(best, newest)
			from = runs[i].Run.EndOffset + 1
		}
	}
	err = r.eachHot(ctx, tp, b.LogStart, func(h record.Batch) (bool, error) {
		newest := h.MaxTimestamp()
		if h.BaseOffset() < b.LogStart && newest > best {
			x, err := r.hotBatch(ctx, tp, h, b.LogStart)
			if err != nil {
				return false, err
			}
			if x == nil {
				return true, nil
			}
			if _, newest, err = record.MaxRecord(x, b.LogStart); err != nil {
				return false, err
			}
		}
		best = max(best, newest)
		return true, nil
	})
	if err != nil || best < 0 {
		return 0, 0, false, err
	}
	return r.OffsetForTimestamp(ctx, tp, best, upTo)
}

// newestInRun returns the largest timestamp of a run's records from `from` on.
func (r *Reader) newestInRun(ctx context.Context, ref *RunRef, from record.Offset) (best record.Timestamp, err error) {
	idx, err := r.index(ctx, ref)
	if err != nil {
		return -1, err
	}
	best = -1
	for _, blk := range idx.blocks {
		switch {
		case blk.Last < from:
		case blk.First >= from:
			best = max(best, blk.MaxTimestamp)
		default:
			c, _, err := r.chunkAt(ctx, ref, from, false)
			if err != nil {
				return -1, err
			}
			for data := c.data; len(data) > 0; {
				var b record.Batch
				if b, data, err = record.Next(data); err != nil {
					return -1, err
				}
				newest := b.MaxTimestamp()
				if b.BaseOffset() < from && b.LastOffset() >= from {
					if _, newest, err = record.MaxRecord(b, from); err != nil {
						return -1, err
					}
				}
				if b.LastOffset() >= from {
					best = max(best, newest)
				}
			}
		}
	}
	return best, nil
}
