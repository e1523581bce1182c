package localstack

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// gaps measures, per partition, the longest time between two acknowledgements while something happens. One record after the other is sent to each partition, so a gap is
// what a client sees, its own metadata and retries included.
type gaps struct {
	mu      sync.Mutex
	last    map[int32]time.Time
	longest map[int32]time.Duration
	acks    map[int32]int
}

// run sends until ctx ends.
func (g *gaps) run(t *testing.T, n *Node, topic string, partitions int32, ctx context.Context) {
	g.last, g.longest, g.acks = map[int32]time.Time{}, map[int32]time.Duration{}, map[int32]int{}
	cl := client(t, n, []kgo.Opt{kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.RecordRetries(1 << 30), kgo.ProducerLinger(0), kgo.MetadataMinAge(10 * time.Millisecond),
		kgo.RetryBackoffFn(func(int) time.Duration { return 5 * time.Millisecond }),
		kgo.ProduceRequestTimeout(100 * time.Millisecond), kgo.RequestTimeoutOverhead(100 * time.Millisecond)}...)
	var wg sync.WaitGroup
	defer wg.Wait()
	for p := range partitions {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := cl.ProduceSync(ctx, &kgo.Record{Topic: topic, Partition: p, Value: []byte("v")}).FirstErr(); err != nil {
					continue
				}
				g.mu.Lock()
				now := time.Now()
				if was, ok := g.last[p]; ok {
					g.longest[p] = max(g.longest[p], now.Sub(was))
				}
				g.last[p] = now
				g.acks[p]++
				g.mu.Unlock()
			}
		})
	}
}

func (g *gaps) reset() {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.longest)
	clear(g.acks)
}

// all reports whether every partition has had so many acknowledgements since reset.
func (g *gaps) all(partitions int32, n int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for p := range partitions {
		if g.acks[p] < n {
			return false
		}
	}
	return true
}

type samples []time.Duration

func (s samples) String() string {
	if len(s) == 0 {
		return "no samples"
	}
	slices.Sort(s)
	at := func(q float64) time.Duration { return s[int(q*float64(len(s)-1))].Round(100 * time.Microsecond) }
	return fmt.Sprintf("%d samples: p50 %s, p90 %s, p99 %s, max %s", len(s), at(.5), at(.9), at(.99), at(1))
}

// How long things take when a node goes: figures, not a test. ESTRAN_TEST_FAILOVERS=50 says how often each is done.
func TestFailoverTimes(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv("ESTRAN_TEST_FAILOVERS"))
	if err != nil || n < 1 {
		t.Skip("ESTRAN_TEST_FAILOVERS is not set")
	}
	const partitions = 6
	t.Run("while it is used", func(t *testing.T) {
		nodes := startQuorum(t, 3)
		createReplicated(t, nodes[0], "t", partitions, 3)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		g := &gaps{}
		var probes []*probe
		for _, x := range nodes {
			probes = append(probes, probeOf(t, x, "t"))
		}
		wg.Go(func() { g.run(t, nodes[0], "t", partitions, ctx) })
		until(t, "acknowledgements", func() bool { return g.all(partitions, 20) })
		leads := func(i int) (out []int32) {
			for p := range int32(partitions) {
				if probes[i].leader(p) == i+1 {
					out = append(out, p)
				}
			}
			return out
		}
		// each ends a node in some way, round after round, and sorts the gaps by whether the node led the partition.
		each := func(name string, hit func(x *Node) (back func())) {
			var led, others samples
			for i := 0; len(led) < n && i < 10*n; i++ {
				k := i % 3
				until(t, "a leader of something", func() bool { g.reset(); return len(leads(k)) > 0 })
				until(t, "all to be calm", func() bool { return g.all(partitions, 20) })
				mine := leads(k)
				g.reset()
				back := hit(nodes[k])
				until(t, "acknowledgements in every partition", func() bool { return g.all(partitions, 20) })
				g.mu.Lock()
				for p := range int32(partitions) {
					if slices.Contains(mine, p) {
						led = append(led, g.longest[p])
					} else {
						others = append(others, g.longest[p])
					}
				}
				g.mu.Unlock()
				back()
			}
			fmt.Printf("%s: partitions that it led: %s\n%s: led elsewhere: %s\n", name, led, name, others)
		}
		each("kill -9", func(x *Node) func() {
			if err := x.Kill(); err != nil {
				t.Fatal(err)
			}
			return func() { restart(t, x) }
		})
		each("SIGSTOP", func(x *Node) func() {
			if err := syscall.Kill(x.PID, syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			return func() { _ = syscall.Kill(x.PID, syscall.SIGCONT) }
		})
		each("SIGTERM and restart", func(x *Node) func() {
			if err := x.Stop(); err != nil {
				t.Fatal(err)
			}
			restart(t, x)
			return func() {}
		})
	})
	t.Run("cold start", func(t *testing.T) {
		nodes := startQuorum(t, 3)
		createReplicated(t, nodes[0], "t", 1, 3)
		var all samples
		for range n {
			for _, x := range nodes {
				if err := x.Kill(); err != nil {
					t.Fatal(err)
				}
			}
			began := time.Now()
			acked := make(chan time.Duration, 1)
			cl := client(t, nodes[0], append([]kgo.Opt{kgo.DefaultProduceTopic("t"), kgo.RecordRetries(1 << 30)}, impatient...)...)
			go func() {
				_ = cl.ProduceSync(t.Context(), &kgo.Record{Value: []byte("v")}) // the first that is acknowledged
				acked <- time.Since(began)
			}()
			startAll(t, nodes)
			all = append(all, <-acked)
			cl.Close()
		}
		fmt.Printf("cold start of three to the first acknowledgement: %s\n", all)
	})
	t.Run("1,000 topics", func(t *testing.T) {
		nodes := startQuorum(t, 3)
		adm := kadm.NewClient(client(t, nodes[0]))
		var all samples
		for i := range 1000 {
			began := time.Now()
			if r, err := adm.CreateTopic(t.Context(), 1, 3, nil, fmt.Sprint("topic-", i)); err != nil || r.Err != nil {
				fmt.Printf("topic %d after %s: %v %v\n", i, time.Since(began), err, r.Err)
				continue
			}
			all = append(all, time.Since(began))
		}
		fmt.Printf("a topic: %s\n", all)
	})
}
