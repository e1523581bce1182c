package tiering

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
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
