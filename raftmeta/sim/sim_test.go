package sim

import (
	"context"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/estran/estran/broker"
	"github.com/estran/estran/localstack/check"
	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
)

// options are drawn from the seed.
type options struct {
	Seed uint64
	// Load is how long there are load and faults; what follows until everything has expired and was deleted comes on top.
	Load time.Duration

	Raft    raftmeta.Config
	Tiering tiering.Config

	Retention               time.Duration // of the topic that keeps records for a time
	RetentionBytes          int64         // of the topic that keeps so many bytes
	Partitions              int32         // of each topic
	Pause, Poll, Audit, Gap time.Duration // between batches of a partition, rounds of a reader, audits, faults of a track
	Records, RecordBytes    int           // most of a batch, most of a record
}

func draw(seed uint64, load time.Duration, slower int) options {
	rng := rand.New(rand.NewPCG(seed, 0))
	minutes := func(least, most int) time.Duration { return time.Duration(least+rng.IntN(most-least+1)) * time.Minute }
	size := func(sizes ...int64) int64 { return sizes[rng.IntN(len(sizes))] }
	o := options{Seed: seed, Load: load}
	o.Raft = raftmeta.Config{Secret: []byte("secret"), Slower: slower, Shards: uint32(1 + rng.IntN(2)), HotMaxBytes: size(4<<20, 16<<20, 1<<30),
		LocalRetentionBytes: size(0, 1<<20, 16<<20), FileBytes: size(256<<10, 1<<20), TailBytes: size(64<<10, 1<<20), BackupEvery: minutes(5, 20)}
	o.Tiering = tiering.Config{SealBytes: size(32<<10, 128<<10, 1<<20), SealAge: minutes(1, 15), UploadConcurrency: 1 + rng.IntN(3), PrepareTTL: minutes(20, 60), LateDelete: minutes(20, 60),
		Grace: minutes(10, 40), RehomeBytes: size(256<<10, 2<<20, 1<<30), CacheBytes: size(256<<10, 4<<20), HousekeepEvery: time.Duration(20+rng.IntN(100)) * time.Second}
	o.Retention, o.RetentionBytes, o.Partitions = minutes(20, 100), size(5<<10, 20<<10), int32(1+rng.IntN(2))
	o.Pause, o.Poll, o.Audit, o.Gap = time.Duration(5+rng.IntN(40))*time.Second, minutes(1, 3), 2*time.Minute, max(min(load/10, time.Hour), time.Minute)
	o.Records, o.RecordBytes = 1+rng.IntN(5), 20+int(size(100, 1000, 5000))
	return o
}

// world is one simulation.
type world struct {
	t      *testing.T
	o      options
	logger *slog.Logger
	net    *network
	store  *store
	voters []raftmeta.Voter
	nodes  []*node
	parts  []*part
	began  time.Time
	value  atomic.Uint64
	kafka  *broker.Config // of the nodes' servers; nil = they have none
	load   chan struct{}  // closed when load and faults end
	over   chan struct{}  // closed when nothing is waited for any more
	wg     sync.WaitGroup

	mu      sync.Mutex
	history []check.Op
	faulted int // complaints
}

func (w *world) at() int64 { return int64(time.Since(w.began)) }

func (w *world) record(o check.Op) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.history = append(w.history, o)
}

func (w *world) say(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	w.logger.Info(s, "event", "sim")
	w.t.Logf("%10s %s", time.Since(w.began).Round(time.Second), s)
}

func (w *world) failf(format string, args ...any) {
	w.mu.Lock()
	w.faulted++
	n := w.faulted
	w.mu.Unlock()
	if n <= 20 { // the first says what is wrong
		w.say(format, args...)
	}
	w.t.Fail()
}

// rng is one stream of chance of the seed.
func (w *world) rng(name string, n uint64) *rand.Rand {
	h := fnv.New64a()
	_, _ = h.Write([]byte(name))
	return rand.New(rand.NewPCG(w.o.Seed, h.Sum64()+n))
}

// sleep waits for about d; false = until has come.
func (w *world) sleep(until <-chan struct{}, rng *rand.Rand, d time.Duration) bool {
	select {
	case <-time.After(d/2 + time.Duration(rng.Int64N(int64(d)))):
		return true
	case <-until:
		return false
	}
}

// begin starts the voters and makes the topics; the caller stops the voters. false = it failed.
func (w *world) begin(dirs []string) bool {
	w.began, w.load, w.over = time.Now(), make(chan struct{}), make(chan struct{})
	w.net, w.store = newNetwork(), newStore(w)
	for i := range 3 {
		v := raftmeta.Voter{ID: int32(i + 1), Addr: fmt.Sprintf("voter-%d", i+1)}
		w.voters = append(w.voters, v)
		w.nodes = append(w.nodes, &node{w: w, id: v.ID, addr: v.Addr, dir: dirs[i]})
	}
	for _, n := range w.nodes {
		n.start()
	}
	for _, n := range w.nodes {
		<-n.opened
	}
	return !w.t.Failed() && w.createTopics()
}

func (w *world) stop() {
	for _, n := range w.nodes {
		n.stop()
	}
}

func (w *world) run(dirs []string) {
	defer w.stop()
	if !w.begin(dirs) {
		return
	}
	for _, p := range w.parts {
		w.wg.Go(func() { w.produce(p) })
	}
	w.wg.Go(w.read)
	w.wg.Go(w.readAgain)
	w.wg.Go(w.deleteRecords)
	w.wg.Go(w.audit)
	w.faults()
	time.Sleep(w.o.Load)
	close(w.load)
	w.say("load and faults end")
	w.finish()
}

// finish waits for what must come to pass, and judges.
func (w *world) finish() {
	for _, n := range w.nodes { // all faults are over soon
		w.await(time.Hour, func() string {
			if n.live.Load() == nil {
				return fmt.Sprintf("node %d has not opened", n.id)
			}
			return ""
		})
	}
	t := &w.o.Tiering
	w.await(w.o.Retention+t.SealAge+t.Grace+t.PrepareTTL+t.LateDelete+2*time.Hour, w.settled)
	w.say("settled")
	time.Sleep(time.Until(w.began.Add(2 * time.Hour))) // nothing more may happen
	close(w.over)
	w.wg.Wait()
	if w.t.Failed() {
		return
	}
	w.await(10*time.Minute, w.sameStates)
	w.readAll()
	w.judge()
}

func (w *world) createTopics() bool {
	topics := []*topic{{name: "for-ever"}, {name: "for-a-time", retention: w.o.Retention}, {name: "so-many-bytes", retentionBytes: w.o.RetentionBytes}, {name: "deleted", mayDelete: true}}
	var specs []raftmeta.TopicSpec
	for _, t := range topics {
		s := raftmeta.TopicSpec{Name: t.name, Partitions: w.o.Partitions, ReplicationFactor: 3, Parsed: state.PartitionConfig{RetentionMs: -1, RetentionBytes: -1}}
		if t.retention > 0 {
			s.Parsed.RetentionMs = t.retention.Milliseconds()
		}
		if t.retentionBytes > 0 {
			s.Parsed.RetentionBytes = t.retentionBytes
		}
		specs = append(specs, s)
	}
	for i, c := range w.nodes[0].live.Load().CreateTopics(context.Background(), specs) {
		if c.Err != nil {
			w.failf("creating topic %s: %v", topics[i].name, c.Err)
			return false
		}
		for p := range w.o.Partitions {
			w.parts = append(w.parts, &part{key: int32(len(w.parts)), tp: record.TopicPartition{Topic: c.Topic.ID, Partition: p}, topic: topics[i]})
		}
	}
	return true
}

// simulate runs one simulation.
func simulate(t *testing.T, o options) (lived time.Duration) {
	dirs := []string{t.TempDir(), t.TempDir(), t.TempDir()}
	var out io.Writer = io.Discard
	if path := os.Getenv("ESTRAN_SIM_LOG"); path != "" {
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		out = f
	}
	t.Logf("%+v", o)
	began := time.Now()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, o: o, logger: slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug}))}
		w.run(dirs)
		lived = time.Since(w.began)
	})
	t.Logf("%s of cluster time in %s", lived.Round(time.Second), time.Since(began).Round(time.Millisecond))
	return lived
}

// number is a setting of the simulation.
func number(t *testing.T, name string, otherwise int) int {
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// Three voters live through hours of faults; then everything that was acknowledged and has not expired is there, on every voter, and nothing else.
func TestSimulation(t *testing.T) {
	seed, load, slower := number(t, "ESTRAN_SIM_SEED", 6), 80*time.Minute, 20 // with the race detector, in seconds
	if hours := number(t, "ESTRAN_SIM_HOURS", 0); hours > 0 {
		load, slower = time.Duration(hours)*time.Hour, []int{5, 10, 20}[seed%3]
	}
	if lived := simulate(t, draw(uint64(seed), load, slower)); lived < 2*time.Hour && !t.Failed() {
		t.Errorf("only %s", lived)
	}
}
