package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"sync"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/mem"
)

// trouble is how the store misbehaves.
type trouble int

const (
	well    trouble = iota
	refuses         // every request fails at once
	hangs           // no request is answered
	forgets         // what was asked is done, and the answer is an error
	late            // no request is answered, and uploads are done minutes after they were given up
)

func (m trouble) String() string {
	return [...]string{"well", "refuses", "hangs", "loses answers", "does uploads late"}[m]
}

// store is the bucket as all nodes have it, and what the simulation knows of its objects.
type store struct {
	w *world
	*mem.Bucket

	mu       sync.Mutex
	trouble  trouble
	changed  chan struct{}        // closed and renewed when trouble is
	referred map[string]time.Time // when a manifest was last seen to refer to an object
	deleted  int
}

func newStore(w *world) *store {
	return &store{w: w, Bucket: mem.New(), changed: make(chan struct{}), referred: map[string]time.Time{}}
}

func (s *store) set(m trouble) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trouble = m
	close(s.changed)
	s.changed = make(chan struct{})
}

var errDown = errors.New("the simulation's store is in trouble")

// around does what a request asks for, or what the trouble makes of it.
func (s *store) around(ctx context.Context, op, key string, do func() error) error {
	s.mu.Lock()
	now, changed := s.trouble, s.changed
	s.mu.Unlock()
	failed := &objstore.Error{Op: op, Key: key, Kind: objstore.ErrUnavailable, Err: errDown}
	switch now {
	case refuses:
		return failed
	case hangs, late:
		select {
		case <-changed:
		case <-ctx.Done():
		}
		return failed
	case forgets:
		if err := do(); err != nil {
			return err
		}
		return failed
	}
	return do()
}

func (s *store) Put(ctx context.Context, key string, b objstore.Body, o objstore.PutOptions) (info objstore.Info, err error) {
	s.mu.Lock()
	now := s.trouble
	s.mu.Unlock()
	if now == late {
		data, err := io.ReadAll(b.Reader())
		if err != nil {
			return info, err
		}
		s.w.wg.Go(func() {
			<-ctx.Done()
			time.Sleep(s.w.o.Tiering.LateDelete / 2)
			_, _ = s.Bucket.Put(context.WithoutCancel(ctx), key, objstore.Bytes(data), o) // nobody waits for it
		})
	}
	err = s.around(ctx, "put", key, func() error { info, err = s.Bucket.Put(ctx, key, b, o); return err })
	return info, err
}

func (s *store) Get(ctx context.Context, key string, r objstore.Range) (body io.ReadCloser, info objstore.Info, err error) {
	err = s.around(ctx, "get", key, func() error { body, info, err = s.Bucket.Get(ctx, key, r); return err })
	return body, info, err
}

func (s *store) Head(ctx context.Context, key string) (info objstore.Info, err error) {
	err = s.around(ctx, "head", key, func() error { info, err = s.Bucket.Head(ctx, key); return err })
	return info, err
}

func (s *store) List(ctx context.Context, prefix, after string) iter.Seq2[objstore.Info, error] {
	if err := s.around(ctx, "list", prefix, func() error { return nil }); err != nil {
		return func(yield func(objstore.Info, error) bool) { yield(objstore.Info{}, err) }
	}
	return s.Bucket.List(ctx, prefix, after)
}

// clockSpread is how far a time that two of three voters agree on may be behind, if the clock of one is: a grace may begin that much earlier.
const clockSpread = 5 * time.Minute

// Delete is judged: an object may go when its grace has passed since a manifest referred to it.
func (s *store) Delete(ctx context.Context, keys ...string) error {
	return s.around(ctx, "delete", strings.Join(keys, " "), func() error {
		s.mu.Lock()
		for _, k := range keys {
			if at, ok := s.referred[k]; ok {
				if since := time.Since(at); since < s.w.o.Tiering.Grace-clockSpread {
					s.w.failf("object %s is deleted %s after a manifest referred to it, its grace is %s", k, since, s.w.o.Tiering.Grace)
				}
				s.deleted++
			}
		}
		s.mu.Unlock()
		return s.Bucket.Delete(ctx, keys...)
	})
}

// refer notes that a manifest refers to an object, which must be there.
func (s *store) refer(key string) error {
	if _, err := s.Bucket.Head(context.Background(), key); err != nil {
		return fmt.Errorf("a manifest refers to it: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.referred[key] = time.Now()
	return nil
}

// keys are those of all objects, but for the states of groups.
func (s *store) keys() (out []string, states int) {
	for info, err := range s.Bucket.List(context.Background(), "", "") {
		switch {
		case err != nil:
			s.w.failf("listing: %v", err)
		case strings.HasPrefix(info.Key, "v1/meta/snapshots/"):
			states++
		default:
			out = append(out, info.Key)
		}
	}
	return out, states
}
