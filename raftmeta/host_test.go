package raftmeta

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openHost(t testing.TB, dir string, change func(*Config)) *Host {
	t.Helper()
	cfg := Config{NodeID: 1, DataDir: dir, Host: "127.0.0.1", Port: 9092, Shards: 2, HotMaxBytes: 1 << 30, FileBytes: 4 << 20,
		OnFatal: func(err error) { t.Errorf("fatal: %v", err) }}
	if change != nil {
		change(&cfg)
	}
	ctx, cancel := context.WithTimeout(t.Context(), waitMost)
	defer cancel()
	h, err := Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close(context.Background()) })
	return h
}

func newTopic(t testing.TB, h *Host, name string, partitions int32) *state.Topic {
	t.Helper()
	for {
		topic, err := createTopic(t.Context(), h, TopicSpec{Name: name, Partitions: partitions, ReplicationFactor: 1, Parsed: state.PartitionConfig{RetentionMs: -1, RetentionBytes: -1}})
		if errors.Is(err, ErrTopicExists) { // made before an election
			until(t, "the topic to be known", func() (ok bool) { topic, ok = h.Cluster().Topic(name); return ok })
			return topic
		}
		if err == nil {
			return topic
		}
		if !moved(err) || t.Context().Err() != nil {
			t.Fatal(err)
		}
	}
}

// decided repeats what was asked for until it is decided: leadership may be lost on the way, and on a busy machine voters answer too late to be counted.
func decided(t testing.TB, what string, ask func() error) {
	t.Helper()
	until(t, what, func() bool {
		err := ask()
		if err != nil && !moved(err) && !errors.Is(err, ErrMajority) {
			t.Fatalf("%s: %v", what, err)
		}
		return err == nil
	})
}

// snapshotNow takes a snapshot. raft refuses one as long as a configuration is committed and not applied.
func snapshotNow(t testing.TB, g *group) {
	t.Helper()
	var err error
	until(t, "a snapshot", func() bool {
		err = g.snapshot()
		return err == nil || !strings.Contains(err.Error(), "wait until the configuration entry")
	})
	if err != nil {
		t.Fatal(err)
	}
}

func batchOf(t testing.TB, producer record.ProducerID, seq record.Sequence, values ...string) record.Batch {
	t.Helper()
	w := record.NewBuilder(record.CodecNone)
	w.ProducerID, w.BaseSequence = producer, seq
	if producer >= 0 {
		w.ProducerEpoch = 0
	}
	for _, v := range values {
		w.Add(1000, nil, []byte(v))
	}
	b, err := w.Batch()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func appendSync(t testing.TB, h *Host, batches ...AppendBatch) []AppendResult {
	t.Helper()
	ch := make(chan []AppendResult, 1)
	h.Append(t.Context(), AppendRequest{Batches: batches}, func(r []AppendResult) { ch <- r })
	return <-ch
}

// readAll reads a partition's records from the hot log.
func readAll(t testing.TB, h *Host, tp record.TopicPartition, from record.Offset) (out []string) {
	t.Helper()
	info, err := h.Partition(tp)
	if err != nil && !errors.Is(err, ErrNotLeader) {
		t.Fatal(err)
	}
	for from < info.HighWatermark {
		res, err := h.ReadHot(t.Context(), tp, from, tiering.Limits{MaxBytes: 10_000, AtLeastOne: true, UpTo: info.HighWatermark})
		if err != nil || res.Next == from {
			t.Fatalf("reading at %d: next %d, %v", from, res.Next, err)
		}
		data := bytes.Join(res.Buffers, nil)
		if len(data) != res.Bytes {
			t.Fatalf("%d bytes in buffers, result says %d", len(data), res.Bytes)
		}
		for len(data) > 0 {
			b, rest, err := record.Next(data)
			if err != nil || b.CheckCRC() != nil {
				t.Fatal(err)
			}
			if err := record.Each(b, 0, func(o record.Offset, r *record.Record) bool {
				if o >= from {
					if o != from {
						t.Fatalf("offset %d where %d is due", o, from)
					}
					out = append(out, string(r.Value))
					from++
				}
				return true
			}); err != nil {
				t.Fatal(err)
			}
			data = rest
		}
		res.Release()
	}
	return out
}

func TestAppendReadRestart(t *testing.T) {
	dir := t.TempDir()
	h := openHost(t, dir, nil)
	topic := newTopic(t, h, "t", 3)
	want := map[int32][]string{}
	for i := range 200 {
		var req []AppendBatch
		for p := range int32(3) {
			v := fmt.Sprintf("p%d-%d", p, i)
			large := v + string(bytes.Repeat([]byte{'x'}, i*30))
			want[p] = append(want[p], v, large)
			req = append(req, AppendBatch{record.TopicPartition{Topic: topic.ID, Partition: p}, batchOf(t, -1, -1, v, large)})
		}
		for p, r := range appendSync(t, h, req...) {
			if r.Err != nil || r.Base != record.Offset(2*i) {
				t.Fatalf("append %d to %d: %+v", i, p, r)
			}
		}
	}
	for life := range 3 {
		for p := range int32(3) {
			got := readAll(t, h, record.TopicPartition{Topic: topic.ID, Partition: p}, 0)
			if fmt.Sprint(got) != fmt.Sprint(want[p]) {
				t.Fatalf("life %d, partition %d: %d records, want %d", life, p, len(got), len(want[p]))
			}
		}
		if life == 1 { // a snapshot in between changes nothing
			for _, g := range h.groups() {
				snapshotNow(t, g)
			}
		}
		if err := h.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		h = openHost(t, dir, nil)
		if got, ok := h.Cluster().Topic("t"); !ok || got.ID != topic.ID {
			t.Fatal("topic lost")
		}
	}
}

func TestIdempotenceAcrossRestart(t *testing.T) {
	dir := t.TempDir()
	h := openHost(t, dir, nil)
	tp := record.TopicPartition{Topic: newTopic(t, h, "t", 1).ID}
	for i := range 4 {
		appendSync(t, h, AppendBatch{tp, batchOf(t, 7, record.Sequence(i), "v")})
	}
	for _, restart := range []bool{false, true} {
		if restart {
			_ = h.Close(t.Context())
			h = openHost(t, dir, nil)
		}
		if r := appendSync(t, h, AppendBatch{tp, batchOf(t, 7, 2, "v")})[0]; r.Err != nil || r.Base != 2 {
			t.Errorf("restart %v: repeat: %+v", restart, r)
		}
		if r := appendSync(t, h, AppendBatch{tp, batchOf(t, 7, 9, "v")})[0]; !errors.Is(r.Err, ErrOutOfOrderSequence) {
			t.Errorf("restart %v: gap: %+v", restart, r)
		}
	}
	a, err := h.AllocateProducerID(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = h.Close(t.Context())
	h = openHost(t, dir, nil)
	if b, err := h.AllocateProducerID(t.Context()); err != nil || b <= a {
		t.Errorf("producer ID %d after %d: %v", b, a, err)
	}
}

func TestManyAppendersKeepTheirOrder(t *testing.T) {
	h := openHost(t, t.TempDir(), nil)
	topic := newTopic(t, h, "t", 4)
	var wg sync.WaitGroup
	var answered atomic.Int64
	const each = 300
	for c := range 8 {
		wg.Go(func() {
			var left sync.WaitGroup
			for i := range each {
				left.Add(1)
				tp := record.TopicPartition{Topic: topic.ID, Partition: int32(c % 4)}
				h.Append(t.Context(), AppendRequest{Batches: []AppendBatch{{tp, batchOf(t, record.ProducerID(c), record.Sequence(i), fmt.Sprintf("%d:%d", c, i))}}}, func(r []AppendResult) {
					if r[0].Err != nil {
						t.Errorf("appender %d, record %d: %v", c, i, r[0].Err)
					}
					answered.Add(1)
					left.Done()
				})
			}
			left.Wait()
		})
	}
	wg.Wait()
	if n := answered.Load(); n != 8*each {
		t.Fatalf("%d of %d answered", n, 8*each)
	}
	next := map[int]int{}
	for p := range int32(4) {
		for _, v := range readAll(t, h, record.TopicPartition{Topic: topic.ID, Partition: p}, 0) {
			var c, i int
			if _, err := fmt.Sscanf(v, "%d:%d", &c, &i); err != nil || i != next[c] {
				t.Fatalf("appender %d: record %d where %d is due", c, i, next[c])
			}
			next[c]++
		}
	}
}

func TestAdmin(t *testing.T) {
	h := openHost(t, t.TempDir(), nil)
	topic := newTopic(t, h, "t", 2)
	if _, err := createTopic(t.Context(), h, TopicSpec{Name: "t", Partitions: 1}); !errors.Is(err, ErrTopicExists) {
		t.Errorf("create again: %v", err)
	}
	if err := h.CreatePartitions(t.Context(), topic.ID, 5); err != nil {
		t.Fatal(err)
	}
	tp := record.TopicPartition{Topic: topic.ID, Partition: 4}
	for range 5 {
		if r := appendSync(t, h, AppendBatch{tp, batchOf(t, -1, -1, "a", "b")})[0]; r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	if start, err := h.DeleteRecords(t.Context(), tp, 4); err != nil || start != 4 {
		t.Errorf("delete records: %d %v", start, err)
	}
	if _, err := h.DeleteRecords(t.Context(), tp, 11); !errors.Is(err, ErrOffsetOutOfRange) {
		t.Errorf("beyond the end: %v", err)
	}
	if err := h.AlterConfigs(t.Context(), topic.ID, map[string]string{"retention.ms": "1000"}, nil, state.PartitionConfig{RetentionMs: 1000, RetentionBytes: -1}); err != nil {
		t.Fatal(err)
	}
	if i, err := h.Partition(tp); err != nil || i.Config.RetentionMs != 1000 || i.LogStart != 4 || i.HighWatermark != 10 {
		t.Errorf("partition: %+v %v", i, err)
	}
	if err := h.DeleteTopics(t.Context(), []record.TopicID{topic.ID})[0]; err != nil {
		t.Fatal(err)
	}
	if r := appendSync(t, h, AppendBatch{tp, batchOf(t, -1, -1, "a")})[0]; !errors.Is(r.Err, ErrUnknownPartition) {
		t.Errorf("append to a deleted topic: %v", r.Err)
	}
	again := newTopic(t, h, "t", 1)
	if i, err := h.Partition(record.TopicPartition{Topic: again.ID}); again.ID == topic.ID || err != nil || i.HighWatermark != 0 {
		t.Errorf("the topic made again: %+v %v", i, err)
	}
}

func TestWatchAndProve(t *testing.T) {
	h := openHost(t, t.TempDir(), nil)
	topic := newTopic(t, h, "t", 2)
	tp := record.TopicPartition{Topic: topic.ID}
	woken := make(chan struct{}, 10)
	stop := h.Watch([]record.TopicPartition{tp}, func() { woken <- struct{}{} })
	appendSync(t, h, AppendBatch{tp, batchOf(t, -1, -1, "a")})
	<-woken
	appendSync(t, h, AppendBatch{record.TopicPartition{Topic: topic.ID, Partition: 1}, batchOf(t, -1, -1, "a")})
	stop()
	appendSync(t, h, AppendBatch{tp, batchOf(t, -1, -1, "a")})
	if len(woken) != 0 {
		t.Error("woken by another partition, or after stop")
	}
	for _, p := range topic.Partitions {
		if err := h.Prove(t.Context(), p.Shard); err != nil {
			t.Error(err)
		}
	}
}

func TestBudget(t *testing.T) {
	h := openHost(t, t.TempDir(), func(c *Config) { c.HotMaxBytes, c.Shards = 2<<20, 1 })
	tp := record.TopicPartition{Topic: newTopic(t, h, "t", 1).ID}
	value := string(bytes.Repeat([]byte{'v'}, 100_000))
	refused := 0
	for i := range 40 {
		r := appendSync(t, h, AppendBatch{tp, batchOf(t, 3, record.Sequence(i-refused), value)})[0]
		if errors.Is(r.Err, ErrBudget) {
			if refused++; refused == 2 {
				break
			}
		} else if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	if refused == 0 {
		t.Fatal("the budget was never used up")
	}
	info, _ := h.Partition(tp)
	if _, err := h.DeleteRecords(t.Context(), tp, -1); err != nil { // control commands are always admitted
		t.Fatal(err)
	}
	snapshotNow(t, h.shardList()[0])
	// The refused batch must come again before a later one of its producer is taken.
	seq := record.Sequence(info.HighWatermark)
	if r := appendSync(t, h, AppendBatch{tp, batchOf(t, 3, seq+1, "late")})[0]; !errors.Is(r.Err, ErrBudget) {
		t.Errorf("a batch behind the refused one: %v", r.Err)
	}
	for _, s := range []record.Sequence{seq, seq + 1} {
		if r := appendSync(t, h, AppendBatch{tp, batchOf(t, 3, s, "v")})[0]; r.Err != nil || r.Base != record.Offset(s) {
			t.Errorf("after the budget is free again: %+v", r)
		}
	}
}

// What must be kept of the log is bounded by the distance of two snapshots, however often it was freed before. (Leaders take one with each round of sealing too: nothing seals here.)
func TestLogKeptBetweenSnapshots(t *testing.T) {
	const every = 16 << 20 // a quarter of the budget
	h := openHost(t, t.TempDir(), func(c *Config) { c.Shards, c.HotMaxBytes = 1, 4*every })
	g := h.shardList()[0]
	tp := record.TopicPartition{Topic: newTopic(t, h, "t", 1).ID}
	value := strings.Repeat("v", 1<<20)
	for round := range 4 {
		for range (every + every/4) >> 20 {
			if r := appendSync(t, h, AppendBatch{tp, batchOf(t, -1, -1, value)})[0]; r.Err != nil {
				t.Fatal(r.Err)
			}
		}
		until(t, fmt.Sprintf("snapshot %d, of records that are all hot", round), func() bool { return g.log.SinceSnapshot() < every })
		if _, err := h.DeleteRecords(t.Context(), tp, -1); err != nil { // they are hot no more
			t.Fatal(err)
		}
		until(t, fmt.Sprintf("freeing in round %d", round), func() bool { _, unfree := g.log.Bytes(); return unfree < every })
	}
}

func TestDataDirectory(t *testing.T) {
	dir := t.TempDir()
	h := openHost(t, dir, nil)
	if _, err := Open(t.Context(), h.cfg); !errors.Is(err, ErrLocked) {
		t.Errorf("a second process: %v", err)
	}
	_ = h.Close(t.Context())
	cfg := h.cfg
	cfg.NodeID = 2
	if _, err := Open(t.Context(), cfg); !errors.Is(err, ErrForeign) {
		t.Errorf("another node: %v", err)
	}
	foreign := t.TempDir()
	if err := os.WriteFile(filepath.Join(foreign, "thesis.doc"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.DataDir = foreign
	if _, err := Open(t.Context(), cfg); !errors.Is(err, ErrForeign) {
		t.Errorf("a foreign directory: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "shard-1", "stable")); err != nil {
		t.Fatal(err)
	}
	again := h.cfg
	again.Registerer = nil
	if _, err := Open(t.Context(), again); !errors.Is(err, ErrForeign) {
		t.Errorf("an incomplete directory: %v", err)
	}
}

// A refused batch holds up those behind it until it comes again, never those before it, and not for longer than it takes another leader to accept it.
func TestMarks(t *testing.T) {
	var k marks
	refused := errors.New("refused")
	batch := func(seq record.Sequence) AppendBatch { return AppendBatch{Batch: batchOf(t, 5, seq, "v")} }
	last, known := record.Sequence(0), false
	accepted := func(*AppendBatch) (record.Sequence, bool) { return last, known }
	k.refuse(batch(10), refused)
	for seq, want := range map[record.Sequence]error{9: nil, 1<<31 - 1: nil, 11: refused, 12: refused} {
		if err := k.check(batch(seq), accepted); !errors.Is(err, want) || (err == nil) != (want == nil) {
			t.Errorf("sequence %d behind a refused 10: %v, want %v", seq, err, want)
		}
	}
	if err := k.check(batch(10), accepted); err != nil {
		t.Errorf("the refused one again: %v", err)
	}
	if err := k.check(batch(11), accepted); err != nil {
		t.Errorf("behind it: %v", err)
	}
	k.refuse(batch(20), refused)
	if last, known = 19, true; k.check(batch(21), accepted) == nil {
		t.Error("21 passes while 20 has been accepted nowhere")
	}
	if last = 20; k.check(batch(21), accepted) != nil || k.check(batch(22), accepted) != nil {
		t.Error("21 waits for 20, which another leader has accepted")
	}
}

// Every append is answered exactly once, also when the node closes under it.
func TestCloseAnswersEveryAppend(t *testing.T) {
	for seed := range uint64(5) {
		h := openHost(t, t.TempDir(), nil)
		tp := record.TopicPartition{Topic: newTopic(t, h, "t", 1).ID}
		var calls, answers atomic.Int64
		middle := 1 + int64(rand.New(rand.NewPCG(seed, 1)).IntN(300)) // the answer at which the node closes
		reached := make(chan struct{})
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 200 {
					var once atomic.Bool
					calls.Add(1)
					h.Append(t.Context(), AppendRequest{Batches: []AppendBatch{{tp, batchOf(t, -1, -1, "v")}}}, func([]AppendResult) {
						if once.Swap(true) {
							t.Error("answered twice")
						}
						if answers.Add(1) == middle {
							close(reached)
						}
					})
				}
			})
		}
		<-reached
		_ = h.Close(t.Context())
		wg.Wait()
		if calls.Load() != answers.Load() {
			t.Fatalf("seed %d: %d calls, %d answers", seed, calls.Load(), answers.Load())
		}
	}
}

// leadershipEnds counts the ends of leaderships that are logged.
type leadershipEnds struct {
	slog.Handler
	n *atomic.Int64
}

func (e leadershipEnds) Enabled(context.Context, slog.Level) bool { return true }
func (e leadershipEnds) WithAttrs([]slog.Attr) slog.Handler       { return e }
func (e leadershipEnds) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "leadership lost" {
		e.n.Add(1)
	}
	return nil
}

// Whoever loses the leadership while the start of its term is being applied does not take itself for the leader afterwards: nobody else would count for one.
func TestLeadershipLostAtItsStart(t *testing.T) {
	var ended atomic.Int64
	h := openHost(t, t.TempDir(), func(c *Config) { c.Logger = slog.New(leadershipEnds{slog.DiscardHandler, &ended}) })
	g := h.shardByID(1)
	follows := func() bool {
		g.batcher.mu.Lock()
		defer g.batcher.mu.Unlock()
		return g.batcher.term == 0
	}
	g.notify <- false
	until(t, "it to follow", func() bool { return ended.Load() == 1 })
	before, err := g.log.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	g.mu.Lock() // nothing is applied
	g.notify <- true
	until(t, "a new start", func() bool { last, err := g.log.LastIndex(); return err != nil || last > before })
	g.notify <- false
	until(t, "its end to begin", follows)
	g.mu.Unlock()
	until(t, "its end", func() bool { return ended.Load() == 2 })
	if term := g.leads.Load(); term != 0 {
		t.Errorf("it follows, and leads term %d", term)
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{16 << 10, 64 << 10} {
		for _, callers := range []int{1, 4, 16} {
			b.Run(fmt.Sprintf("%dKiB/%d", size>>10, callers), func(b *testing.B) {
				h := openHost(b, b.TempDir(), func(c *Config) { c.FileBytes, c.Shards = 0, 3 })
				topic := newTopic(b, h, "t", 12)
				batch := batchOf(b, -1, -1, string(make([]byte, size)))
				b.SetBytes(int64(size))
				b.ReportAllocs()
				var n atomic.Int64
				var wg sync.WaitGroup
				b.ResetTimer()
				for range callers {
					wg.Go(func() {
						window := make(chan struct{}, 5*12)
						for i := n.Add(1); i <= int64(b.N); i = n.Add(1) {
							window <- struct{}{}
							tp := record.TopicPartition{Topic: topic.ID, Partition: int32(i % 12)}
							h.Append(b.Context(), AppendRequest{Batches: []AppendBatch{{tp, batch}}}, func(r []AppendResult) {
								if r[0].Err != nil {
									b.Error(r[0].Err)
								}
								<-window
							})
							if i%4000 == 0 {
								for p := range int32(12) {
									_, _ = h.DeleteRecords(b.Context(), record.TopicPartition{Topic: topic.ID, Partition: p}, -1)
								}
							}
						}
						for range cap(window) {
							window <- struct{}{}
						}
					})
				}
				wg.Wait()
			})
		}
	}
}

func createTopic(ctx context.Context, h *Host, s TopicSpec) (*state.Topic, error) {
	made := h.CreateTopics(ctx, []TopicSpec{s})[0]
	return made.Topic, made.Err
}

// A log whose entries cannot be read at the start is refused as corrupt; raft itself would panic.
func TestDamagedEntryIsRefused(t *testing.T) {
	dir := t.TempDir()
	h := openHost(t, dir, nil)
	newTopic(t, h, "t", 2)
	for range 2 { // the second time what was written before lies in a closed file, which is not scanned
		if err := h.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		h = openHost(t, dir, nil)
	}
	if err := h.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "shard-1", fmt.Sprintf("%016x.log", 1))
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	const block, header, data = 4096, 76, 52 // raftlog/FORMAT.md
	damaged := 0
	for at := block; at < len(b) && string(b[at:at+4]) == "REC1"; at += block { // each batch is one small record here
		if binary.BigEndian.Uint32(b[at+data:]) > 0 {
			b[at+header] ^= 1
			damaged++
		}
	}
	if damaged == 0 {
		t.Fatal("no record has data")
	}
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), Config{NodeID: 1, DataDir: dir, Host: "127.0.0.1", Port: 9092, Shards: 2, HotMaxBytes: 1 << 30, FileBytes: 4 << 20})
	if !errors.Is(err, raftlog.ErrCorrupt) {
		t.Errorf("it opens, or says: %v", err)
	}
}

// unreadable is a disk from which meta's log cannot be read any more once raft has been opened, which saves its term again, and saves the next one to elect itself.
type unreadable struct {
	raftlog.FS
	terms atomic.Int32
}

type unreadableFile struct {
	raftlog.File
	fs   *unreadable
	name string
}

func (u *unreadable) Open(name string) (raftlog.File, error) {
	f, err := u.FS.Open(name)
	return &unreadableFile{f, u, name}, err
}

func (f *unreadableFile) WriteAt(p []byte, at int64) (int, error) {
	if strings.HasSuffix(f.name, "/meta/stable") {
		f.fs.terms.Add(1)
	}
	return f.File.WriteAt(p, at)
}

func (f *unreadableFile) ReadAt(p []byte, at int64) (int, error) {
	if filepath.Ext(f.name) == ".log" && strings.Contains(f.name, "/meta/") && f.fs.terms.Load() > 1 {
		return 0, fmt.Errorf("pread %s: %w", f.name, syscall.EIO)
	}
	return f.File.ReadAt(p, at)
}

// A node whose disk cannot be read ends by a fault, not by raft's panic. It ends in a process of its own: what is left of a raft that waits is only gone with that.
func TestUnreadableLogEndsTheNode(t *testing.T) {
	const at = "ESTRAN_TEST_UNREADABLE"
	if dir := os.Getenv(at); dir != "" {
		_, err := Open(t.Context(), Config{NodeID: 1, DataDir: dir, Host: "127.0.0.1", Port: 9092, Shards: 2, HotMaxBytes: 1 << 30, FileBytes: 4 << 20, FS: &unreadable{FS: raftlog.OS{}},
			OnFatal: func(err error) {
				fmt.Println("fatal:", errors.Is(err, raftlog.ErrRead), errors.Is(err, syscall.EIO), err)
				os.Exit(1)
			}})
		t.Fatal("opened", err)
	}
	dir := t.TempDir()
	h := openHost(t, dir, nil)
	newTopic(t, h, "t", 2)
	if err := h.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), waitMost)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), at+"="+dir)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "fatal: true true") {
		t.Errorf("it ends by %v:\n%s", err, out)
	}
}
