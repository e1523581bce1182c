package tiering

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// ranged notes every request with its range or size, and can damage what a GET brings.
type ranged struct {
	*objstore.Fault
	mu    sync.Mutex
	calls []string       // since the last call of trace
	gets  []get          // since the last call of take
	flip  func(get) bool // asked for each GET: a bit in the middle of its bytes is flipped
}

type get struct {
	key    string
	off, n int64
}

func (b *ranged) Get(ctx context.Context, key string, r objstore.Range) (io.ReadCloser, objstore.Info, error) {
	b.mu.Lock()
	g := get{key, r.Off, r.Len}
	b.calls = append(b.calls, fmt.Sprintf("get %s %d bytes from %d", key, r.Len, r.Off))
	b.gets = append(b.gets, g)
	flip := b.flip != nil && b.flip(g)
	b.mu.Unlock()
	rc, info, err := b.Fault.Get(ctx, key, r)
	if err != nil || !flip {
		return rc, info, err
	}
	data, err := io.ReadAll(rc)
	if err != nil {
		return nil, info, err
	}
	data[len(data)/2] ^= 8
	return io.NopCloser(bytes.NewReader(data)), info, rc.Close()
}

func (b *ranged) note(format string, a ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, fmt.Sprintf(format, a...))
}

func (b *ranged) trace() (out []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	out, b.calls = b.calls, nil
	return out
}

func (b *ranged) Put(ctx context.Context, key string, body objstore.Body, o objstore.PutOptions) (objstore.Info, error) {
	b.note("put %s %d bytes, create-only %v, checksum %v, writer %s", key, body.Size, o.IfAbsent, o.CRC32C != nil, o.WriterID)
	return b.Fault.Put(ctx, key, body, o)
}

func (b *ranged) Head(ctx context.Context, key string) (objstore.Info, error) {
	b.note("head %s", key)
	return b.Fault.Head(ctx, key)
}

func (b *ranged) Delete(ctx context.Context, keys ...string) error {
	b.note("delete %s", strings.Join(keys, " "))
	return b.Fault.Delete(ctx, keys...)
}

func (b *ranged) List(ctx context.Context, prefix, startAfter string) iter.Seq2[objstore.Info, error] {
	b.note("list %s", prefix)
	return b.Fault.List(ctx, prefix, startAfter)
}

func (b *ranged) take() (out []get) {
	b.mu.Lock()
	defer b.mu.Unlock()
	out, b.gets = b.gets, nil
	return out
}

func (b *ranged) flips(f func(get) bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.flip = f
}

// rangedRig has one partition of eight objects of two chunks each, in 400 batches of about 80 kB, two records each.
func rangedRig(t *testing.T, change func(*Config)) (*rig, *ranged) {
	t.Helper()
	f := newFake(t)
	b := &ranged{}
	r := newRigOver(t, f, func(fault *objstore.Fault) objstore.Bucket { b.Fault = fault; return b }, func(c *Config) {
		c.SealBytes = 4_000_000
		c.CacheBytes = 32 << 20
		if change != nil {
			change(c)
		}
	})
	for range 4 {
		f.append(partition(1), 98, 40_000)
		sleep(2 * time.Minute)
	}
	if n := f.HotBytes(shard); n != 0 {
		t.Fatalf("%d bytes are not sealed", n)
	}
	return r, b
}

// place says where a GET lies: the number of the run, from 0, and of the chunk in it, -1 for the index. It asserts that it is one of them exactly.
func (r *rig) place(t *testing.T, g get) string {
	t.Helper()
	for i, ref := range r.Runs(partition(1), 0, 1000) {
		if ref.Object.Key() != g.key {
			continue
		}
		indexAt := ref.Object.Size - int64(ref.Run.IndexAt)
		if g.off == indexAt && g.n == int64(ref.Run.IndexBytes) {
			return fmt.Sprintf("%d:index", i)
		}
		raw := make([]byte, ref.Run.IndexBytes)
		if err := objstore.ReadFull(t.Context(), r.bucket, g.key, objstore.Range{Off: indexAt, Len: int64(ref.Run.IndexBytes)}, raw); err != nil {
			t.Fatal(err)
		}
		blocks, err := segment.ParseIndex(raw)
		if err != nil {
			t.Fatal(err)
		}
		at, end := ref.Run.Position, ref.Run.Position+ref.Run.SizeBytes
		for k := 0; at < end; k++ { // chunks anew, from the blocks
			n := int64(0)
			for len(blocks) > 0 && (n == 0 || n+int64(blocks[0].Length) <= chunkBytes) {
				n += int64(blocks[0].Length)
				blocks = blocks[1:]
			}
			if g.off == at && g.n == n {
				return fmt.Sprintf("%d:%d", i, k)
			}
			at += n
		}
	}
	t.Fatalf("GET of %d bytes at %d of %s is neither an index nor a chunk", g.n, g.off, g.key)
	return ""
}

func (r *rig) places(t *testing.T, gets []get) string {
	t.Helper()
	var out []string
	for _, g := range gets {
		out = append(out, r.place(t, g))
	}
	slices.Sort(out) // what is fetched ahead goes out at once, in any order
	return strings.Join(out, " ")
}

// A reader has the chunk fetched that it needs, and behind it those that it will need: one at first, twice as many each time it goes on, four at most, also of the next
// object; a reader elsewhere begins with one again.
func TestWhatIsFetchedAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, b := rangedRig(t, nil)
		defer r.stop()
		runs := r.Runs(partition(1), 0, 100)
		if len(runs) != 4 {
			t.Fatalf("%d runs", len(runs))
		}
		at := runs[0].Run.StartOffset
		step := func(want string) {
			t.Helper()
			res, err := r.reader.Read(t.Context(), partition(1), at, Limits{MaxBytes: 1, AtLeastOne: true, UpTo: 1 << 40})
			if err != nil || res.Bytes == 0 || res.Next <= at {
				t.Fatalf("at %d: %d bytes, %v", at, res.Bytes, err)
			}
			at = res.Next
			synctest.Wait()
			if got := r.places(t, b.take()); got != want {
				t.Errorf("at %d: fetched %q, want %q", at, got, want)
			}
		}
		step("0:0 0:1 0:index")
		step("1:index") // the run is here to its end: the next one's index, its chunks when that is known
		step("1:0 1:1")
		at = runs[3].Run.StartOffset // elsewhere
		step("3:0 3:1 3:index")
	})
}

// Who reads from the start to the end, in small steps, has everything fetched once.
func TestSequentialReaderFetchesOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, b := rangedRig(t, func(c *Config) { c.CacheBytes = 12 << 20 })
		defer r.stop()
		bounds, _ := r.Bounds(partition(1))
		for at := record.Offset(0); at < bounds.HighWatermark; {
			res, err := r.reader.Read(t.Context(), partition(1), at, Limits{MaxBytes: 300_000, AtLeastOne: true, UpTo: bounds.HighWatermark})
			if err != nil || res.Next <= at {
				t.Fatalf("at %d: %v", at, err)
			}
			at = res.Next
			synctest.Wait()
		}
		if got, want := r.places(t, b.take()), "0:0 0:1 0:index 1:0 1:1 1:index 2:0 2:1 2:index 3:0 3:1 3:index"; got != want {
			t.Errorf("fetched %q, want %q", got, want)
		}
	})
}

// A bit that was flipped on the way, in the index or in a chunk, first or last: the GET is repeated once, the range is the same, and the bytes are right. If it is flipped again it is an
// error, never bytes, and names the damage; what is whole in other chunks can still be read.
func TestFlippedBitIsFetchedOnceMore(t *testing.T) {
	for _, damaged := range []string{"0:index", "0:0", "0:1"} {
		for _, always := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s always=%v", damaged, always), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r, b := rangedRig(t, nil)
					defer r.stop()
					at := record.Offset(0)
					if damaged == "0:1" {
						at = r.Runs(partition(1), 0, 1)[0].Run.EndOffset
					}
					flips := 0
					b.flips(func(g get) bool {
						if r.place(t, g) != damaged || flips > 0 && !always {
							return false
						}
						flips++
						return true
					})
					res, err := r.one(t.Context(), at)
					synctest.Wait()
					n := 0
					for _, p := range strings.Fields(r.places(t, b.take())) {
						if p == damaged {
							n++
						}
					}
					metric := testutil.ToFloat64(r.tier.m.corruption.WithLabelValues("object"))
					switch {
					case always && (!errors.Is(err, ErrStorage) || !errors.Is(err, segment.ErrCorrupt) || len(res.Buffers) > 0):
						t.Errorf("always damaged: %d buffers, %v", len(res.Buffers), err)
					case always && n > 4: // twice, and twice more after a look at the manifest
						t.Errorf("%d GETs of what is damaged", n)
					case !always && (err != nil || len(res.Buffers) != 1 || !bytes.Equal(res.Buffers[0], r.parts[partition(1)].batches[at/2])):
						t.Errorf("damaged once: %d buffers, %v", len(res.Buffers), err)
					case !always && n != 2:
						t.Errorf("%d GETs of what was damaged once", n)
					}
					if metric != float64(flips) {
						t.Errorf("%v counted, %d bits were flipped", metric, flips)
					}
					if always && damaged == "0:1" {
						if res, err := r.one(t.Context(), 0); err != nil || res.Bytes == 0 {
							t.Errorf("the other chunk: %v", err)
						}
					}
				})
			})
		}
	}
}

// Who does not wait, as a fetch of several partitions does, is told that bytes cannot be read, too: not for ever that there are none yet.
func TestDamageIsToldToWhoDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, b := rangedRig(t, nil)
		defer r.stop()
		b.flips(func(g get) bool { return r.place(t, g) == "0:0" })
		told := 0
		for range 10 {
			res, err := r.reader.Read(ended, partition(1), 0, Limits{MaxBytes: 1, AtLeastOne: true, UpTo: 1 << 40})
			if res.Bytes > 0 {
				t.Fatal("damaged bytes")
			}
			if errors.Is(err, ErrStorage) && errors.Is(err, segment.ErrCorrupt) {
				told++
			} else if err != nil {
				t.Errorf("%v", err)
			}
			sleep(time.Second)
		}
		if told < 3 {
			t.Errorf("told %d times in ten reads", told)
		}
		b.flips(nil)
		r.fault.Set(objstore.Rule{Op: "get", P: 1, Err: &objstore.Error{Op: "get", Kind: objstore.ErrTimeout, Err: context.Canceled}}) // as a watchdog ends it
		told = 0
		for range 10 {
			if _, err := r.reader.Read(ended, partition(1), 150, Limits{MaxBytes: 1, AtLeastOne: true, UpTo: 1 << 40}); errors.Is(err, ErrStorage) && errors.Is(err, objstore.ErrTimeout) {
				told++
			}
			sleep(time.Second)
		}
		if told < 3 {
			t.Errorf("of a store that does not answer: told %d times in ten reads", told)
		}
		r.fault.Set()
		sleep(time.Hour)
		if _, err := r.reader.Read(ended, partition(1), 0, Limits{MaxBytes: 1, AtLeastOne: true, UpTo: 1 << 40}); err != nil {
			t.Errorf("an hour later: %v", err)
		}
		synctest.Wait()
		if res, err := r.reader.Read(ended, partition(1), 0, Limits{MaxBytes: 1, AtLeastOne: true, UpTo: 1 << 40}); err != nil || res.Bytes == 0 {
			t.Errorf("after it has passed: %d bytes, %v", res.Bytes, err)
		}
	})
}

// Where a read begins and ends: whole batches, the first may begin before the offset, none at or above UpTo, none beyond MaxBytes but the first.
func TestReadLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		r := newRig(t, f, nil)
		defer r.stop()
		f.append(partition(1), 10, 1000)
		sleep(2 * time.Minute)
		size := len(f.parts[partition(1)].batches[0])
		for _, c := range []struct {
			name string
			from record.Offset
			l    Limits
			n    int // batches
			next record.Offset
			err  error
		}{
			{"all", 0, Limits{1 << 20, true, 20}, 10, 20, nil},
			{"the middle of a batch", 3, Limits{1 << 20, true, 20}, 9, 20, nil},
			{"one byte", 4, Limits{1, true, 20}, 1, 6, nil},
			{"one byte, and not one at least", 4, Limits{1, false, 20}, 0, 4, nil},
			{"two batches", 4, Limits{2 * size, true, 20}, 2, 8, nil},
			{"a byte less than two", 4, Limits{2*size - 1, true, 20}, 1, 6, nil},
			{"up to a batch", 4, Limits{1 << 20, true, 8}, 2, 8, nil},
			{"up to the middle of one: it begins below", 4, Limits{1 << 20, true, 9}, 3, 10, nil},
			{"at the limit", 8, Limits{1 << 20, true, 8}, 0, 8, nil},
			{"above it", 9, Limits{1 << 20, true, 8}, 0, 9, nil},
			{"the end", 20, Limits{1 << 20, true, 20}, 0, 20, nil},
			{"above the end", 21, Limits{1 << 20, true, 30}, 0, 0, ErrOutOfRange},
			{"below the start", -1, Limits{1 << 20, true, 20}, 0, 0, ErrOutOfRange},
		} {
			res, err := r.reader.Read(t.Context(), partition(1), c.from, c.l)
			if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
				t.Errorf("%s: %v", c.name, err)
				continue
			}
			var want []byte
			for i := range c.n {
				want = append(want, f.parts[partition(1)].batches[int(c.from)/2+i]...)
			}
			if got := bytes.Join(res.Buffers, nil); !bytes.Equal(got, want) || res.Bytes != len(want) || res.Next != c.next {
				t.Errorf("%s: %d bytes (%d said), next %d; want %d bytes, next %d", c.name, len(got), res.Bytes, res.Next, len(want), c.next)
			}
		}
		if _, err := r.reader.Read(t.Context(), partition(9), 0, Limits{UpTo: 1}); !errors.Is(err, ErrUnknownPartition) {
			t.Errorf("a partition that is not there: %v", err)
		}
	})
}

// The GETs that are under way for readers are bounded.
func TestColdReadsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := rangedRig(t, func(c *Config) { c.ColdReads = 2 })
		defer r.stop()
		var mu sync.Mutex
		under, most, gate := 0, 0, make(chan struct{})
		r.fault.Set(objstore.Rule{Op: "get", P: 1, Hook: func(string) {
			mu.Lock()
			under++
			most = max(most, under)
			mu.Unlock()
			<-gate
			mu.Lock()
			under--
			mu.Unlock()
		}})
		var wg sync.WaitGroup
		for _, ref := range r.Runs(partition(1), 0, 100) {
			for _, at := range []record.Offset{ref.Run.StartOffset, ref.Run.EndOffset} {
				wg.Go(func() {
					if _, err := r.one(t.Context(), at); err != nil {
						t.Error(err)
					}
				})
			}
		}
		synctest.Wait()
		mu.Lock()
		if under != 2 {
			t.Errorf("%d GETs are under way, want 2", under)
		}
		mu.Unlock()
		close(gate)
		wg.Wait()
		synctest.Wait()
		if most > 2 {
			t.Errorf("%d GETs at once", most)
		}
	})
}

// The readers that are remembered are bounded; the one that was here last is known.
func TestStreamsAreBounded(t *testing.T) {
	f := newFake(t)
	r := NewReader(New(Config{}, f, f.bucket), f)
	defer r.Close()
	tp := func(n int) record.TopicPartition { return record.TopicPartition{Partition: int32(n)} }
	for n := range streamsMax + 10 {
		r.remember(tp(n), 5, 2)
		r.remember(tp(0), 5, 2) // which is always here
	}
	if len(r.streams) != streamsMax || r.recent.Len() != streamsMax {
		t.Errorf("%d readers are remembered, %d in order", len(r.streams), r.recent.Len())
	}
	for n, want := range map[int]int{0: 4, 1: 1, streamsMax + 9: 4} {
		if got := r.sequential(tp(n), 5); got != want {
			t.Errorf("partition %d: %d ahead, want %d", n, got, want)
		}
	}
	if got := r.sequential(tp(0), 6); got != 1 {
		t.Errorf("elsewhere: %d ahead", got)
	}
}

// What happens while a read is under way: its partition expires, its bytes turn out to be hot again, its chunk in the cache to be none.
func TestChangesDuringARead(t *testing.T) {
	run := func(name string, f func(*testing.T, *rig)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, _ := rangedRig(t, nil)
				defer r.stop()
				f(t, r)
			})
		})
	}
	run("expired and deleted", func(t *testing.T, r *rig) {
		ref := r.Runs(partition(1), 0, 1)[0]
		r.fault.Set(objstore.Rule{Op: "get", P: 1, Times: 1, Hook: func(string) {
			r.advance(partition(1), ref.Run.EndOffset+1)
			_ = r.bucket.Delete(context.Background(), ref.Object.Key())
		}})
		if _, err := r.one(t.Context(), 0); !errors.Is(err, ErrOutOfRange) {
			t.Errorf("%v", err)
		}
	})
	run("hot after all", func(t *testing.T, r *rig) {
		at := r.Runs(partition(1), 100, 1)[0].Run.StartOffset
		r.fault.Set(objstore.Rule{Op: "get", P: 1, Err: &objstore.Error{Op: "get", Kind: objstore.ErrNotFound}})
		reader := NewReader(New(r.tier.cfg.again(), r.fake, r.fault), &lateHot{fake: r.fake})
		defer reader.Close()
		res, err := reader.Read(t.Context(), partition(1), at, Limits{MaxBytes: 1, AtLeastOne: true, UpTo: 1 << 40})
		if err != nil || string(bytes.Join(res.Buffers, nil)) != "hot" {
			t.Errorf("%v", err)
		}
		r.fault.Set()
	})
	run("no batches in the cache", func(t *testing.T, r *rig) {
		ref := r.Runs(partition(1), 250, 1)[0]
		at := ref.Run.StartOffset
		if _, err := r.one(t.Context(), at); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		c := r.reader.cache
		c.mu.Lock()
		c.m[keyOf(&ref, 0)].Value.(*cached).c.data = make([]byte, 100)
		c.size, c.ahead = 0, 0 // counts are of no interest here
		c.mu.Unlock()
		if res, err := r.one(t.Context(), at); err != nil || res.Bytes == 0 {
			t.Errorf("%d bytes, %v", res.Bytes, err)
		}
	})
}

// again is the configuration for another Tiering: its metrics have a registry of their own.
func (c Config) again() Config { c.Registerer = nil; return c }

// lateHot has nothing at the first look.
type lateHot struct {
	*fake
	looks int
}

func (h *lateHot) ReadHot(context.Context, record.TopicPartition, record.Offset, Limits) (Result, error) {
	if h.looks++; h.looks == 1 {
		return Result{}, ErrNotLocal
	}
	return Result{Buffers: [][]byte{[]byte("hot")}, Bytes: 3, Next: 1}, nil
}

// Looking records up by time, in objects and in what is hot, gives what looking at all of them gives: random timestamps, log starts within a batch, limits.
func TestTimestampsBesideATwin(t *testing.T) {
	for seed := range uint64(30) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 3))
			f := newFake(t)
			r := newRig(t, f, func(c *Config) { c.SealAge = time.Minute })
			defer r.stop()
			tp := partition(1)
			var all []record.Timestamp
			batches := func(n int) {
				for range n {
					var times []record.Timestamp
					for range 1 + rng.IntN(4) {
						times = append(times, record.Timestamp(rng.IntN(50)))
					}
					f.appendAt(tp, times...)
					all = append(all, times...)
				}
			}
			for range 1 + rng.IntN(3) {
				batches(rng.IntN(8))
				sleep(2 * time.Minute) // sealed
			}
			batches(rng.IntN(5)) // hot
			start := record.Offset(0)
			if len(all) > 0 && rng.IntN(3) > 0 {
				start = record.Offset(rng.IntN(len(all)))
				f.advance(tp, start)
			}
			if len(all) == 0 {
				return
			}
			first := func(ts record.Timestamp) (record.Offset, record.Timestamp, bool) {
				for i := int(start); i < len(all); i++ {
					if all[i] >= ts {
						return record.Offset(i), all[i], true
					}
				}
				return 0, 0, false
			}
			for range 40 {
				ts, upTo := record.Timestamp(rng.IntN(52)), record.Offset(rng.IntN(len(all)+2))
				wantOff, wantAt, found := first(ts)
				off, at, ok, err := r.reader.OffsetForTimestamp(t.Context(), tp, ts, upTo)
				if err != nil || ok != (found && wantOff < upTo) || ok && (off != wantOff || at != wantAt) {
					t.Fatalf("seed %d, %d records from %d, at or after %d, up to %d: %d %d %v %v, want %d %d %v", seed, len(all), start, ts, upTo, off, at, ok, err, wantOff, wantAt, found)
				}
			}
			best := slices.Max(all[start:])
			wantOff, _, _ := first(best)
			off, at, ok, err := r.reader.MaxTimestamp(t.Context(), tp, record.Offset(len(all)))
			if err != nil || !ok || off != wantOff || at != best {
				t.Fatalf("seed %d, %d records from %d: maximum %d at %d (%v, %v), want %d at %d", seed, len(all), start, at, off, ok, err, best, wantOff)
			}
		})
	}
}

// Somebody who reads all of a partition, more than the cache holds, does not push out what others read again and again: what it has finished goes first.
func TestCatchUpLeavesWhatOthersRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, b := rangedRig(t, func(c *Config) { c.CacheBytes = 12 << 20 })
		defer r.stop()
		r.append(partition(2), 10, 10_000)
		sleep(2 * time.Minute)
		r.check(t, partition(2))
		synctest.Wait()
		b.take()
		bounds, _ := r.Bounds(partition(1))
		for range 2 {
			for at := record.Offset(0); at < bounds.HighWatermark; {
				res, err := r.reader.Read(t.Context(), partition(1), at, Limits{MaxBytes: 1 << 20, AtLeastOne: true, UpTo: bounds.HighWatermark})
				if err != nil || res.Next <= at {
					t.Fatalf("at %d: %v", at, err)
				}
				at = res.Next
				synctest.Wait()
			}
		}
		b.take()
		r.check(t, partition(2))
		synctest.Wait()
		if gets := b.take(); len(gets) > 0 {
			t.Errorf("what was read before had to be fetched again: %v", gets)
		}
	})
}
