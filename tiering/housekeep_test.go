package tiering

import (
	"context"
	"math"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/estran/estran/objstore"

	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// What expires, run by run: three runs of ten records, 100 bytes and the timestamps 1000, 2000 and 3000 (ms), and 50 hot bytes behind them.
func TestLogStart(t *testing.T) {
	const day = 24 * 3600_000
	for _, c := range []struct {
		name      string
		ms, bytes int64
		now       record.Timestamp
		class     segment.Class
		change    func(*PartitionStatus, []segment.Run)
		want      record.Offset
	}{
		{"no limits", -1, -1, 1 << 40, 0, nil, 0},
		{"nothing is old", 1000, -1, 2000, 0, nil, 0},
		{"as old as allowed", 1000, -1, 2000, 0, nil, 0},
		{"one run is older", 1000, -1, 2001, 0, nil, 10},
		{"two are", 1000, -1, 3001, 0, nil, 20},
		{"all that is sealed, and what is hot is younger", 1000, -1, 4001, 0, func(p *PartitionStatus, _ []segment.Run) { p.MaxTimestamp = 3500 }, 30},
		{"all that is sealed, and what is hot is as old: it is never uploaded", 1000, -1, 4001, 0, nil, 35},
		{"nothing is hot", 1000, -1, 4001, 0, func(p *PartitionStatus, _ []segment.Run) { p.HotBytes, p.HighWatermark = 0, 30 }, 30},
		{"a young run keeps older ones behind it", 1000, -1, 4001, 0, func(_ *PartitionStatus, r []segment.Run) { r[1].MaxTimestamp = 9000 }, 10},
		{"the topic is compacted", 1000, -1, 1 << 40, 0, func(p *PartitionStatus, _ []segment.Run) { p.Compact = true }, 0},
		{"retention 0", 0, -1, 2000, 0, nil, 10},
		{"size: just enough", -1, 350, 1, 0, nil, 0},
		{"size: one byte less than what is there", -1, 349, 1, 0, nil, 0},
		{"size: enough without the first run", -1, 250, 1, 0, nil, 10},
		{"size: almost nothing; what is hot stays", -1, 0, 1, 0, nil, 30},
		{"time or size, whichever is first", 1000, 250, 3001, 0, nil, 20},
		{"records from the future go with their class", 1000, -1, day + 101, 1, func(_ *PartitionStatus, r []segment.Run) { r[0].MaxTimestamp = 1 << 50 }, 35},
		{"and not before", 1000, -1, day + 100, 1, func(_ *PartitionStatus, r []segment.Run) { r[0].MaxTimestamp = 1 << 50 }, 0},
		{"the longest retention there is", math.MaxInt64, -1, 1 << 40, 0, nil, 0},
		{"and the latest record", 1000, -1, 1 << 40, 0, func(p *PartitionStatus, r []segment.Run) {
			r[0].MaxTimestamp, p.MaxTimestamp = math.MaxInt64, math.MaxInt64
		}, 0},
		{"the longest retention, nothing sealed", math.MaxInt64, -1, 1 << 40, 0, func(p *PartitionStatus, _ []segment.Run) { p.LogStart, p.SealedBytes = 30, 0 }, 30},
		{"all has gone", 0, -1, 1 << 40, 0, func(p *PartitionStatus, _ []segment.Run) { p.LogStart, p.HighWatermark = 35, 35 }, 35},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t)
			tp := partition(1)
			p := f.part(tp)
			f.objects[1] = &segment.Object{Number: 1, Plan: segment.Plan{Class: c.class}, UploadedAt: 100}
			for i := range record.Offset(3) {
				p.runs = append(p.runs, segment.Run{Object: 1, StartOffset: 10 * i, EndOffset: 10*i + 9, SizeBytes: 100, MaxTimestamp: record.Timestamp(1000 * (i + 1))})
			}
			s := PartitionStatus{TP: tp, RetentionMs: c.ms, RetentionBytes: c.bytes, Class: c.class, Bounds: Bounds{SealedEnd: 30, HighWatermark: 35, LastStable: 35},
				SealedBytes: 300, HotBytes: 50, MaxTimestamp: 3000}
			if c.change != nil {
				c.change(&s, p.runs)
			}
			if got := New(Config{}, f, f.bucket).logStartOf(&s, c.now); got != c.want {
				t.Errorf("the log starts at %d, want %d", got, c.want)
			}
		})
	}
}

// A class ends by the cluster's time, whatever the clock of the node that uploaded says; by no time at all if none was trusted then.
func TestClassOfAWrongClock(t *testing.T) {
	for _, distrust := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			f.ahead = 10 * 24 * time.Hour // so far is this node's own clock behind
			f.retain(partition(1), 3_600_000, 1)
			f.distrusted(distrust)
			r := newRig(t, f, nil)
			defer r.stop()
			f.appendAt(partition(1), record.Timestamp(time.Now().Add(f.ahead).UnixMilli()))
			sleep(5 * time.Minute)
			f.distrusted(false)
			sleep(30 * time.Minute)
			b, _ := f.Bounds(partition(1))
			if len(f.keys()) != 1 || b.LogStart != 0 {
				t.Errorf("distrust %v: %d objects, the log starts at %d: it keeps records for an hour", distrust, len(f.keys()), b.LogStart)
			}
			sleep(time.Hour)
			if b, _ := f.Bounds(partition(1)); b.LogStart != 1 {
				t.Errorf("distrust %v: the log starts at %d after an hour", distrust, b.LogStart)
			}
		})
	}
}

// More runs than one look takes are all looked at.
func TestLogStartBehindManyRuns(t *testing.T) {
	f := newFake(t)
	p := f.part(partition(1))
	f.objects[1] = &segment.Object{Number: 1}
	const n = 2*runsPerLook + 10
	for i := range record.Offset(n) {
		p.runs = append(p.runs, segment.Run{Object: 1, StartOffset: i, EndOffset: i, SizeBytes: 10, MaxTimestamp: 1000})
	}
	s := PartitionStatus{TP: partition(1), RetentionMs: -1, RetentionBytes: 50, Bounds: Bounds{SealedEnd: n, HighWatermark: n}, SealedBytes: 10 * n}
	if got := New(Config{}, f, f.bucket).logStartOf(&s, 1); got != n-5 {
		t.Errorf("the log starts at %d, want %d", got, n-5)
	}
}

// doomed puts n objects into the bucket that nothing refers to any more, and whose grace is over.
func (f *fake) doomed(n int) {
	for range n {
		o, err := f.Prepare(f.t.Context(), shard, segment.Plan{UUID: segment.UUID{byte(f.number), byte(f.number >> 8)}, Owner: segment.Owner{Shared: true}}, time.Hour)
		if err != nil {
			f.t.Fatal(err)
		}
		if _, err := f.bucket.Put(f.t.Context(), o.Key(), objstore.Bytes([]byte("x")), objstore.PutOptions{}); err != nil {
			f.t.Fatal(err)
		}
		f.objects[o.Number].State, f.objects[o.Number].Size, f.objects[o.Number].Since = segment.Tombstoned, 1, 0
	}
}

// While the store is away deletions cost little and hold up nothing; retention goes on.
func TestDeletionsDuringAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.doomed(2000)
		r := newRig(t, f, func(c *Config) { c.SealAge = 100 * time.Hour })
		defer r.stop()
		r.fault.Set(objstore.Rule{Op: "delete", P: 1, Err: errDown, Hook: func(string) { time.Sleep(50 * time.Second) }}) // the retrier's tries
		f.retain(partition(1), 60_000, 0)
		f.append(partition(1), 3, 1000)
		sleep(time.Hour)
		if n := len(r.fault.Trace()); n > 120*3 {
			t.Errorf("%d deletions in an hour without a store", n)
		}
		if b, _ := f.Bounds(partition(1)); b.LogStart != 6 {
			t.Errorf("what expired meanwhile was not dropped: the log starts at %d", b.LogStart)
		}
		r.fault.Set()
		sleep(5 * time.Minute)
		if n, d := len(f.keys()), len(f.Doomed(shard)); n+d > 0 {
			t.Errorf("%d objects are left, %d in the table", n, d)
		}
	})
}

// Objects that cannot be deleted do not keep the others from it, and are tried again.
func TestSomeCannotBeDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.doomed(100)
		denied := map[string]bool{}
		var allowed atomic.Bool
		for _, k := range f.keys()[:20] {
			denied[k] = true
		}
		r := newRigOver(t, f, func(b *objstore.Fault) objstore.Bucket { return &denying{Fault: b, keys: denied, allowed: &allowed} }, nil)
		defer r.stop()
		sleep(10 * time.Minute)
		if got := f.keys(); len(got) != len(denied) || len(f.Doomed(shard)) != len(denied) {
			t.Errorf("%d objects are left (%d in the table), %d are denied", len(got), len(f.Doomed(shard)), len(denied))
		}
		allowed.Store(true)
		sleep(5 * time.Minute)
		if n, d := len(f.keys()), len(f.Doomed(shard)); n+d > 0 {
			t.Errorf("%d objects are left, %d in the table", n, d)
		}
	})
}

type denying struct {
	*objstore.Fault
	keys    map[string]bool
	allowed *atomic.Bool
}

func (d *denying) Delete(ctx context.Context, keys ...string) error {
	if d.keys[keys[0]] && !d.allowed.Load() {
		return &objstore.Error{Op: "delete", Key: keys[0], Kind: objstore.ErrAccess}
	}
	return d.Fault.Delete(ctx, keys...)
}

// Nothing is deleted within its grace, and nothing expires by a clock that is not trusted.
func TestGraceAndTrust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.doomed(1)
		f.objects[1].Since = record.Timestamp(time.Now().UnixMilli())
		r := newRigOver(t, f, func(b *objstore.Fault) objstore.Bucket { return b }, func(c *Config) { c.Grace = 2 * time.Hour; c.SealAge = time.Minute })
		defer r.stop()
		f.retain(partition(1), 60_000, 0)
		f.append(partition(1), 3, 1000)
		f.distrusted(true)
		sleep(5 * time.Hour)
		if b, _ := f.Bounds(partition(1)); b.LogStart != 0 || len(f.keys()) != 2 {
			t.Errorf("with a clock that is not trusted: the log starts at %d, %d objects", b.LogStart, len(f.keys()))
		}
		f.distrusted(false)
		sleep(time.Minute)
		if b, _ := f.Bounds(partition(1)); b.LogStart != 6 || len(f.keys()) != 1 { // the old one has gone, the expired one has its grace
			t.Errorf("with one that is: the log starts at %d, %d objects", b.LogStart, len(f.keys()))
		}
		sleep(2*time.Hour - 2*time.Minute)
		if len(f.keys()) != 1 {
			t.Error("deleted within its grace")
		}
		sleep(3 * time.Minute)
		if n := len(f.keys()); n != 0 {
			t.Errorf("%d objects after the grace", n)
		}
	})
}

// What one pass moves is bounded: a wrong decision does not delete everything at once.
func TestAdvancesPerPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		for i := range 2*advancePerPass + 1 {
			tp := record.TopicPartition{Partition: int32(i)}
			f.part(tp).retentionMs = 1
			f.append(tp, 1, 1)
		}
		r := newRig(t, f, func(c *Config) { c.SealAge = 100 * time.Hour; c.SealBytes = 1 << 40 })
		defer r.stop()
		for pass, want := range []int{0, advancePerPass, 2 * advancePerPass, 2*advancePerPass + 1} {
			if pass > 0 {
				sleep(30 * time.Second)
			}
			moved := 0
			for _, p := range f.Partitions(shard) {
				if p.LogStart > 0 {
					moved++
				}
			}
			if moved != want {
				t.Errorf("after %d passes %d log starts have moved, want %d", pass, moved, want)
			}
		}
	})
}
