package localstack

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

// program builds the binary once for all tests.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "estran-e2e-")
	if err != nil {
		return "", err
	}
	return Build(context.Background(), "..", dir)
})

func TestMain(m *testing.M) {
	code := m.Run()
	if p, err := program(); err == nil && !testing.Short() {
		_ = os.RemoveAll(filepath.Dir(p))
	}
	os.Exit(code)
}

func startNode(t *testing.T, dir string, env []string, args ...string) *Node {
	t.Helper()
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	n := NewNode(p, dir, env, args...)
	restart(t, n)
	t.Cleanup(func() {
		_ = n.Kill()
		if t.Failed() {
			t.Log(n.Tail())
		}
	})
	return n
}

func restart(t *testing.T, n *Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitMost)
	defer cancel()
	if err := n.Start(ctx); err != nil {
		t.Fatal(err)
	}
}

func client(t *testing.T, n *Node, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	cl, err := kgo.NewClient(append([]kgo.Opt{kgo.SeedBrokers(n.Kafka), kgo.MetadataMinAge(50 * time.Millisecond), kgo.MetadataMaxAge(2 * time.Second), kgo.RetryBackoffFn(func(int) time.Duration { return 20 * time.Millisecond })}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cl.Close)
	return cl
}

func createTopic(t *testing.T, n *Node, name string, partitions int32) {
	t.Helper()
	createReplicated(t, n, name, partitions, 1)
}

// createReplicated makes a topic and leaves no connection. Nobody else makes one of that name: if it is there, it was made by a try whose outcome was not known.
func createReplicated(t *testing.T, n *Node, name string, partitions int32, factor int16) {
	t.Helper()
	cl := client(t, n)
	defer cl.Close()
	done(t, "topic "+name+" to be made", kerr.TopicAlreadyExists, func() error {
		r, err := kadm.NewClient(cl).CreateTopic(t.Context(), partitions, factor, nil, name)
		return errors.Join(err, r.Err)
	})
}

// done repeats a request until it is answered with success, or with what it is answered if a try before had done it. A busy machine may elect in the middle of a request.
func done(t *testing.T, what string, already *kerr.Error, ask func() error) {
	t.Helper()
	until(t, what, func() bool {
		err := ask()
		var code *kerr.Error
		if err != nil && !errors.Is(err, already) && errors.As(err, &code) && !code.Retriable {
			t.Fatalf("%s: %v", what, err)
		}
		return err == nil || errors.Is(err, already)
	})
}

// metric sums a metric's samples whose line contains every one of the parts.
func metric(t *testing.T, n *Node, parts ...string) float64 {
	t.Helper()
	sum, err := n.Metric(t.Context(), parts...)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// waitMost is how long a test waits for what must happen before it fails. It is no claim about how fast that is: the machine may be busy with something else.
const waitMost = 4 * time.Minute

func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(waitMost); !cond(); time.Sleep(20 * time.Millisecond) { // a condition of another process: there is no event to wait for
		if time.Now().After(end) {
			t.Fatalf("%s did not happen", what)
		}
	}
}

// ledger is what a producer knows: every acknowledged record with its offset.
type ledger struct {
	mu    sync.Mutex
	acked map[int32]map[int64]uint64 // partition -> offset -> hash of the value: a long run's values would fill the memory
	bytes int64
}

var hashSeed = maphash.MakeSeed()

func newLedger() *ledger { return &ledger{acked: map[int32]map[int64]uint64{}} }

func (l *ledger) ack(r *kgo.Record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.acked[r.Partition] == nil {
		l.acked[r.Partition] = map[int64]uint64{}
	}
	l.acked[r.Partition][r.Offset] = maphash.Bytes(hashSeed, r.Value)
	l.bytes += int64(len(r.Value))
}

func (l *ledger) count() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range l.acked {
		n += len(m)
	}
	return n
}

// value makes a record that carries its partition, its number and its own hash.
func value(p int32, i int, size int) []byte {
	pad := strings.Repeat(strconv.Itoa(i*7919), size)[:size]
	body := fmt.Sprintf("%d:%d:%s", p, i, pad)
	sum := sha256.Sum256([]byte(body))
	return []byte(hex.EncodeToString(sum[:8]) + ":" + body)
}

func intact(v string) (p int32, i int, ok bool) {
	hash, body, found := strings.Cut(v, ":")
	sum := sha256.Sum256([]byte(body))
	if !found || hash != hex.EncodeToString(sum[:8]) {
		return 0, 0, false
	}
	n, err := fmt.Sscanf(body, "%d:%d:", &p, &i)
	return p, i, err == nil && n == 2
}

// produce sends to every partition in turn, idempotently, until ctx ends, and waits for what is in flight.
func (l *ledger) produce(t *testing.T, n *Node, topic string, partitions int32, ctx context.Context, stopAt int, opts ...kgo.Opt) {
	cl := client(t, n, append([]kgo.Opt{kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.RecordRetries(1 << 30), kgo.ProducerLinger(0), kgo.MaxBufferedRecords(2000), kgo.ProducerBatchCompression(kgo.NoCompression())}, opts...)...)
	for i := 0; ctx.Err() == nil && i < stopAt; i++ {
		for p := range partitions {
			cl.Produce(t.Context(), &kgo.Record{Topic: topic, Partition: p, Value: value(p, i, 100+i%7*300)}, func(r *kgo.Record, err error) {
				if err != nil {
					if !errors.Is(err, context.Canceled) && !errors.Is(err, kgo.ErrClientClosed) {
						t.Errorf("record %d of partition %d was given up: %v", i, p, err)
					}
					return
				}
				l.ack(r)
			})
		}
	}
	flush, cancel := context.WithTimeout(t.Context(), waitMost) // a node that is gone for good must not hold up a test that has failed
	defer cancel()
	if err := cl.Flush(flush); err != nil {
		t.Error(err)
	}
}

// verify reads everything and compares: every acknowledged record once, in order, at its offset, unchanged; nothing that was not sent.
func (l *ledger) verify(t *testing.T, n *Node, topic string) {
	t.Helper()
	var ends kadm.ListedOffsets
	until(t, "every partition to have a leader", func() (ok bool) {
		var err error
		ends, err = kadm.NewClient(client(t, n)).ListEndOffsets(t.Context(), topic)
		return err == nil && ends.Error() == nil
	})
	left := map[int32]int64{}
	assign := map[int32]kgo.Offset{}
	ends.Each(func(o kadm.ListedOffset) {
		if o.Offset > 0 {
			left[o.Partition], assign[o.Partition] = o.Offset, kgo.NewOffset().At(0)
		}
	})
	cl := client(t, n, kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{topic: assign}), kgo.FetchMaxWait(200*time.Millisecond))
	next, number := map[int32]int64{}, map[int32]int{}
	ctx, cancel := context.WithTimeout(t.Context(), waitMost)
	defer cancel()
	for len(left) > 0 {
		fs := cl.PollFetches(ctx)
		if err := fs.Err0(); err != nil {
			t.Fatalf("reading: %v (left %v, at %v)", err, left, next)
		}
		for _, e := range fs.Errors() {
			t.Fatalf("reading partition %d: %v", e.Partition, e.Err)
		}
		fs.EachRecord(func(r *kgo.Record) {
			p, i, ok := intact(string(r.Value))
			switch {
			case !ok || p != r.Partition:
				t.Fatalf("partition %d offset %d: altered record", r.Partition, r.Offset)
			case r.Offset != next[r.Partition]:
				t.Fatalf("partition %d: offset %d where %d is due", r.Partition, r.Offset, next[r.Partition])
			case i != number[r.Partition]:
				t.Fatalf("partition %d offset %d: record %d where %d is due", r.Partition, r.Offset, i, number[r.Partition])
			}
			if want, acked := l.acked[r.Partition][r.Offset]; acked && want != maphash.Bytes(hashSeed, r.Value) {
				t.Fatalf("partition %d offset %d: another record than was acknowledged", r.Partition, r.Offset)
			}
			next[r.Partition], number[r.Partition] = r.Offset+1, i+1
			if r.Offset+1 >= left[r.Partition] {
				delete(left, r.Partition)
			}
		})
	}
	for p, m := range l.acked {
		for o := range m {
			if o >= next[p] {
				t.Fatalf("partition %d: acknowledged offset %d is not there, the log ends at %d", p, o, next[p])
			}
		}
	}
}

func startMinIO(t *testing.T) *Store {
	t.Helper()
	if testing.Short() {
		t.Skip("MinIO is left out with -short")
	}
	s, err := StartMinIO(t.Context(), t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Kill() })
	credentials(t, s)
	bucket(s.URL("estran"))(t)
	return s
}

func kills() int {
	if n, err := strconv.Atoi(os.Getenv("ESTRAN_TEST_KILLS")); err == nil {
		return n
	}
	return 6
}

// The node is killed at random moments under load, over MinIO, with small segments and no local retention: what was acknowledged is there once, in order, at its
// offset, and read from objects. ESTRAN_TEST_KILLS=100 is the long run.
func TestKillUnderLoad(t *testing.T) {
	s := startMinIO(t)
	n := startNode(t, t.TempDir(), []string{"ESTRAN_STORAGE_URL=" + s.URL("estran"), "ESTRAN_TIERING_SEAL_BYTES=1MiB", "ESTRAN_TIERING_SEAL_AGE=300ms",
		"ESTRAN_TIERING_LOCAL_RETENTION_BYTES=0", "ESTRAN_HOT_MAX_BYTES=256MiB", "ESTRAN_TIERING_PREPARE_TTL=4s", "ESTRAN_QUORUM_SHARDS=2"})
	createTopic(t, n, "t", 4)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { l.produce(t, n, "t", 4, ctx, 1<<30) })
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for range kills() {
		before := l.count()
		until(t, "an acknowledgement after the restart", func() bool { return l.count() > before })
		time.Sleep(time.Duration(rng.IntN(1200)) * time.Millisecond) // the moment of the crash
		if err := n.Kill(); err != nil {
			t.Fatal(err)
		}
		restart(t, n)
	}
	cancel()
	wg.Wait()
	until(t, "sealing", func() bool { return metric(t, n, "estran_unuploaded_bytes") == 0 })
	if err := n.Kill(); err != nil { // forgets the recent index: what follows is read from objects
		t.Fatal(err)
	}
	restart(t, n)
	l.verify(t, n, "t")
	if metric(t, n, "estran_fetch_bytes_total", `tier="object"`) == 0 {
		t.Error("nothing was read from objects")
	}
	t.Logf("%d records, %d MB acknowledged through %d kills; %.0f MB read from objects", l.count(), l.bytes/1e6, kills(), metric(t, n, "estran_fetch_bytes_total", `tier="object"`)/1e6)
	noOrphans(t, s, n)
}

// noOrphans waits until the bucket holds exactly the committed segments: uploads that a crash cut off are swept after their time, without any LIST of the broker's.
func noOrphans(t *testing.T, s *Store, n *Node) {
	t.Helper()
	b := bucket(s.URL("estran"))(t)
	var objects, committed int
	until(t, "the sweep of uploads that were not committed", func() bool {
		objects = 0
		for i, err := range b.List(t.Context(), "", "") {
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(i.Key, "/v1/data/") {
				objects++
			}
		}
		committed = int(metric(t, n, "estran_segments", `state="committed"`))
		return objects == committed && metric(t, n, "estran_segments", `state="prepared"`) == 0
	})
	t.Logf("%d objects, %d committed segments", objects, committed)
	if metric(t, n, "estran_object_requests_total", `op="list"`) > 1 {
		t.Error("the broker listed the bucket beyond its probe at start")
	}
}

// The store goes away under load: records are accepted up to the budget, then refused with a retriable error; when it comes back everything drains by itself.
func TestStoreOutage(t *testing.T) {
	s := startMinIO(t)
	n := startNode(t, t.TempDir(), []string{"ESTRAN_STORAGE_URL=" + s.URL("estran"), "ESTRAN_TIERING_SEAL_BYTES=1MiB", "ESTRAN_TIERING_SEAL_AGE=300ms",
		"ESTRAN_TIERING_LOCAL_RETENTION_BYTES=0", "ESTRAN_HOT_MAX_BYTES=64MiB", "ESTRAN_QUORUM_SHARDS=1"})
	createTopic(t, n, "t", 2)
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { l.produce(t, n, "t", 2, ctx, 1<<30) })
	until(t, "the budget to be used up", func() bool { return metric(t, n, "estran_hot_budget_refused_total") > 0 })
	until(t, "it to say that it is not ready", func() bool { code, _ := readiness(n); return code == http.StatusServiceUnavailable })
	stuck := l.count()
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, "new acknowledgements", func() bool { return l.count() > stuck+1000 })
	cancel()
	wg.Wait()
	until(t, "draining", func() bool { return metric(t, n, "estran_unuploaded_bytes") == 0 })
	l.verify(t, n, "t")
}

// A group's members and offsets survive a restart; SIGTERM drains and exits 0.
func TestGroupAcrossRestart(t *testing.T) {
	dir := t.TempDir()
	n := startNode(t, dir, []string{"ESTRAN_QUORUM_SHARDS=1", "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS=0"})
	createTopic(t, n, "t", 3)
	l := newLedger()
	l.produce(t, n, "t", 3, t.Context(), 100)
	consume := func(want int) {
		cl := client(t, n, kgo.ConsumerGroup("g"), kgo.ConsumeTopics("t"), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.DisableAutoCommit())
		got := 0
		ctx, cancel := context.WithTimeout(t.Context(), waitMost)
		defer cancel()
		for got < want {
			fs := cl.PollRecords(ctx, want-got)
			if err := fs.Err0(); err != nil {
				t.Fatalf("%d of %d records: %v", got, want, err)
			}
			got += fs.NumRecords()
		}
		if err := cl.CommitUncommittedOffsets(ctx); err != nil {
			t.Fatal(err)
		}
		cl.Close()
	}
	consume(200)
	if err := n.Stop(); err != nil {
		t.Fatalf("SIGTERM: %v\n%s", err, n.Tail())
	}
	restart(t, n)
	consume(100) // the rest, not the first ones again
	lag, err := kadm.NewClient(client(t, n)).Lag(t.Context(), "g")
	if err != nil {
		t.Fatal(err)
	}
	if total := lag["g"].Lag.Total(); total != 0 {
		t.Errorf("lag %d after everything was consumed", total)
	}
}

// A record that was sent and is not answered may be stored, so the client never gives it up by itself: the command does, and says what that means.
func TestProduceGivesUp(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	createTopic(t, n, "silent", 1)
	in, lines, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	defer lines.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, n.cmd.Path, "topic", "produce", "silent", "-b", n.Kafka, "--timeout", "1s")
	var said strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(lines, "one")
	until(t, "the first record", func() bool { return ends(t, n, "silent") == 1 }) // whose answer may be on its way
	if err := n.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(lines, "two")
	lines.Close()
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 3 || !strings.Contains(said.String(), "E_TIMEOUT") || !strings.Contains(said.String(), "records were sent and not acknowledged") {
		t.Errorf("exit %d: %s", code, &said)
	}
}
