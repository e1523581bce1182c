package objstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Policy bounds tries. The zero value takes the defaults named.
type Policy struct {
	Tries       int           // 5
	First, Last time.Duration // pause, with full jitter: 50 ms to 5 s
	// Stall cancels a try in which no byte moved for this long (5 s).
	Stall time.Duration
	// PutRate is the slowest upload that is not given up, in bytes per second (2 MiB/s), beside PutBase (5 s).
	PutRate int64
	PutBase time.Duration
	// GetHeader bounds the wait for an answer (5 s).
	GetHeader time.Duration
}

func (p *Policy) defaults() {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if p.Tries == 0 {
		p.Tries = 5
	}
	if p.PutRate == 0 {
		p.PutRate = 2 << 20
	}
	set(&p.First, 50*time.Millisecond)
	set(&p.Last, 5*time.Second)
	set(&p.Stall, 5*time.Second)
	set(&p.PutBase, 5*time.Second)
	set(&p.GetHeader, 5*time.Second)
}

// Metrics are the requests of a bucket.
type Metrics struct {
	requests  *prometheus.CounterVec
	duration  *prometheus.HistogramVec
	bytes     *prometheus.CounterVec
	retries   *prometheus.CounterVec
	throttled prometheus.Counter
}

// NewMetrics registers the series.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "estran_object_requests_total", Help: "Requests to the object store."}, []string{"op", "class", "status"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "estran_object_request_duration_seconds", Help: "Duration of requests to the object store, of a GET until its first byte.",
			Buckets: []float64{.001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}, NativeHistogramBucketFactor: 1.1}, []string{"op"}),
		bytes:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "estran_object_bytes_total", Help: "Bytes moved from and to the object store."}, []string{"direction"}),
		retries:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "estran_object_retries_total", Help: "Requests that were repeated."}, []string{"reason"}),
		throttled: prometheus.NewCounter(prometheus.CounterOpts{Name: "estran_object_throttled_total", Help: "Requests that the store asked to slow down."}),
	}
	r.MustRegister(m.requests, m.duration, m.bytes, m.retries, m.throttled)
	return m
}

// Retry is the one retrier above every adapter: it repeats what may be repeated, with full jitter, within a budget that all requests share, and gives every
// try limits of its own, since no SDK does.
func Retry(b Bucket, p Policy, m *Metrics) Bucket {
	p.defaults()
	if m == nil {
		m = NewMetrics(prometheus.NewRegistry())
	}
	return &retrying{Bucket: b, p: p, m: m, budget: budgetMax}
}

type retrying struct {
	Bucket
	p Policy
	m *Metrics

	mu     sync.Mutex
	budget float64 // tokens: a retry takes one, a success gives back a tenth
}

const (
	budgetMax  = 20
	budgetGain = 0.1
)

func (r *retrying) spend() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.budget < 1 {
		return false
	}
	r.budget--
	return true
}

func (r *retrying) earn() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.budget = min(budgetMax, r.budget+budgetGain)
}

var classes = map[string]string{"put": "put", "get": "get", "head": "get", "list": "list", "delete": "delete"}

// do runs try until it succeeds, may not be repeated, or the tries are used up.
func (r *retrying) do(ctx context.Context, op string, limit time.Duration, try func(context.Context) error) error {
	return r.goOn(ctx, op, limit, new(int), try)
}

// goOn is do for a request that has been tried n times.
func (r *retrying) goOn(ctx context.Context, op string, limit time.Duration, n *int, try func(context.Context) error) error {
	for {
		*n++
		began := time.Now()
		tctx, cancel := context.WithTimeout(ctx, limit)
		err := try(tctx)
		expired := tctx.Err() != nil && ctx.Err() == nil
		cancel()
		r.m.duration.WithLabelValues(op).Observe(time.Since(began).Seconds())
		if err != nil && expired {
			err = &Error{Op: op, Kind: ErrTimeout, Retryable: true, Err: err}
		}
		e, _ := errors.AsType[*Error](err)
		r.m.requests.WithLabelValues(op, classes[op], statusOf(err, e)).Inc()
		if err == nil {
			r.earn()
			return nil
		}
		if errors.Is(err, ErrThrottled) {
			r.m.throttled.Inc()
		}
		if e == nil || !e.Retryable || *n >= r.p.Tries || ctx.Err() != nil || !r.spend() {
			return err
		}
		r.m.retries.WithLabelValues(e.Kind.Error()).Inc()
		pause := min(r.p.Last, r.p.First<<(*n-1))
		pause = max(time.Duration(rand.Int64N(int64(pause)+1)), e.RetryAfter)
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}

func statusOf(err error, e *Error) string {
	switch {
	case err == nil:
		return "ok"
	case e == nil:
		return "cancelled"
	case e.Status != 0:
		return strconv.Itoa(e.Status)
	}
	return "error"
}

// Put implements Bucket. It is repeated freely, since the writer ID tells an earlier try of the same Put from another writer's.
func (r *retrying) Put(ctx context.Context, key string, b Body, o PutOptions) (info Info, err error) {
	if err := CheckKey(key); err != nil {
		return Info{}, err
	}
	limit := r.p.PutBase + time.Duration(b.Size)*time.Second/time.Duration(r.p.PutRate)
	err = r.do(ctx, "put", limit, func(ctx context.Context) error {
		body := &lent{r: b.R}
		info, err = r.Bucket.Put(ctx, key, Body{body, b.Size}, o)
		if berr := body.back(); berr != nil && err != nil {
			return fmt.Errorf("put %s: reading the body: %w", key, berr) // not the store's fault, and no better the next time
		}
		if err == nil {
			r.m.bytes.WithLabelValues("out").Add(float64(b.Size))
		}
		return err
	})
	return info, err
}

// lent is the body of one try. Who sends it may still be at it when the try is over: from then on it cannot be read.
type lent struct {
	mu   sync.Mutex
	r    io.ReaderAt
	err  error
	over bool
}

var errOver = errors.New("the request is over")

// ReadAt implements io.ReaderAt.
func (l *lent) ReadAt(p []byte, off int64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return 0, errOver
	}
	n, err := l.r.ReadAt(p, off)
	if err != nil && err != io.EOF && l.err == nil {
		l.err = err
	}
	return n, err
}

// back takes it back and returns the error of reading it.
func (l *lent) back() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
	return l.err
}

// Head implements Bucket.
func (r *retrying) Head(ctx context.Context, key string) (info Info, err error) {
	err = r.do(ctx, "head", r.p.GetHeader, func(ctx context.Context) error {
		info, err = r.Bucket.Head(ctx, key)
		return err
	})
	return info, err
}

// Delete implements Bucket; only the keys that failed are tried again.
func (r *retrying) Delete(ctx context.Context, keys ...string) error {
	lost := map[string]error{} // those that need not be tried again
	err := r.do(ctx, "delete", r.p.PutBase+r.p.GetHeader, func(ctx context.Context) error {
		err := r.Bucket.Delete(ctx, keys...)
		d, ok := errors.AsType[*DeleteError](err)
		if !ok {
			return err
		}
		keys = keys[:0:0]
		again := map[string]error{}
		for k, err := range d.Failed {
			if e, ok := errors.AsType[*Error](err); ok && e.Retryable {
				keys = append(keys, k)
				again[k] = err
			} else {
				lost[k] = err
			}
		}
		if len(again) > 0 {
			return &DeleteError{again}
		}
		return err
	})
	if len(lost) == 0 {
		return err
	}
	if d, ok := errors.AsType[*DeleteError](err); ok {
		maps.Copy(lost, d.Failed)
	} else if err != nil {
		for _, k := range keys {
			lost[k] = err
		}
	}
	return &DeleteError{lost}
}

// List implements Bucket. It is not repeated in the middle: who lists begins again.
func (r *retrying) List(ctx context.Context, prefix, startAfter string) iter.Seq2[Info, error] {
	r.m.requests.WithLabelValues("list", "list", "ok").Inc()
	return r.Bucket.List(ctx, prefix, startAfter)
}

// Get implements Bucket. A body that ends early or stalls is resumed from the last good byte, while tries are left.
func (r *retrying) Get(ctx context.Context, key string, rg Range) (io.ReadCloser, Info, error) {
	g := &resuming{r: r, ctx: ctx, key: key, rg: rg}
	if err := g.open(); err != nil {
		return nil, Info{}, err
	}
	return g, g.info, nil
}

// resuming is a GET's body.
type resuming struct {
	r      *retrying
	ctx    context.Context
	key    string
	rg     Range
	info   Info
	body   io.ReadCloser
	cancel context.CancelFunc
	watch  *time.Timer
	off    int64 // of the next byte
	left   int64
	tries  int // GETs that were sent
	opened bool
	err    error // of the last Read
}

func (g *resuming) open() error {
	return g.r.goOn(g.ctx, "get", 24*time.Hour, &g.tries, func(context.Context) error {
		ctx, cancel := context.WithCancel(g.ctx)
		watch := time.AfterFunc(g.r.p.GetHeader, cancel)
		rg := g.rg
		if g.opened {
			rg = Range{g.off, g.left}
		}
		body, info, err := g.r.Bucket.Get(ctx, g.key, rg)
		if err != nil {
			stalled := !watch.Stop() && g.ctx.Err() == nil
			cancel()
			if stalled {
				return &Error{Op: "get", Key: g.key, Kind: ErrTimeout, Retryable: true, Err: err}
			}
			return err
		}
		if g.opened && info.ETag != g.info.ETag {
			cancel()
			return errors.Join(&Error{Op: "get", Key: g.key, Kind: ErrConflict, Err: errors.New("the object changed while it was read")}, body.Close())
		}
		if !g.opened {
			g.opened, g.info = true, info
			g.off, g.left, _ = g.rg.Resolve(info.Size)
		}
		watch.Stop() // until somebody reads
		g.body, g.cancel, g.watch = body, cancel, watch
		return nil
	})
}

func (g *resuming) Read(p []byte) (n int, err error) {
	if g.err == nil {
		n, g.err = g.read(p)
	}
	return n, g.err
}

func (g *resuming) read(p []byte) (int, error) {
	for {
		if g.left == 0 {
			return 0, io.EOF
		}
		g.watch.Reset(g.r.p.Stall)
		n, err := g.body.Read(p[:min(int64(len(p)), g.left)])
		stalled := !g.watch.Stop() && g.ctx.Err() == nil
		g.off, g.left = g.off+int64(n), g.left-int64(n)
		g.r.m.bytes.WithLabelValues("in").Add(float64(n))
		if n > 0 || err == nil {
			return n, nil
		}
		if g.ctx.Err() != nil {
			return 0, g.ctx.Err()
		}
		kind := ErrTruncated
		if stalled {
			kind = ErrTimeout
		}
		if g.tries >= g.r.p.Tries || !g.r.spend() {
			return 0, &Error{Op: "get", Key: g.key, Kind: kind, Retryable: true, Err: err}
		}
		g.r.m.retries.WithLabelValues(kind.Error()).Inc()
		if err := errors.Join(g.Close()); err != nil {
			return 0, err
		}
		if err := g.open(); err != nil {
			return 0, err
		}
	}
}

func (g *resuming) Close() error {
	g.watch.Stop()
	g.cancel()
	_ = g.body.Close() // a cancelled body says that it was
	return nil
}

// CreateBucket implements Creator if the bucket does.
func (r *retrying) CreateBucket(ctx context.Context) error {
	if c, ok := r.Bucket.(Creator); ok {
		return c.CreateBucket(ctx)
	}
	return nil
}

// StoreTime implements Dater if the bucket does.
func (r *retrying) StoreTime() (time.Time, bool) {
	if d, ok := r.Bucket.(Dater); ok {
		return d.StoreTime()
	}
	return time.Time{}, false
}
