package objstore

import (
	"context"
	"io"
	"iter"
	"math/rand/v2"
	"sync"
)

// Fault is a Bucket that misbehaves as its rules say, for tests.
type Fault struct {
	Bucket
	mu    sync.Mutex
	rng   *rand.Rand
	rules []Rule
	trace []string
}

// Rule is one kind of misbehaviour.
type Rule struct {
	Op    string  // put, get, head, list, delete
	P     float64 // probability per call
	Times int     // at most so often; 0 = no limit
	// Err is returned instead of the result; After: once the effect has taken place.
	Err   error
	After bool
	// Truncate cuts a GET's body after so many bytes; Flip flips a bit in it.
	Truncate int
	Flip     bool
	// Hook is called first.
	Hook func(key string)

	done int
}

// NewFault wraps b; the same seed and calls give the same faults.
func NewFault(b Bucket, seed uint64) *Fault {
	return &Fault{Bucket: b, rng: rand.New(rand.NewPCG(seed, 7))}
}

// Set replaces the rules.
func (f *Fault) Set(rules ...Rule) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = rules
}

// Trace returns the calls so far, "op key" each, and forgets them.
func (f *Fault) Trace() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.trace
	f.trace = nil
	return t
}

func (f *Fault) pick(op, key string) Rule {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.trace) < 100_000 {
		f.trace = append(f.trace, op+" "+key)
	}
	for i := range f.rules {
		r := &f.rules[i]
		if r.Op == op && (r.Times == 0 || r.done < r.Times) && f.rng.Float64() < r.P {
			r.done++
			return *r
		}
	}
	return Rule{}
}

func (f *Fault) around(op, key string, do func() error) error {
	r := f.pick(op, key)
	if r.Hook != nil {
		r.Hook(key)
	}
	if r.Err != nil && !r.After {
		return r.Err
	}
	if err := do(); err != nil {
		return err
	}
	return r.Err
}

// Put implements Bucket.
func (f *Fault) Put(ctx context.Context, key string, b Body, o PutOptions) (info Info, err error) {
	err = f.around("put", key, func() error { info, err = f.Bucket.Put(ctx, key, b, o); return err })
	return info, err
}

// Head implements Bucket.
func (f *Fault) Head(ctx context.Context, key string) (info Info, err error) {
	err = f.around("head", key, func() error { info, err = f.Bucket.Head(ctx, key); return err })
	return info, err
}

// Delete implements Bucket.
func (f *Fault) Delete(ctx context.Context, keys ...string) error {
	for _, k := range keys {
		if err := f.around("delete", k, func() error { return f.Bucket.Delete(ctx, k) }); err != nil {
			return err
		}
	}
	return nil
}

// List implements Bucket.
func (f *Fault) List(ctx context.Context, prefix, startAfter string) iter.Seq2[Info, error] {
	r := f.pick("list", prefix)
	return func(yield func(Info, error) bool) {
		if r.Err != nil {
			yield(Info{}, r.Err)
			return
		}
		f.Bucket.List(ctx, prefix, startAfter)(yield)
	}
}

// Get implements Bucket.
func (f *Fault) Get(ctx context.Context, key string, rg Range) (io.ReadCloser, Info, error) {
	r := f.pick("get", key)
	if r.Hook != nil {
		r.Hook(key)
	}
	if r.Err != nil {
		return nil, Info{}, r.Err
	}
	body, info, err := f.Bucket.Get(ctx, key, rg)
	if err != nil || r.Truncate == 0 && !r.Flip {
		return body, info, err
	}
	return &badBody{ReadCloser: body, left: r.Truncate, cut: r.Truncate > 0, flip: r.Flip}, info, nil
}

type badBody struct {
	io.ReadCloser
	left      int
	cut, flip bool
}

func (b *badBody) Read(p []byte) (int, error) {
	if b.cut {
		if b.left == 0 {
			return 0, io.ErrUnexpectedEOF
		}
		p = p[:min(len(p), b.left)]
	}
	n, err := b.ReadCloser.Read(p)
	b.left -= n
	if b.flip && n > 0 {
		p[n/2] ^= 1
		b.flip = false
	}
	return n, err
}
