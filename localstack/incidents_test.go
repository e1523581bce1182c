package localstack

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/estran/estran/localstack/logs"
	"github.com/estran/estran/tiering/record"
)

// Incidents 17, 20: with nothing sealed, all are killed in the middle of a load on many partitions. Each acknowledged record lies in the logs of a majority, byte by byte, and after
// a start each is read.
func TestAcknowledgedIsOnAMajority(t *testing.T) {
	const partitions = 64
	nodes := startQuorum(t, 3, "ESTRAN_TIERING_SEAL_BYTES=256MiB", "ESTRAN_TIERING_SEAL_AGE=1h")
	createReplicated(t, nodes[0], "t", partitions, 3)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { l.produce(t, nodes[0], "t", partitions, ctx, 1<<30) })
	until(t, "acknowledgements in every partition", func() bool { return len(l.counts()) == partitions && l.count() > 5000 })
	var at sync.WaitGroup
	for _, n := range nodes {
		at.Go(func() {
			if err := n.Kill(); err != nil {
				t.Error(err)
			}
		})
	}
	at.Wait()
	l.mu.Lock()
	want := map[uint64]bool{}
	for _, m := range l.acked {
		for _, h := range m {
			want[h] = true
		}
	}
	l.mu.Unlock()
	holders := map[uint64]int{}
	for _, n := range nodes {
		mine := map[uint64]bool{}
		for _, dir := range groupLabels(t, n) {
			if _, _, err := logs.Read(filepath.Join(n.dir, dir), 0, func(p []byte) {
				for len(p) > 0 {
					b, rest, err := record.Next(p)
					if err != nil || b.CheckCRC() != nil {
						t.Fatalf("%s: a payload holds no batch: %v", dir, err)
					}
					if err := record.Each(b, 0, func(_ record.Offset, r *record.Record) bool {
						mine[maphash.Bytes(hashSeed, r.Value)] = true
						return true
					}); err != nil {
						t.Fatal(err)
					}
					p = rest
				}
			}); err != nil {
				t.Fatalf("%s of %s: %v", dir, n.dir, err)
			}
		}
		for h := range mine {
			holders[h]++
		}
	}
	lost := 0
	for h := range want {
		if holders[h] < 2 {
			lost++
		}
	}
	if lost > 0 {
		t.Errorf("%d of %d acknowledged records are in fewer than two of three logs", lost, len(want))
	}
	startAll(t, nodes)
	before := l.count()
	until(t, "acknowledgements after the start", func() bool { return l.count() > before+100 })
	cancel()
	wg.Wait()
	l.verify(t, nodes[1], "t")
	sameLogs(t, nodes)
}

// Incidents 21, C1, C2: a topic is made and written to at once; at the first acknowledgement the leader that gave it is killed and its disk is wiped. The record is read from the
// next leader. Each node is the victim once, the first replica among them.
func TestLeaderIsWipedAtTheFirstAck(t *testing.T) {
	nodes := startQuorum(t, 3)
	victims := map[int]bool{}
	for i := 0; len(victims) < 3 && i < 12; i++ {
		name := fmt.Sprint("topic-", i)
		createReplicated(t, nodes[i%3], name, 1, 3)
		var probes []*probe
		for _, n := range nodes {
			probes = append(probes, probeOf(t, n, name))
		}
		lead, offset := 0, int64(0)
		until(t, "an acknowledgement", func() bool {
			lead = probes[i%3].leader(0)
			if lead == 0 {
				return false
			}
			var code int16
			offset, code = probes[lead-1].produce(-1, "first", 10*time.Second)
			return code == 0
		})
		victim := nodes[lead-1]
		if err := errors.Join(victim.Kill(), os.RemoveAll(victim.dir)); err != nil {
			t.Fatal(err)
		}
		victims[lead] = true
		until(t, "the record to be read from the next leader", func() bool {
			for k, p := range probes {
				if k == lead-1 || p.leader(0) != k+1 {
					continue
				}
				values, _, code := p.fetch(0, 0)
				if code == 0 && (int64(len(values)) <= offset || values[offset] != "first") {
					t.Fatalf("node %d leads and has %q: offset %d was acknowledged", k+1, values, offset)
				}
				return code == 0
			}
			return false
		})
		restart(t, victim)
		votesEverywhere(t, nodes) // before that another one must not be lost
	}
	t.Logf("victims: %v", victims)
	sameLogs(t, nodes)
}

// votesEverywhere waits until each of three voters votes in every group, as what it is now and by the word of each.
func votesEverywhere(t *testing.T, nodes []*Node) {
	t.Helper()
	for _, n := range nodes {
		until(t, "every node to vote in every group", func() bool {
			voters := 0
			for _, m := range statusOf(t, n).Members {
				if m.State == "voter" {
					voters++
				}
			}
			return voters == 3
		})
	}
}

// Incident 24: offsets that were committed through one node are read through every other, also when the first is gone.
func TestOffsetsAreEverywhere(t *testing.T) {
	nodes := startQuorum(t, 3)
	createReplicated(t, nodes[0], "t", 3, 3)
	for p := range int32(3) {
		cl := client(t, nodes[0], kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.RecordRetries(1<<30))
		for range 10 {
			if err := cl.ProduceSync(t.Context(), &kgo.Record{Topic: "t", Partition: p, Value: []byte("v")}).FirstErr(); err != nil {
				t.Fatal(err)
			}
		}
	}
	var offsets kadm.Offsets
	for p := range int32(3) {
		offsets.AddOffset("t", p, int64(3+p), -1)
	}
	until(t, "the commit", func() bool {
		return kadm.NewClient(client(t, nodes[0])).CommitAllOffsets(t.Context(), "g", offsets) == nil
	})
	check := func(n *Node) {
		t.Helper()
		var got string
		until(t, "the offsets to be answered", func() bool {
			r, err := kadm.NewClient(client(t, n)).FetchOffsets(t.Context(), "g")
			got = ""
			for p := range int32(3) {
				o, _ := r.Lookup("t", p)
				got += fmt.Sprint(o.At, " ")
			}
			return err == nil && r.Error() == nil
		})
		if got = strings.TrimSpace(got); got != "3 4 5" {
			t.Errorf("offsets %s", got)
		}
	}
	for i, gone := range nodes {
		for _, n := range nodes {
			check(n)
		}
		if err := gone.Kill(); err != nil {
			t.Fatal(err)
		}
		check(nodes[(i+1)%3])
		check(nodes[(i+2)%3])
		restart(t, gone)
	}
	sameLogs(t, nodes)
}

// busy lets clients produce single records, each waiting for its acknowledgement before it sends the next, and returns how many batches were stored in the meantime.
func busy(t *testing.T, n *Node, clients, records int) (stored float64) {
	t.Helper()
	const name = "estran_raft_log_appends_total"
	before := metric(t, n, name, `group="1"`)
	each(t, clients, func(i int) error {
		c, err := dialWire(n)
		if err != nil {
			return err
		}
		defer c.reset()
		for range records / clients {
			if err := c.produced("t", 0, []byte("v")); err != nil {
				return err
			}
		}
		return nil
	})
	return metric(t, n, name, `group="1"`) - before
}

// Incidents 38, 41: 10,000 produce requests, and as many fetches and mistakes of clients, leave no entry in meta and next to no line in the log.
func TestRequestsLeaveNoTrace(t *testing.T) {
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	var lines atomic.Int64
	n := NewNode(p, t.TempDir(), []string{"ESTRAN_QUORUM_SHARDS=1"})
	n.Log = func(string) { lines.Add(1) }
	startAll(t, []*Node{n})
	createTopic(t, n, "t", 1)
	busy(t, n, 10, 1000)
	began := lines.Load()
	const name, requests = "estran_raft_last_log_index", 10_000
	before := metric(t, n, name, `group="meta"`)
	busy(t, n, 50, requests)
	each(t, 50, func(int) error {
		for range requests / 50 / 10 {
			c, err := dialWire(n)
			if err != nil {
				return err
			}
			for range 10 {
				if err := c.send(fetch("t", 1, 0, 0), fetchVersion); err != nil {
					return err
				}
				if _, err := c.receive(nil); err != nil {
					return err
				}
			}
			for _, b := range [][]byte{{0, 0, 0, 8, 0, 99, 0, 0, 0, 0, 0, 0}, {255, 255, 255, 255}, {0, 0, 0, 8, 0, 1, 0, 99, 0, 0, 0, 0}} { // an unknown key, no length, an unknown version
				bad, err := dialWire(n)
				if err != nil {
					return err
				}
				if _, err := bad.Write(b); err != nil {
					return err
				}
				if _, err := bad.Read(make([]byte, 1)); err == nil {
					return fmt.Errorf("%v is answered", b)
				}
				bad.reset()
			}
			c.reset()
		}
		return nil
	})
	if got := metric(t, n, name, `group="meta"`); got != before {
		t.Errorf("%.0f entries in meta", got-before)
	}
	if got := ends(t, n, "t"); got != requests+1000 {
		t.Errorf("%d records", got)
	}
	if got := lines.Load() - began; got > 20 || began == 0 {
		t.Errorf("%d lines in the log", got)
	}
}

// Incident 40: an fsync is shared by whoever waits for one. One client has one for each of its records; of 64 clients each has many.
func TestFsyncsAreShared(t *testing.T) {
	n := startNode(t, t.TempDir(), []string{"ESTRAN_QUORUM_SHARDS=1"})
	createTopic(t, n, "t", 1)
	const alone, together, clients = 200, 6400, 64
	one, many := alone/busy(t, n, 1, alone), 0.0
	for i := 0; i < 5 && many < 4*one; i++ { // on a busy machine the clients themselves may come one after the other
		many = together / busy(t, n, clients, together)
	}
	t.Logf("acknowledgements for each write to the log: %.1f with one connection, %.1f with %d", one, many, clients)
	if one > 1.5 || many < 4*one {
		t.Errorf("acknowledgements for each write to the log: %.1f with one connection, %.1f with %d", one, many, clients)
	}
}
