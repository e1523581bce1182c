package raftmeta

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/mem"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
)

// node is a host with its tiering over a bucket that survives it.
type node struct {
	*Host
	tier   *tiering.Tiering
	reader *tiering.Reader
	fault  *objstore.Fault
}

func openNode(t testing.TB, dir string, bucket objstore.Bucket, change func(*Config, *tiering.Config)) *node {
	t.Helper()
	n := &node{fault: objstore.NewFault(bucket, 1)}
	tc := tiering.Config{SealBytes: 200_000, SealAge: 100 * time.Millisecond, HousekeepEvery: 20 * time.Millisecond, Grace: time.Millisecond, LateDelete: time.Millisecond,
		RetryFirst: time.Millisecond, RetryLast: 10 * time.Millisecond}
	ready := make(chan struct{})
	n.Host = openHost(t, dir, func(c *Config) {
		if change != nil {
			change(c, &tc)
		}
		c.OnLead = func(ctx context.Context, s record.ShardID) {
			<-ready
			n.tier.Lead(ctx, s)
		}
	})
	n.tier = tiering.New(tc, n.Host, n.fault)
	n.reader = tiering.NewReader(n.tier, n.Host)
	close(ready)
	t.Cleanup(n.stop)
	return n
}

func (n *node) stop() {
	_ = n.Host.Close(context.Background())
	n.reader.Close()
}

// readThrough reads a partition through all tiers.
func (n *node) readThrough(t testing.TB, tp record.TopicPartition, from record.Offset) (out []string, tiers map[tiering.Tier]int) {
	t.Helper()
	tiers = map[tiering.Tier]int{}
	info, err := n.Partition(tp)
	if err != nil {
		t.Fatal(err)
	}
	for from < info.HighWatermark {
		res, err := n.reader.Read(t.Context(), tp, from, tiering.Limits{MaxBytes: 50_000, AtLeastOne: true, UpTo: info.HighWatermark})
		if err != nil || res.Next == from {
			t.Fatalf("reading at %d of %d: next %d, %v", from, info.HighWatermark, res.Next, err)
		}
		tiers[res.Tier] += res.Bytes
		for data := bytes.Join(res.Buffers, nil); len(data) > 0; {
			b, rest, err := record.Next(data)
			if err != nil || b.CheckCRC() != nil {
				t.Fatal(err)
			}
			err = record.Each(b, 0, func(o record.Offset, r *record.Record) bool {
				if o >= from {
					if o != from {
						t.Fatalf("offset %d where %d is due", o, from)
					}
					out = append(out, string(r.Value))
					from++
				}
				return true
			})
			if err != nil {
				t.Fatal(err)
			}
			data = rest
		}
		if res.Release != nil {
			res.Release()
		}
	}
	return out, tiers
}

// waitMost is how long a test waits for what must happen before it fails. It is no claim about how fast that is: the machine may be busy with something else.
const waitMost = 3 * time.Minute

// until polls a condition of the background work.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(waitMost); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s did not happen", what)
		}
	}
}

func (n *node) produce(t testing.TB, tp record.TopicPartition, from, to int) (values []string) {
	t.Helper()
	for i := from; i < to; i++ {
		v := fmt.Sprintf("%d-%s", i, strings.Repeat("v", i%7*300))
		values = append(values, v)
		if r := appendSync(t, n.Host, AppendBatch{tp, batchOf(t, -1, -1, v)})[0]; r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	return values
}

func sealed(n *node) func() bool {
	return func() bool {
		for _, g := range n.shardList() {
			if n.HotBytes(g.id) > 0 {
				return false
			}
		}
		return true
	}
}

// forgetRecent makes every sealed byte come from an object.
func (n *node) forgetRecent() {
	for _, g := range n.shardList() {
		g.recent.mu.Lock()
		g.recent.m, g.recent.order = nil, nil
		g.recent.mu.Unlock()
	}
}

func TestSealReadRestart(t *testing.T) {
	dir, bucket := t.TempDir(), mem.New()
	n := openNode(t, dir, bucket, nil)
	topic := newTopic(t, n.Host, "t", 3)
	want := map[int32][]string{}
	for life := range 3 {
		for p := range int32(3) {
			want[p] = append(want[p], n.produce(t, record.TopicPartition{Topic: topic.ID, Partition: p}, life*300, life*300+300)...)
		}
		until(t, "sealing", sealed(n))
		more := n.produce(t, record.TopicPartition{Topic: topic.ID}, 10_000*(life+1), 10_000*(life+1)+20) // some stay hot
		want[0] = append(want[0], more...)
		for p := range int32(3) {
			got, _ := n.readThrough(t, record.TopicPartition{Topic: topic.ID, Partition: p}, 0)
			if fmt.Sprint(got) != fmt.Sprint(want[p]) {
				t.Fatalf("life %d, partition %d: %d records, want %d", life, p, len(got), len(want[p]))
			}
		}
		n.forgetRecent()
		for p := range int32(3) {
			got, tiers := n.readThrough(t, record.TopicPartition{Topic: topic.ID, Partition: p}, 0)
			if fmt.Sprint(got) != fmt.Sprint(want[p]) {
				t.Fatalf("life %d, partition %d from objects: %d records, want %d", life, p, len(got), len(want[p]))
			}
			if tiers[tiering.TierObject] == 0 {
				t.Errorf("life %d: nothing came from objects: %v", life, tiers)
			}
		}
		n.stop()
		n = openNode(t, dir, bucket, nil)
	}
}

// The store is down, then fails every other time, before or after it has done what was asked, and flips bits in three answers (one fewer than a read's tries).
func TestStoreOutage(t *testing.T) {
	n := openNode(t, t.TempDir(), mem.New(), nil)
	tp := record.TopicPartition{Topic: newTopic(t, n.Host, "t", 1).ID}
	down := &objstore.Error{Op: "put", Kind: objstore.ErrUnavailable, Err: errors.New("down")}
	n.fault.Set(objstore.Rule{Op: "put", P: 1, Err: down})
	want := n.produce(t, tp, 0, 300)
	until(t, "the outage to be noticed", n.tier.Degraded)
	n.fault.Set(objstore.Rule{Op: "put", P: 0.5, Err: down}, objstore.Rule{Op: "put", P: 0.5, Err: down, After: true}, objstore.Rule{Op: "get", P: 0.3, Flip: true, Times: 3})
	want = append(want, n.produce(t, tp, 300, 600)...)
	until(t, "sealing", sealed(n))
	got, _ := n.readThrough(t, tp, 0)
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("%d records, want %d", len(got), len(want))
	}
}

func TestRetentionAndGarbage(t *testing.T) {
	bucket := mem.New()
	n := openNode(t, t.TempDir(), bucket, func(_ *Config, c *tiering.Config) { c.PrepareTTL = 200 * time.Millisecond })
	topic := newTopic(t, n.Host, "t", 2)
	tp := record.TopicPartition{Topic: topic.ID}
	crash := errors.New("crash")
	n.fault.Set(objstore.Rule{Op: "put", P: 1, Err: crash, After: true, Times: 3}) // uploads that are there and never committed
	n.produce(t, tp, 0, 500)
	until(t, "sealing", sealed(n))
	count := func() (k int) {
		for _, err := range bucket.List(t.Context(), "", "") {
			if err != nil {
				t.Fatal(err)
			}
			k++
		}
		return k
	}
	live := func() (k int) {
		for _, g := range n.shardList() {
			g.mu.RLock()
			k += g.shard.Objects()[2]
			g.mu.RUnlock()
		}
		return k
	}
	until(t, "orphans to be deleted", func() bool { return count() == live() && live() > 0 })
	for _, op := range n.fault.Trace() {
		if strings.HasPrefix(op, "list") {
			t.Errorf("garbage collection needed %q", op)
		}
	}
	got, _ := n.readThrough(t, tp, 0)
	if len(got) != 500 {
		t.Fatalf("%d records", len(got))
	}
	cfg := topic.Config
	cfg.RetentionBytes = 1
	if err := n.AlterConfigs(t.Context(), topic.ID, nil, nil, cfg); err != nil {
		t.Fatal(err)
	}
	until(t, "retention by size", func() bool { i, _ := n.Partition(tp); return i.LogStart > 0 })
	cfg.RetentionBytes, cfg.RetentionMs = -1, 1 // records are of 1970
	if err := n.AlterConfigs(t.Context(), topic.ID, nil, nil, cfg); err != nil {
		t.Fatal(err)
	}
	until(t, "retention by time", func() bool { i, _ := n.Partition(tp); return i.LogStart == i.HighWatermark })
	until(t, "objects to be deleted", func() bool { return count() == 0 })
	if _, err := n.reader.Read(t.Context(), tp, 0, tiering.Limits{MaxBytes: 1, UpTo: 1}); !errors.Is(err, tiering.ErrOutOfRange) {
		t.Errorf("below the log start: %v", err)
	}
}

func TestVanishedAndCorruptObjects(t *testing.T) {
	bucket := mem.New()
	n := openNode(t, t.TempDir(), bucket, nil)
	tp := record.TopicPartition{Topic: newTopic(t, n.Host, "t", 1).ID}
	n.produce(t, tp, 0, 300)
	until(t, "sealing", sealed(n))
	n.forgetRecent()
	var keys []string
	for i, err := range bucket.List(t.Context(), "", "") {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, i.Key)
	}
	read := func() error {
		_, err := n.reader.Read(t.Context(), tp, 0, tiering.Limits{MaxBytes: 1000, AtLeastOne: true, UpTo: 300})
		return err
	}
	for _, key := range keys {
		bucket.Corrupt(key, 100)
	}
	if err := read(); !errors.Is(err, tiering.ErrStorage) {
		t.Errorf("a corrupt object: %v", err)
	}
	for _, key := range keys {
		if err := bucket.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if err := read(); !errors.Is(err, tiering.ErrStorage) {
		t.Errorf("a vanished object: %v", err)
	}
}

func TestTimestamps(t *testing.T) {
	n := openNode(t, t.TempDir(), mem.New(), nil)
	tp := record.TopicPartition{Topic: newTopic(t, n.Host, "t", 1).ID}
	times := []record.Timestamp{100, 500, 300, 900, 50, 900, 700}
	add := func() {
		for i := 0; i < len(times); i += 2 {
			w := record.NewBuilder(record.CodecZstd)
			for _, ts := range times[i:min(i+2, len(times))] {
				w.Add(ts, nil, []byte("v"))
			}
			b, _ := w.Batch()
			if r := appendSync(t, n.Host, AppendBatch{tp, b})[0]; r.Err != nil {
				t.Fatal(r.Err)
			}
		}
	}
	add()
	check := func(when string) {
		t.Helper()
		for _, c := range []struct {
			ts  record.Timestamp
			off record.Offset
			at  record.Timestamp
		}{{0, 0, 100}, {101, 1, 500}, {501, 3, 900}, {900, 3, 900}} {
			off, at, ok, err := n.reader.OffsetForTimestamp(t.Context(), tp, c.ts, 1<<40)
			if err != nil || !ok || off != c.off || at != c.at {
				t.Errorf("%s: at or after %d: %d %d %v %v, want %d %d", when, c.ts, off, at, ok, err, c.off, c.at)
			}
		}
		if _, _, ok, err := n.reader.OffsetForTimestamp(t.Context(), tp, 901, 1<<40); ok || err != nil {
			t.Errorf("%s: found a record that is not there: %v", when, err)
		}
		if off, at, ok, err := n.reader.MaxTimestamp(t.Context(), tp, 1<<40); !ok || off != 3 || at != 900 || err != nil {
			t.Errorf("%s: maximum at %d: %d %v %v", when, off, at, ok, err)
		}
	}
	check("hot")
	until(t, "sealing", sealed(n))
	check("sealed")
	if _, err := n.DeleteRecords(t.Context(), tp, 4); err != nil {
		t.Fatal(err)
	}
	if off, at, ok, err := n.reader.MaxTimestamp(t.Context(), tp, 1<<40); !ok || off != 5 || at != 900 || err != nil {
		t.Errorf("after deleting records: maximum at %d: %d %v %v", off, at, ok, err)
	}
}

func TestRehoming(t *testing.T) {
	n := openNode(t, t.TempDir(), mem.New(), func(_ *Config, c *tiering.Config) {
		c.SealAge, c.RehomeBytes, c.SealBytes = time.Hour, 1<<20, 400_000
	})
	topic := newTopic(t, n.Host, "t", 2)
	slow, busy := -1, -1
	for p := range topic.Partitions {
		if topic.Partitions[p].Shard == topic.Partitions[0].Shard && slow < 0 {
			slow = p
		} else if topic.Partitions[p].Shard == topic.Partitions[max(slow, 0)].Shard {
			busy = p
		}
	}
	if busy < 0 { // two shards: make more partitions
		if err := n.CreatePartitions(t.Context(), topic.ID, 4); err != nil {
			t.Fatal(err)
		}
		slow, busy = 0, 2
	}
	stp, btp := record.TopicPartition{Topic: topic.ID, Partition: int32(slow)}, record.TopicPartition{Topic: topic.ID, Partition: int32(busy)}
	want := n.produce(t, stp, 0, 20)
	g := n.groupOf(stp)
	g.mu.RLock()
	before := g.shard.HotRefs(stp, 0, 1, nil)[0].Index
	g.mu.RUnlock()
	large := strings.Repeat("x", 100_000)
	for i := 0; ; i++ {
		if r := appendSync(t, n.Host, AppendBatch{btp, batchOf(t, -1, -1, large)})[0]; r.Err != nil {
			t.Fatal(r.Err)
		}
		g.mu.RLock()
		now := g.shard.HotRefs(stp, 0, 1, nil)[0].Index
		g.mu.RUnlock()
		if now > before {
			break
		}
		if i > 2000 {
			t.Fatal("the slow partition was never rehomed")
		}
	}
	if got, _ := n.readThrough(t, stp, 0); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Error("rehoming changed the records")
	}
}

// Without leave nothing is deleted, however long its grace is over: another history of the cluster may need it. With leave it is.
func TestNothingIsDeletedWithoutLeave(t *testing.T) {
	bucket := mem.New()
	var asked atomic.Int64
	var leave atomic.Bool
	n := openNode(t, t.TempDir(), bucket, func(_ *Config, c *tiering.Config) {
		c.MayDelete = func(context.Context) error {
			if asked.Add(1); !leave.Load() {
				return errors.New("fenced")
			}
			return nil
		}
	})
	topic := newTopic(t, n.Host, "t", 1)
	tp := record.TopicPartition{Topic: topic.ID}
	n.produce(t, tp, 0, 500)
	until(t, "sealing", sealed(n))
	cfg := topic.Config
	cfg.RetentionMs = 1 // records are of 1970
	if err := n.AlterConfigs(t.Context(), topic.ID, nil, nil, cfg); err != nil {
		t.Fatal(err)
	}
	until(t, "retention", func() bool { i, _ := n.Partition(tp); return i.LogStart == i.HighWatermark })
	until(t, "it to be asked again and again", func() bool { return asked.Load() > 5 })
	deleted := func() (k int) {
		for _, op := range n.fault.Trace() {
			if strings.HasPrefix(op, "delete") {
				k++
			}
		}
		return k
	}
	if k := deleted(); k > 0 {
		t.Errorf("%d deletions without leave", k)
	}
	leave.Store(true)
	until(t, "deletion with leave", func() bool { return deleted() > 0 })
}
