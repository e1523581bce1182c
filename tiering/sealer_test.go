package tiering

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

var errDown = &objstore.Error{Op: "put", Kind: objstore.ErrUnavailable, Retryable: true, Err: errors.New("down")}

// sealedEnds are the partitions' sealed ends, from partition 1 on.
func (f *fake) sealedEnds(n byte) (out []record.Offset) {
	for i := range n {
		b, _ := f.Bounds(partition(i + 1))
		out = append(out, b.SealedEnd)
	}
	return out
}

// Nothing is sealed before there is enough of it or it is old enough; then it is.
func TestSealBySizeOrAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		r := newRig(t, f, func(c *Config) { c.SealBytes, c.SealAge = 100_000, 10*time.Minute })
		defer r.stop()
		expect := func(what string, objects int, ends ...record.Offset) {
			t.Helper()
			synctest.Wait()
			if got := f.sealedEnds(byte(len(ends))); !slices.Equal(got, ends) || len(f.keys()) != objects {
				t.Fatalf("%s: sealed ends %v in %d objects, want %v in %d", what, got, len(f.keys()), ends, objects)
			}
		}
		f.append(partition(1), 9, 10_000)
		f.append(partition(2), 1, 100)
		sleep(10*time.Minute - time.Second)
		expect("neither large nor old", 0, 0, 0)
		sleep(time.Second)
		expect("old", 1, 18, 2)
		f.append(partition(1), 11, 10_000)
		expect("one partition is large", 3, 40, 2) // what one object takes, and the rest in a second
		f.append(partition(2), 1, 100)
		sleep(10*time.Minute - time.Second)
		expect("the next waits for its own time", 3, 40, 2)
		sleep(time.Second)
		expect("and is sealed then", 4, 40, 4)
		f.append(partition(1), 6, 10_000)
		expect("half of an object", 4, 40, 4)
		f.append(partition(2), 6, 10_000)
		expect("the class has enough for a shared one", 5, 52, 16)
		r.check(t, partition(1))
		r.check(t, partition(2))
	})
}

// Partitions of one class share objects of bounded size; what is large has its own; classes never mix.
func TestPlan(t *testing.T) {
	tier := New(Config{SealBytes: 100}, newFake(t), nil)
	r := func(n byte, class segment.Class, bytes int64) HotRange {
		return HotRange{TP: partition(n), Class: class, Bytes: bytes}
	}
	for _, c := range []struct {
		name   string
		ranges []HotRange
		all    bool
		want   string
	}{
		{"nothing", nil, true, "[] waiting []"},
		{"small", []HotRange{r(1, 0, 99)}, false, "[] waiting [1]"},
		{"small, all", []HotRange{r(1, 0, 99)}, true, "[shared 0 [1]] waiting []"},
		{"large", []HotRange{r(1, 0, 100), r(2, 0, 99)}, false, "[own 0 [1]] waiting [2]"},
		{"together enough", []HotRange{r(1, 0, 50), r(2, 0, 50)}, false, "[shared 0 [1 2]] waiting []"},
		{"not across classes", []HotRange{r(1, 0, 50), r(2, 1, 50)}, false, "[] waiting [1 2]"},
		{"classes apart", []HotRange{r(1, 0, 50), r(2, 1, 99), r(3, 0, 60), r(4, 1, 1)}, false, "[shared 0 [1 3] shared 1 [2 4]] waiting []"},
		{"bounded", []HotRange{r(1, 0, 90), r(2, 0, 90), r(3, 0, 90), r(4, 0, 10)}, true, "[shared 0 [1 2] shared 0 [3 4]] waiting []"},
	} {
		tasks, waiting := tier.plan(c.ranges, c.all)
		numbers := func(rs []HotRange) (out []int32) {
			for _, r := range rs {
				out = append(out, r.TP.Partition)
			}
			return out
		}
		var got []string
		for _, k := range tasks {
			kind := "shared"
			if k.own {
				kind = "own"
			}
			got = append(got, fmt.Sprint(kind, " ", uint8(k.class), " ", numbers(k.ranges)))
		}
		if s := fmt.Sprint(got, " waiting ", numbers(waiting)); s != c.want {
			t.Errorf("%s: %s, want %s", c.name, s, c.want)
		}
	}
}

// liar says that it has stored what it has not, or not so; the fake's Commit asserts that nothing of it is committed.
type liar struct {
	*objstore.Fault
	put  func(info objstore.Info, body objstore.Body) (objstore.Info, bool) // what it says, and whether it stores
	left int
}

func (l *liar) Put(ctx context.Context, key string, b objstore.Body, o objstore.PutOptions) (objstore.Info, error) {
	if l.left == 0 {
		return l.Fault.Put(ctx, key, b, o)
	}
	l.left--
	info, store := l.put(objstore.Info{Key: key, Size: b.Size, ETag: "e", CRC32C: o.CRC32C}, b)
	if !store {
		return info, nil
	}
	_, err := l.Fault.Put(ctx, key, b, o)
	return info, err
}

// What the store says of a PUT is believed only where it proves it; else it is asked what it has.
func TestStoreThatLies(t *testing.T) {
	short := func(b objstore.Body) objstore.Body { b.Size /= 2; return b }
	for _, c := range []struct {
		name     string
		put      func(l *liar, info objstore.Info, b objstore.Body) (objstore.Info, bool)
		uploads  int // until it is sealed: the lie and the truth, or the one that was right
		heads    int
		puzzling bool
	}{
		{"no checksum in the answer, stored", func(_ *liar, i objstore.Info, _ objstore.Body) (objstore.Info, bool) { i.CRC32C = nil; return i, true }, 1, 1, false},
		{"no checksum in the answer, not stored", func(_ *liar, i objstore.Info, _ objstore.Body) (objstore.Info, bool) { i.CRC32C = nil; return i, false }, 1, 1, true},
		{"no size in the answer, not stored", func(_ *liar, i objstore.Info, _ objstore.Body) (objstore.Info, bool) { i.Size = 0; return i, false }, 1, 1, true},
		{"another size", func(l *liar, i objstore.Info, b objstore.Body) (objstore.Info, bool) {
			_, _ = l.Fault.Put(context.Background(), i.Key, short(b), objstore.PutOptions{})
			i.CRC32C = nil
			return i, false
		}, 2, 1, true},
		{"another checksum", func(_ *liar, i objstore.Info, _ objstore.Body) (objstore.Info, bool) {
			crc := *i.CRC32C + 1
			i.CRC32C = &crc
			return i, false
		}, 1, 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				var l *liar
				r := newRigOver(t, f, func(b *objstore.Fault) objstore.Bucket {
					l = &liar{Fault: b, left: 1}
					l.put = func(i objstore.Info, b objstore.Body) (objstore.Info, bool) { return c.put(l, i, b) }
					return l
				}, nil)
				defer r.stop()
				f.append(partition(1), 3, 1000)
				sleep(5 * time.Minute)
				if got := f.sealedEnds(1); got[0] != 6 {
					t.Errorf("sealed up to %d of 6", got[0])
				}
				uploads, heads := 0, 0
				for _, c := range r.fault.Trace() {
					switch op, _, _ := strings.Cut(c, " "); op {
					case "put":
						uploads++
					case "head":
						heads++
					}
				}
				if uploads != c.uploads || heads != c.heads {
					t.Errorf("%d uploads and %d HEADs, want %d and %d", uploads, heads, c.uploads, c.heads)
				}
				if n := testutil.ToFloat64(r.tier.m.uploads.WithLabelValues("failed")); (n == 1) != c.puzzling {
					t.Errorf("%v uploads failed", n)
				}
				r.check(t, partition(1))
			})
		})
	}
}

// A PUT whose answer was lost is one upload below the retrier: the same object, and no second one.
func TestAmbiguousPut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		r := newRigOver(t, f, func(b *objstore.Fault) objstore.Bucket { return objstore.Retry(b, objstore.Policy{}, nil) }, nil)
		defer r.stop()
		r.fault.Set(objstore.Rule{Op: "put", P: 1, Times: 2, Err: errDown, After: true})
		f.append(partition(1), 3, 1000)
		sleep(5 * time.Minute)
		calls := r.fault.Trace()
		if len(calls) != 3 || calls[0] != calls[1] || calls[1] != calls[2] || len(f.keys()) != 1 || f.number != 1 {
			t.Errorf("requests %v, %d objects, %d prepared", calls, len(f.keys()), f.number)
		}
		r.check(t, partition(1))
	})
}

// A store that is away for hours is asked now and then, not all the time, whatever the retrier below does; when it is back all is sealed, in few objects, and nothing
// else is left of the outage once the times are over.
func TestOutageOfHours(t *testing.T) {
	const hours = 6
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		r := newRigOver(t, f, func(b *objstore.Fault) objstore.Bucket { return objstore.Retry(b, objstore.Policy{}, nil) }, func(c *Config) { c.SealBytes = 100_000 })
		defer r.stop()
		down := []objstore.Rule{{Op: "put", P: 1, Err: errDown}, {Op: "delete", P: 1, Err: errDown}, {Op: "head", P: 1, Err: errDown}, {Op: "get", P: 1, Err: errDown}}
		r.fault.Set(down...)
		for h := range hours {
			f.append(partition(1), 4, 10_000)
			f.append(partition(2), 1, 100)
			sleep(time.Hour)
			puts, deletes := 0, 0
			for _, c := range r.fault.Trace() {
				switch op, _, _ := strings.Cut(c, " "); op {
				case "put":
					puts++
				case "delete":
					deletes++
				}
			}
			if most := 120*3 + 25; deletes > most {
				t.Errorf("hour %d: %d DELETEs, at most %d are expected", h, deletes, most)
			}
			if most := 3600/15 + 25; puts < 3600/45 || puts > most { // a pause of 15 to 45 s when it is longest, and the retrier's budget
				t.Errorf("hour %d: %d PUTs, want %d to %d", h, puts, 3600/45, most)
			}
		}
		if !r.tier.Degraded() || testutil.ToFloat64(r.tier.m.storeDown) == 0 {
			t.Error("nobody is told that uploads fail")
		}
		r.fault.Set()
		sleep(3 * time.Minute)
		if n := r.HotBytes(shard); n != 0 || r.tier.Degraded() || testutil.ToFloat64(r.tier.m.storeDown) != 0 {
			t.Errorf("%d bytes are not sealed after the store is back (degraded: %v)", n, r.tier.Degraded())
		}
		if n := len(r.live()); n > hours+1 {
			t.Errorf("%d objects for 250 kB", n)
		}
		r.check(t, partition(1))
		r.check(t, partition(2))
		sleep(30 * time.Hour)
		if got, want := f.keys(), f.live(); !slices.Equal(got, want) || len(f.Doomed(shard)) > 0 {
			t.Errorf("the bucket has %d objects, %d are live, %d are left in the table", len(got), len(want), len(f.Doomed(shard)))
		}
	})
}

// A commit whose answer was lost is repeated; one that is refused is not: the same records go into another object. One that would come too late is not tried.
func TestCommit(t *testing.T) {
	for _, c := range []struct {
		name     string
		fail     func(n int) error
		commits  int // calls
		prepared segment.Number
	}{
		{"at once", func(int) error { return nil }, 1, 1},
		{"unknown three times", func(n int) error {
			if n <= 3 {
				return errors.New("no leader")
			}
			return nil
		}, 4, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				r := newRig(t, f, nil)
				defer r.stop()
				n := 0
				f.failing(func(step string) error {
					if step != "commit" {
						return nil
					}
					n++
					return c.fail(n)
				})
				f.append(partition(1), 3, 1000)
				sleep(5 * time.Minute)
				if n != c.commits || f.number != c.prepared || f.sealedEnds(1)[0] != 6 {
					t.Errorf("%d commits of %d objects, sealed up to %d", n, f.number, f.sealedEnds(1)[0])
				}
				r.check(t, partition(1))
			})
		})
	}
	t.Run("refused", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			r := newRig(t, f, nil)
			defer r.stop()
			once := false
			f.failing(func(step string) error {
				if step == "commit" && !once { // the sweep has had it
					once = true
					f.mu.Lock()
					f.objects[1].State = segment.Tombstoned
					f.mu.Unlock()
				}
				return nil
			})
			f.append(partition(1), 3, 1000)
			sleep(5 * time.Minute)
			if f.number != 2 || f.sealedEnds(1)[0] != 6 {
				t.Errorf("%d objects were prepared, sealed up to %d", f.number, f.sealedEnds(1)[0])
			}
			r.check(t, partition(1))
		})
	})
	t.Run("too late", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			r := newRig(t, f, nil)
			defer r.stop()
			began := time.Now()
			var last, lastLate time.Duration // of the first object's and of the second's commits, after their prepare
			f.failing(func(step string) error {
				if step != "commit" {
					return nil
				}
				f.mu.Lock()
				n, since := f.number, time.UnixMilli(int64(f.objects[f.number].Since))
				f.mu.Unlock()
				if n == 1 {
					last = time.Since(since)
				} else {
					lastLate = time.Since(since)
				}
				if time.Since(began) < 40*time.Minute {
					return errors.New("no leader")
				}
				return nil
			})
			f.append(partition(1), 3, 1000)
			sleep(2 * time.Hour)
			if last < 29*time.Minute || last >= 30*time.Minute || lastLate >= 30*time.Minute || f.number != 2 || f.sealedEnds(1)[0] != 6 { // half of an upload's time
				t.Errorf("the last commits came %v and %v after their prepare; %d prepared; sealed up to %d", last, lastLate, f.number, f.sealedEnds(1)[0])
			}
			r.check(t, partition(1))
		})
	})
}

// The checksum that is announced for an object is that of its bytes.
func TestAnnouncedChecksum(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		r := newRig(t, f, nil)
		defer r.stop()
		f.append(partition(1), 3, 1000)
		f.append(partition(2), 2, 50)
		sleep(2 * time.Minute)
		o := f.objects[1]
		data := make([]byte, o.Size)
		if err := objstore.ReadFull(t.Context(), f.bucket, o.Key(), objstore.Whole, data); err != nil {
			t.Fatal(err)
		}
		if got := crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli)); got != o.CRC32C {
			t.Errorf("%08x was announced, the bytes have %08x", o.CRC32C, got)
		}
	})
}

// What is uploaded at once is committed in the order of the round, whichever is done first.
func TestCommitsInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		r := newRig(t, f, nil)
		defer r.stop()
		r.fault.Set(objstore.Rule{Op: "put", P: 1, Hook: func(key string) {
			if strings.Contains(key, "/keep/") { // the first of the round
				time.Sleep(time.Minute)
			}
		}})
		want := []segment.Class{segment.ClassKeep, 5, 3}
		for n, class := range want {
			f.retain(partition(byte(n+1)), -1, class)
			f.append(partition(byte(n+1)), 1, 1000)
		}
		sleep(119 * time.Second)
		f.mu.Lock()
		if len(f.order) > 0 {
			t.Errorf("%d were committed before the first was there", len(f.order))
		}
		f.mu.Unlock()
		sleep(2 * time.Minute)
		f.mu.Lock()
		defer f.mu.Unlock()
		var got []segment.Class
		for _, n := range f.order {
			got = append(got, f.objects[n].Plan.Class)
		}
		if !slices.Equal(got, want) {
			t.Errorf("committed %v, want %v", got, want)
		}
	})
}

// Small batches that keep much of the log from being freed are written again, those of larger partitions not; one that fails keeps no other from it.
func TestRehoming(t *testing.T) {
	for _, fail := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			r := newRig(t, f, func(c *Config) { c.SealBytes, c.SealAge = 10<<20, time.Hour })
			defer r.stop()
			if fail {
				n := 0
				f.failing(func(step string) error {
					if step != "rehome" {
						return nil
					}
					if n++; n == 1 {
						return errors.New("no leader")
					}
					return nil
				})
			}
			f.retain(partition(3), -1, 5)
			round := func() { // enough in all, and not in one class
				f.append(partition(1), 3, 10_000)
				f.append(partition(2), 5, 1_000_000)
				f.append(partition(3), 52, 100_000)
				f.append(partition(4), 1, 10)
				synctest.Wait()
			}
			round()
			if len(f.rehomed) > 0 {
				t.Fatalf("written again without need: %v", f.rehomed)
			}
			f.mu.Lock()
			f.pinned = 2 << 30
			f.mu.Unlock()
			f.append(partition(4), 3, 1_000_000) // a quarter of an object more: look again
			synctest.Wait()
			want := []record.Offset{1, 3, 5, 1, 3, 5, 7}
			if fail {
				want = want[3:]
			}
			if !slices.Equal(f.rehomed, want) {
				t.Errorf("written again up to %v, want %v", f.rehomed, want)
			}
			if n := testutil.ToFloat64(r.tier.m.rehomed); n != float64(len(want)) {
				t.Errorf("%v counted", n)
			}
		})
	}
}
