package tiering

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// golden compares with a file in testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Error(d)
	}
}

var uuids = regexp.MustCompile(`[0-9a-f]{32}`)

// The requests to the store, one by one: they are what an operator pays for. There is no LIST among them.
func TestTraceOfRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		b := &ranged{}
		r := newRigOver(t, newFake(t), func(f *objstore.Fault) objstore.Bucket { b.Fault = f; return b }, nil)
		defer r.stop()
		note := func(what string) { // writes what has been asked for until now, and what comes next
			synctest.Wait()
			names := map[string]string{}
			calls := b.trace()
			if len(calls) > 0 && strings.HasPrefix(calls[0], "get") { // what is fetched ahead goes out at once, in any order
				slices.Sort(calls[1:])
			}
			for _, c := range calls {
				fmt.Fprintln(&out, uuids.ReplaceAllStringFunc(c, func(u string) string {
					if names[u] == "" {
						names[u] = fmt.Sprintf("UUID%d", len(names)+1)
					}
					return names[u]
				}))
			}
			fmt.Fprintf(&out, "# %s\n", what)
		}
		large, small, other := partition(1), partition(2), partition(3)
		r.retain(large, 3600_000, 1)
		note("an hour without records")
		time.Sleep(time.Hour)
		note("two small partitions, sealed by age into one object")
		r.append(small, 3, 1000)
		r.append(other, 2, 1000)
		time.Sleep(61 * time.Second)
		note("a large partition, sealed by size into objects of its own, the rest by age")
		r.append(large, 80, 100_000)
		time.Sleep(2 * time.Minute)
		note("one record from the middle: the run's index, and the chunk that holds it")
		bounds, _ := r.Bounds(large)
		if _, err := r.reader.Read(t.Context(), large, 60, Limits{MaxBytes: 1, AtLeastOne: true, UpTo: bounds.HighWatermark}); err != nil {
			t.Fatal(err)
		}
		note("the same again: its index was fetched ahead, now its chunk")
		if _, err := r.reader.Read(t.Context(), large, 60, Limits{MaxBytes: 1, AtLeastOne: true, UpTo: bounds.HighWatermark}); err != nil {
			t.Fatal(err)
		}
		for at := record.Offset(62); at < 100; at += 10 { // five batches a step
			note(fmt.Sprintf("on from %d", at))
			res, err := r.reader.Read(t.Context(), large, at, Limits{MaxBytes: 505_000, AtLeastOne: true, UpTo: bounds.HighWatermark})
			if err != nil || res.Next != at+10 {
				t.Fatalf("at %d: next %d, %v", at, res.Next, err)
			}
		}
		note("all of a small one")
		r.check(t, small)
		note("the large partition's time is over, and then the grace")
		time.Sleep(2*time.Hour + 2*time.Minute)
		note("end")
		golden(t, "trace.txt", out.String())
		if got, want := r.keys(), r.live(); !slices.Equal(got, want) {
			t.Errorf("the bucket has %v, live are %v", got, want)
		}
		r.check(t, small)
		r.check(t, other)
	})
}

var errCrash = errors.New("crash")

// Whatever step fails or is the last before a crash: nothing is committed that is not in the bucket (the fake's Commit asserts it), everything is sealed once in the end, and
// when the times are over the bucket holds what is live and nothing else.
func TestEveryStepMayFail(t *testing.T) {
	down := &objstore.Error{Op: "put", Kind: objstore.ErrUnavailable, Retryable: true, Err: errCrash}
	small := func(c *Config) { c.SealBytes = 100_000 }
	for _, step := range []string{"round", "batches", "prepare", "prepare done", "put", "put done", "body", "commit", "commit done",
		"sweep", "sweep done", "advance", "advance done", "delete", "delete done", "forget", "forget done"} {
		for _, crash := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s crash=%v", step, crash), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					f := newFake(t)
					r := newRig(t, f, small)
					op, _, after := strings.Cut(step, " ")
					late := op == "advance" || op == "delete" || op == "forget" // when a retention is over
					var met atomic.Bool
					first := r.stop
					meet := func() { // the step, the first time: with crash the leader's context ends here, and what it was doing is not done
						if met.CompareAndSwap(false, true) && crash {
							go first()
						}
					}
					f.failing(func(s string) error {
						if s != step || met.Load() {
							return nil
						}
						meet()
						return errCrash
					})
					if op == "put" || op == "delete" {
						r.fault.Set(objstore.Rule{Op: op, P: 1, Times: 1, Err: down, After: after, Hook: func(string) { meet() }})
					}
					f.retain(partition(1), 10*3600_000, 0)
					f.append(partition(1), 30, 10_000)
					f.append(partition(2), 5, 1000)
					time.Sleep(10 * time.Minute)
					if crash && !late {
						r.stop()
						r = newRig(t, f, small)
					}
					time.Sleep(30 * time.Minute)
					r.check(t, partition(1))
					r.check(t, partition(2))
					if n := f.HotBytes(shard); n != 0 {
						t.Errorf("%d bytes are not sealed", n)
					}
					time.Sleep(40 * time.Hour) // the partition's retention, an upload's time, its late deletion
					if !met.Load() {
						t.Fatal("the step was not met")
					}
					if crash && late {
						r.stop()
						r = newRig(t, f, small)
						time.Sleep(40 * time.Hour)
					}
					if got, want := f.keys(), f.live(); !slices.Equal(got, want) {
						t.Errorf("the bucket has\n%s\nlive are\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
					}
					if len(f.Doomed(shard)) > 0 {
						t.Errorf("objects are left in the table: %v", f.Doomed(shard))
					}
					r.check(t, partition(2))
					for _, c := range r.fault.Trace() {
						if strings.HasPrefix(c, "list") {
							t.Error(c)
						}
					}
					r.stop()
				})
			})
		}
	}
}

// A leader that does not know yet that it has been replaced does the same work beside the new one: everything is sealed once, and what the slower of the two has put is deleted.
func TestTwoLeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		for range 2 {
			r := newRig(t, f, func(c *Config) { c.SealBytes = 100_000 })
			defer r.stop()
			r.fault.Set(objstore.Rule{Op: "put", P: 1, Hook: func(string) { time.Sleep(time.Second) }}) // so that both are at it
		}
		for range 10 {
			f.append(partition(1), 25, 10_000)
			f.append(partition(2), 3, 1000)
			sleep(5 * time.Minute)
		}
		if f.HotBytes(shard) > 0 || len(f.keys()) <= len(f.live()) {
			t.Errorf("%d bytes are not sealed; %d objects, %d live", f.HotBytes(shard), len(f.keys()), len(f.live()))
		}
		sleep(30 * time.Hour)
		if got, want := f.keys(), f.live(); !slices.Equal(got, want) || len(f.Doomed(shard)) > 0 {
			t.Errorf("the bucket has %d objects, %d are live, %d are left in the table", len(got), len(want), len(f.Doomed(shard)))
		}
		r := newRig(t, f, nil)
		r.check(t, partition(1))
		r.check(t, partition(2))
		r.stop()
	})
}

// An upload whose time is over may still arrive: it is deleted when it is swept and once more when no request can be on its way any longer.
func TestLateUploadIsDeletedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		o, err := f.Prepare(t.Context(), shard, segment.Plan{UUID: segment.UUID{9}, Owner: segment.Owner{Shared: true}}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		r := newRig(t, f, nil)
		defer r.stop()
		time.Sleep(2 * time.Hour)
		if _, err := f.bucket.Put(t.Context(), o.Key(), objstore.Bytes([]byte("late")), objstore.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(26 * time.Hour)
		if keys := f.keys(); len(keys) != 0 {
			t.Errorf("left: %v", keys)
		}
		if len(f.Doomed(shard)) != 0 {
			t.Error("it is not forgotten")
		}
		if n := len(r.fault.Trace()); n != 2 {
			t.Errorf("%d requests, want two deletions", n)
		}
	})
}

// A batch that is damaged in the log is never sealed, and keeps no other partition from it. It is once another voter has given it whole.
func TestDamagedBatchIsNotSealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		reg := prometheus.NewRegistry()
		f.append(partition(1), 3, 1000)
		f.append(partition(2), 3, 1000)
		f.parts[partition(1)].batches[1][200] ^= 1
		r := newRig(t, f, func(c *Config) { c.Registerer = reg })
		defer r.stop()
		time.Sleep(5 * time.Minute)
		if b, _ := f.Bounds(partition(1)); b.SealedEnd != 0 {
			t.Errorf("the damaged partition is sealed up to %d", b.SealedEnd)
		}
		if b, _ := f.Bounds(partition(2)); b.SealedEnd != b.HighWatermark {
			t.Errorf("the other is sealed up to %d of %d", b.SealedEnd, b.HighWatermark)
		}
		r.check(t, partition(2))
		if testutil.ToFloat64(r.tier.m.corruption.WithLabelValues("log")) == 0 {
			t.Error("nothing counts the damage")
		}
		f.mu.Lock()
		damaged := f.parts[partition(1)].batches[1]
		f.repair = func(tp record.TopicPartition, at record.Offset) {
			if tp != partition(1) || at != damaged.BaseOffset() {
				t.Errorf("offset %d of %s is to be repaired", at, tp)
			}
			damaged[200] ^= 1
			f.repair = func(record.TopicPartition, record.Offset) { t.Error("what is whole is repaired") }
		}
		f.mu.Unlock()
		time.Sleep(5 * time.Minute)
		if b, _ := f.Bounds(partition(1)); b.SealedEnd != b.HighWatermark {
			t.Errorf("the repaired partition is sealed up to %d of %d", b.SealedEnd, b.HighWatermark)
		}
		r.check(t, partition(1))
	})
}

// sealedRig has one partition of about 8 MB in objects, and no leader at work.
func sealedRig(t *testing.T, change func(*Config)) *rig {
	t.Helper()
	f := newFake(t)
	r := newRig(t, f, func(c *Config) {
		c.SealBytes = 4 << 20
		if change != nil {
			change(c)
		}
	})
	f.append(partition(1), 80, 100_000)
	time.Sleep(5 * time.Minute)
	if n := f.HotBytes(shard); n != 0 {
		t.Fatalf("%d bytes are not sealed", n)
	}
	r.fault.Trace()
	return r
}

func (r *rig) one(ctx context.Context, at record.Offset) (Result, error) {
	return r.reader.Read(ctx, partition(1), at, Limits{MaxBytes: 1, AtLeastOne: true, UpTo: 1 << 40})
}

// Many readers of one place cause one fetch, and one that gives up does not end it for the others.
func TestSingleFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := sealedRig(t, nil)
		defer r.stop()
		open := make(chan struct{})
		r.fault.Set(objstore.Rule{Op: "get", P: 1, Hook: func(string) { <-open }})
		first, cancel := context.WithCancel(t.Context())
		errs := make(chan error, 20)
		for i := range cap(errs) {
			ctx := t.Context()
			if i == 0 {
				ctx = first
			}
			go func() {
				res, err := r.one(ctx, 0)
				if err == nil && res.Bytes == 0 && ctx == t.Context() {
					err = errors.New("nothing was read")
				}
				errs <- err
			}()
		}
		synctest.Wait()
		cancel()
		synctest.Wait()
		close(open)
		for range cap(errs) {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		synctest.Wait()
		if n := len(r.fault.Trace()); n > 3 { // the index, the chunk, and the chunk ahead
			t.Errorf("%d requests for twenty readers", n)
		}
	})
}

// A reader that goes on where it was has its next bytes fetched before it asks, also in the next object; the cache stays within its bounds.
func TestReadAheadAndBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 5 << 20
		r := sealedRig(t, func(c *Config) { c.CacheBytes = limit })
		defer r.stop()
		waited := 0
		for at := record.Offset(0); at < 160; {
			synctest.Wait() // what was begun is here
			res, err := r.reader.Read(ended, partition(1), at, Limits{MaxBytes: 150_000, AtLeastOne: true, UpTo: 1 << 40})
			if err != nil {
				t.Fatal(err)
			}
			if res.Bytes == 0 {
				waited++
				synctest.Wait()
				if res, err = r.one(t.Context(), at); err != nil || res.Bytes == 0 {
					t.Fatalf("at %d: %v", at, err)
				}
			}
			at = res.Next
			if size := testutil.ToFloat64(r.tier.m.cacheBytes); size > limit {
				t.Fatalf("the cache holds %v bytes, at most %d", size, limit)
			}
		}
		if waited > 3 { // the first read's index and chunk, and the first index of the second object
			t.Errorf("a sequential reader waited %d times", waited)
		}
		r.check(t, partition(1))
	})
}

var ended = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// Damage on the way is fetched again; damage in the store is an error that names the place, never bytes; so is an object that has gone.
func TestDamage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := sealedRig(t, func(c *Config) { c.CacheBytes = 1 })
		defer r.stop()
		for range 2 {
			synctest.Wait() // what was fetched ahead is here
			r.fault.Set(objstore.Rule{Op: "get", P: 1, Times: 3, Flip: true})
			if _, err := r.one(t.Context(), 50); err != nil {
				t.Errorf("bits were flipped on the way, three times: %v", err)
			}
		}
		if n := testutil.ToFloat64(r.tier.m.corruption.WithLabelValues("object")); n != 6 {
			t.Errorf("%v counted, want 6", n)
		}
		synctest.Wait() // what was fetched ahead is here
		r.fault.Set(objstore.Rule{Op: "get", P: 1, Flip: true})
		r.fault.Trace()
		if res, err := r.one(t.Context(), 50); !errors.Is(err, ErrStorage) || !errors.Is(err, segment.ErrCorrupt) || res.Bytes > 0 {
			t.Errorf("always damaged: %d bytes, %v", res.Bytes, err)
		}
		if n := len(r.fault.Trace()); n > 4 {
			t.Errorf("%d requests", n)
		}
		r.fault.Set()
		key := r.Runs(partition(1), 50, 1)[0].Object.Key()
		if err := r.bucket.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		if _, err := r.one(t.Context(), 50); !errors.Is(err, ErrStorage) {
			t.Errorf("an object that has gone: %v", err)
		}
		r.mu.Lock()
		r.parts[partition(1)].logStart = 60
		r.mu.Unlock()
		if _, err := r.one(t.Context(), 50); !errors.Is(err, ErrOutOfRange) {
			t.Errorf("below the log start: %v", err)
		}
	})
}

// What is read while its partition expires is right, or out of range: never an error of the store.
func TestReadersDuringRetention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := sealedRig(t, func(c *Config) { c.CacheBytes = 1; c.Grace = time.Minute })
		defer r.stop()
		stale := r.Runs(partition(1), 0, 1) // as a reader that has looked just before
		r.retain(partition(1), 1, 0)
		time.Sleep(45 * time.Second)
		if b, _ := r.Bounds(partition(1)); b.LogStart == 0 {
			t.Fatal("nothing has expired")
		}
		if _, err := r.bucket.Head(t.Context(), stale[0].Object.Key()); err != nil {
			t.Errorf("within the grace: %v", err)
		}
		if _, err := r.one(t.Context(), 0); !errors.Is(err, ErrOutOfRange) {
			t.Errorf("expired: %v", err)
		}
		time.Sleep(2 * time.Minute)
		if _, err := r.bucket.Head(t.Context(), stale[0].Object.Key()); !errors.Is(err, objstore.ErrNotFound) {
			t.Errorf("after the grace: %v", err)
		}
	})
}
