package raftmeta

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// counter appends numbers to one partition and knows what must be there.
type counter struct {
	c    *trio
	tp   record.TopicPartition
	want []string
}

func (w *counter) write(n int) {
	w.c.t.Helper()
	for range n {
		v := fmt.Sprint(len(w.want))
		if base := w.c.append(w.tp, batchOf(w.c.t, 7, record.Sequence(len(w.want)), v)); int(base) != len(w.want) {
			w.c.t.Fatalf("record %s at offset %d", v, base)
		}
		w.want = append(w.want, v)
	}
}

func newCounter(c *trio, name string) (*counter, record.ShardID) {
	c.t.Helper()
	topic := newTopic(c.t, c.hosts[0], name, 1)
	return &counter{c: c, tp: record.TopicPartition{Topic: topic.ID}}, topic.Partitions[0].Shard
}

// leads waits until a shard has a leader that all nodes which run name, and returns its place among the hosts.
func (c *trio) leads(s record.ShardID) (at int) {
	c.t.Helper()
	until(c.t, "one leader that all nodes name", func() bool {
		at = -1
		for i, h := range c.hosts {
			if h != nil && h.shardByID(s).leads.Load() > 0 {
				at = i
			}
		}
		if at < 0 {
			return false
		}
		for _, h := range c.alive() {
			if n, ok := h.Leader(s); !ok || int(n) != at+1 {
				return false
			}
		}
		return true
	})
	return at
}

// Incident 3: a node whose state machine takes long votes and acknowledges all the same: with the third node gone nothing else makes a majority.
func TestVotesWhileApplyIsStuck(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	w, shard := newCounter(c, "t")
	w.write(5)
	lead := c.leads(shard)
	slow, third := (lead+1)%3, (lead+2)%3
	g := c.hosts[slow].shardByID(shard)
	g.mu.Lock()
	stuck := sync.OnceFunc(g.mu.Unlock)
	t.Cleanup(stuck)
	old, self := c.hosts[lead], c.hosts[slow]
	for _, h := range old.groups() {
		_ = h.trans.Close() // it is gone, and hands nothing over
	}
	c.hosts[lead], c.hosts[slow] = nil, nil // neither is asked
	t.Cleanup(func() { _ = old.Close(t.Context()) })
	until(t, "the third node to lead with the stuck one's vote", func() bool {
		if g.raft.State() == raft.Leader { // it stood itself: it must not lead while it cannot apply, so it is made to give up
			_ = g.raft.LeadershipTransfer().Error()
		}
		return c.hosts[third].shardByID(shard).raft.State() == raft.Leader
	})
	if g.applied.Load() > g.raft.CommitIndex() {
		t.Error("it has applied more than is committed")
	}
	stuck()
	c.hosts[slow] = self
	w.write(10)
	c.agree(w.tp, w.want)
}

// Incident 5: membership changes again and again while records are appended and metrics are read: nothing waits for itself.
func TestManyConfigurations(t *testing.T) {
	c := newTrio(t, 3)
	metrics := make([]*prometheus.Registry, 3)
	c.change = func(i int, cfg *Config) {
		metrics[i] = prometheus.NewRegistry()
		cfg.Registerer = metrics[i]
	}
	c.start(0, 1, 2)
	w, shard := newCounter(c, "t")
	w.write(5)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for _, r := range metrics {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					if _, err := r.Gather(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for i := range 60 {
		server := raft.ServerID(fmt.Sprintf("%d.stranger", 10+i%3))
		until(t, "the configuration to change", func() bool {
			r := c.hosts[c.leads(shard)].shardByID(shard).raft
			if i%2 == 0 {
				return r.AddNonvoter(server, raft.ServerAddress(server), 0, time.Second).Error() == nil
			}
			return r.RemoveServer(server, 0, time.Second).Error() == nil
		})
		w.write(1)
	}
	close(stop)
	wg.Wait()
	c.agree(w.tp, w.want)
}

// Incident 9: what is proposed at a follower is refused at once, and leaves nothing in its log.
func TestFollowersRefuse(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	w, shard := newCounter(c, "t")
	w.write(3)
	c.agree(w.tp, w.want) // a follower that has not heard of the partition says that instead
	lead := c.leads(shard)
	for i, h := range c.hosts {
		if i == lead {
			continue
		}
		term := h.shardByID(shard).raft.CurrentTerm()
		if r := appendSync(t, h, AppendBatch{w.tp, batchOf(t, -1, -1, "astray")})[0]; !errors.Is(r.Err, ErrNotLeader) {
			if h.shardByID(shard).raft.CurrentTerm() > term {
				t.Skip("the machine is so busy that a follower was elected meanwhile")
			}
			t.Errorf("node %d: %v", i+1, r.Err)
		}
		if err := h.shardByID(shard).raft.Apply([]byte("astray"), 0).Error(); !errors.Is(err, raft.ErrNotLeader) {
			t.Errorf("raft of node %d: %v", i+1, err)
		}
	}
	c.agree(w.tp, w.want)
}

// Incident 11: a condition for snapshots that stays true takes one, not one in every round. What is hot cannot be freed, so the budget that asks for it stays used.
func TestSnapshotsAreFew(t *testing.T) {
	r := prometheus.NewRegistry()
	h := openHost(t, t.TempDir(), func(c *Config) { c.HotMaxBytes, c.Shards, c.Registerer, c.TailBytes = 8<<20, 1, r, 1<<20 })
	tp := record.TopicPartition{Topic: newTopic(t, h, "t", 1).ID}
	value := strings.Repeat("v", 100_000)
	for range 50 { // more than half of the budget
		if res := appendSync(t, h, AppendBatch{tp, batchOf(t, -1, -1, value)})[0]; res.Err != nil {
			t.Fatal(res.Err)
		}
	}
	taken := func() (n float64) {
		all, err := r.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range all {
			if f.GetName() == "estran_raft_snapshots_total" {
				for _, m := range f.Metric {
					n += m.Counter.GetValue()
				}
			}
		}
		return n
	}
	until(t, "a snapshot", func() bool { return taken() > 0 })
	before := taken()
	tick := time.NewTicker(snapshotCheck)
	defer tick.Stop()
	for range 6 { // rounds in which none is due
		<-tick.C
	}
	if now := taken(); now > before+1 {
		t.Errorf("%.0f snapshots in six rounds without a new entry", now-before)
	}
}

// Incident 12: nodes start in every order, each when the one before it is already asking for the others; they come to one cluster that works.
func TestEveryOrderOfStart(t *testing.T) {
	for _, order := range [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		t.Run(fmt.Sprint(order), func(t *testing.T) {
			c := newTrio(t, 3)
			done := make(chan error, 3)
			for _, i := range order {
				go func() { done <- c.open(i) }()
				t.Cleanup(func() { c.stop(i) })
				until(t, "the node to listen", func() bool {
					conn, err := net.Dial("tcp", c.voters[i].Addr)
					if err == nil {
						_ = conn.Close()
					}
					return err == nil
				})
			}
			for range order {
				if err := <-done; err != nil {
					t.Fatal(err)
				}
			}
			w, _ := newCounter(c, "t")
			w.write(3)
			c.agree(w.tp, w.want)
		})
	}
}

// Incidents 13, 18, 35: leadership goes round. After each move every node names the leader that there is, no node's high watermark has ever gone back, and a producer that
// repeats what it sent to the old leader gets the offset that it had.
func TestLeadershipGoesRound(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	w, shard := newCounter(c, "t")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for _, h := range c.hosts {
		wg.Go(func() {
			var high record.Offset
			look := time.NewTicker(time.Millisecond)
			defer look.Stop()
			for {
				select {
				case <-stop:
					return
				case <-look.C:
				}
				if i, err := h.Partition(w.tp); err == nil || errors.Is(err, ErrNotLeader) {
					if i.HighWatermark < high {
						t.Errorf("node %d: the high watermark went from %d back to %d", h.NodeID(), high, i.HighWatermark)
					}
					high = i.HighWatermark
				}
			}
		})
	}
	led := map[int]bool{}
	for i := 0; i < 40 && (i < 12 || len(led) < 3); i++ {
		w.write(3)
		at := c.leads(shard)
		led[at] = true
		to := c.hosts[(at+1+i/3%2)%3].identity.serverID()
		_ = c.hosts[at].shardByID(shard).raft.LeadershipTransferToServer(raft.ServerID(to), raft.ServerAddress(to)).Error() // it may have lost it by itself
		c.leads(shard)
		n := len(w.want) - 1
		if base := c.append(w.tp, batchOf(t, 7, record.Sequence(n), w.want[n])); int(base) != n {
			t.Fatalf("record %d repeated at the next leader: offset %d", n, base)
		}
	}
	close(stop)
	wg.Wait()
	if len(led) < 3 {
		t.Errorf("only %v have led", led)
	}
	c.agree(w.tp, w.want)
}

// Incidents 14, C7: a node that was away for a while has everything without anybody's writing anything.
func TestLateNodeNeedsNoWrites(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	w, shard := newCounter(c, "t")
	w.write(3)
	away := (c.leads(shard) + 1) % 3
	c.stop(away)
	w.write(200)
	c.start(away)
	c.agree(w.tp, w.want)
}

// Incident 19: a request is answered once, with the offset of its first record, whatever the number of records in its batches.
func TestEveryRequestIsAnsweredOnce(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	w, shard := newCounter(c, "t")
	h := c.hosts[c.leads(shard)]
	until(t, "the partition", func() bool { _, err := h.Partition(w.tp); return err == nil })
	var mu sync.Mutex
	answers, bases, astray := map[int]int{}, map[int]record.Offset{}, map[int]bool{}
	var wg sync.WaitGroup
	sizes := []int{1, 2, 1000, 1, 500, 2, 2, 1000, 1}
	for i, n := range sizes {
		values := make([]string, n)
		for k := range values {
			values[k] = fmt.Sprint(i)
		}
		wg.Add(1)
		h.Append(t.Context(), AppendRequest{Batches: []AppendBatch{{w.tp, batchOf(t, -1, -1, values...)}}}, func(r []AppendResult) {
			mu.Lock()
			defer mu.Unlock()
			if answers[i]++; answers[i] == 1 {
				wg.Done()
			}
			if astray[i] = moved(r[0].Err); r[0].Err != nil && !astray[i] {
				t.Errorf("request %d: %v", i, r[0].Err)
			}
			bases[i] = r[0].Base
		})
	}
	wg.Wait()
	all := readAll(t, h, w.tp, 0)
	mu.Lock()
	defer mu.Unlock()
	for i, n := range sizes {
		if answers[i] != 1 {
			t.Errorf("request %d was answered %d times", i, answers[i])
		}
		if astray[i] { // the leadership was lost meanwhile: that is an answer too
			continue
		}
		for k := range n {
			if at := int(bases[i]) + k; at >= len(all) || all[at] != fmt.Sprint(i) {
				t.Fatalf("record %d of request %d is not at offset %d", k, i, at)
			}
		}
	}
}

// Peers may ask a node for something as soon as it listens, before its groups are open: it says that it leads nothing. The race detector sees the rest.
func TestForwardToANodeThatStarts(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	to, from := c.hosts[2].identity.serverID(), c.hosts[0]
	body, err := json.Marshal(forwarded{Kind: state.KindAllocProducers, Body: json.RawMessage(`{"Count":1}`)})
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		c.stop(2)
		stop := make(chan struct{})
		var answered atomic.Int64
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				if _, err := from.peers.Forward(ctx, to, 0, body); err == nil {
					answered.Add(1)
				}
				cancel()
				select {
				case <-stop:
					return
				default:
				}
			}
		})
		c.start(2)
		until(t, "an answer", func() bool { return answered.Load() > 0 })
		close(stop)
		wg.Wait()
	}
}

// Incident C10, item 30: a voter that is started with an old copy of its directory is refused, and says what it lacks; when its directory is emptied it comes as a new one.
func TestOldCopyIsRefused(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	n, shard := newCounter(c, "t")
	n.write(10)
	until(t, "the others to lead", func() bool {
		if at := c.leads(shard); at != 2 {
			return true
		}
		_ = c.hosts[2].shardByID(shard).raft.LeadershipTransfer().Error()
		return false
	})
	last := func(h *Host) uint64 {
		i, _ := h.shardByID(shard).log.LastIndex()
		return i
	}
	until(t, "the third to have it all", func() bool { return last(c.hosts[2]) == last(c.hosts[0]) })
	c.stop(2)
	old := t.TempDir()
	if err := os.CopyFS(old, os.DirFS(c.dirs[2])); err != nil {
		t.Fatal(err)
	}
	c.start(2)
	n.write(10)
	commit := c.hosts[c.leads(shard)].shardByID(shard).raft.CommitIndex()
	until(t, "the third to have it all", func() bool { return last(c.hosts[2]) >= commit })
	n.write(1) // with it the commit index is told, and confirmed
	until(t, "that to be remembered", func() bool {
		for _, h := range c.hosts[:2] {
			p, err := c.hosts[2].peers.Ask(t.Context(), h.peerAddress())
			if err == nil && p.Known[uint32(shard)].LastIndex >= commit {
				return true
			}
		}
		return false
	})
	c.stop(2)
	dir := c.dirs[2]
	c.dirs[2] = old
	if err := c.open(2); !errors.Is(err, ErrBehind) || !strings.Contains(err.Error(), "remembers") {
		t.Fatalf("an old copy: %v", err)
	}
	c.dirs[2] = dir
	c.start(2)
	n.write(1)
	c.stop(2)
	c.dirs[2] = t.TempDir()
	c.start(2)
	n.write(1)
}

// Incident 25: topics are made sixteen at a time, at every node, while one restarts: each node ends with the same catalog.
func TestCatalogsAreEqual(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	const topics, at = 320, 16
	var wg sync.WaitGroup
	for k := range at {
		wg.Go(func() {
			for i := range topics / at {
				h := c.hosts[(k+i)%2] // the third restarts meanwhile
				name := fmt.Sprintf("topic-%d-%d", k, i)
				for end := time.Now().Add(waitMost); ; {
					err := h.CreateTopics(t.Context(), []TopicSpec{{Name: name, Partitions: 2, ReplicationFactor: 3, Parsed: state.PartitionConfig{RetentionMs: -1, RetentionBytes: -1}}})[0].Err
					if err == nil || errors.Is(err, ErrTopicExists) {
						break
					}
					if time.Now().After(end) {
						t.Errorf("%s: %v", name, err)
						return
					}
				}
			}
		})
	}
	c.stop(2)
	c.start(2)
	wg.Wait()
	list := func(h *Host) (out []string) {
		for topic := range h.Cluster().Topics() {
			out = append(out, fmt.Sprint(topic.Name, topic.ID, topic.Partitions))
		}
		slices.Sort(out)
		return out
	}
	var want []string
	until(t, "node 1 to know all topics", func() bool { want = list(c.hosts[0]); return len(want) == topics })
	for _, h := range c.hosts {
		until(t, fmt.Sprintf("node %d to have the same catalog", h.NodeID()), func() bool { return slices.Equal(list(h), want) })
	}
}

// Incident 26: a topic is deleted under load and made again: nothing of the old one comes back, not after a restart of all, and its bytes are not counted any more.
func TestDeletedTopicsStayAway(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	old, _ := newCounter(c, "t")
	old.write(20)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				appendSync(t, c.hosts[i%3], AppendBatch{old.tp, batchOf(t, -1, -1, "old")})
			}
		}
	})
	until(t, "the topic to be deleted", func() bool { return c.hosts[1].DeleteTopics(t.Context(), []record.TopicID{old.tp.Topic})[0] == nil })
	until(t, "its bytes to be given up", func() bool {
		for _, h := range c.hosts {
			if h.HotBytes(1)+h.HotBytes(2) > 0 {
				return false
			}
		}
		return true
	})
	close(stop)
	wg.Wait()
	again, _ := newCounter(c, "t")
	if again.tp.Topic == old.tp.Topic {
		t.Fatal("the same ID")
	}
	again.write(5)
	for i := range 3 {
		c.stop(i)
	}
	c.start(0, 1, 2)
	again.write(5)
	c.agree(again.tp, again.want)
	for _, h := range c.hosts {
		until(t, fmt.Sprintf("node %d not to know the deleted topic", h.NodeID()), func() bool { // it may not have applied all of its log yet
			_, err := h.Partition(old.tp)
			return errors.Is(err, ErrUnknownPartition)
		})
	}
}

// Incident 29: node IDs are names, not places.
func TestOddNodeIDs(t *testing.T) {
	c := newTrio(t, 3)
	for i, id := range []int32{2_000_000, 7, 101} {
		c.voters[i].ID = id
	}
	c.change = func(i int, cfg *Config) { cfg.NodeID = c.voters[i].ID }
	c.start(0, 1, 2)
	w, shard := newCounter(c, "t")
	w.write(5)
	var lead int32
	until(t, "a leader", func() (ok bool) { lead, ok = c.hosts[0].Leader(shard); return ok })
	i := slices.IndexFunc(c.voters, func(v Voter) bool { return v.ID == lead })
	if i < 0 {
		t.Fatalf("node %d leads", lead)
	}
	c.stop(i)
	w.write(5)
	c.start(i)
	c.agree(w.tp, w.want)
}

// A node that has lost its directory is let in when it asks first: who leads does not wait for what that node was, which nobody can reach any more.
func TestReplacementIsLetInAtOnce(t *testing.T) {
	c := newTrio(t, 3)
	r := prometheus.NewRegistry()
	c.start(0, 1, 2)
	w, _ := newCounter(c, "t")
	w.write(5)
	c.stop(2)
	c.dirs[2] = t.TempDir()
	w.write(5)
	c.change = func(i int, cfg *Config) { cfg.Registerer = r }
	c.start(2)
	all, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() != "estran_raft_rpc_errors_total" {
			continue
		}
		for _, m := range f.Metric {
			for _, l := range m.Label {
				if l.GetValue() == "forward" && m.Counter.GetValue() > 0 {
					t.Errorf("%.0f of its requests were not answered: %v", m.Counter.GetValue(), m.Label)
				}
			}
		}
	}
	c.agree(w.tp, w.want)
}

// rounds is how long the random run is; ESTRAN_TEST_ROUNDS=500 is a long one.
func rounds() int {
	if n, err := strconv.Atoi(os.Getenv("ESTRAN_TEST_ROUNDS")); err == nil {
		return n
	}
	return 12
}

// Nodes restart, are wiped and replaced, take snapshots at bad moments, give up their logs and their leadership, at random, while records are appended. In the end all have
// the same records and the same log.
func TestRandomFaults(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("ESTRAN_TEST_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 3))
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	w, shard := newCounter(c, "t")
	start := 0 // what lies below was deleted
	for range rounds() {
		w.write(rng.IntN(30))
		i := rng.IntN(3)
		h := c.hosts[i]
		g := h.shardByID(shard)
		switch what := rng.IntN(6); what {
		case 0:
			c.stop(i)
			w.write(rng.IntN(30))
			c.start(i)
		case 1:
			snapshotNow(t, g)
		case 2, 3: // nothing of it is hot any more, so the log may be freed, on all or on one
			start = len(w.want) - rng.IntN(len(w.want)-start+1)
			until(t, "the records to be deleted", func() bool {
				for _, h := range c.hosts {
					if _, err := h.DeleteRecords(t.Context(), w.tp, record.Offset(start)); err == nil {
						return true
					}
				}
				return false
			})
			for _, h := range c.hosts {
				if what == 2 || rng.IntN(2) == 0 {
					snapshotNow(t, h.shardByID(shard))
				}
			}
		case 4:
			_ = g.raft.LeadershipTransfer().Error() // a follower refuses
		case 5:
			if rng.IntN(3) > 0 {
				continue
			}
			old := h.identity.serverID()
			c.stop(i)
			c.dirs[i] = t.TempDir()
			w.write(rng.IntN(20))
			c.start(i)
			self := c.hosts[i].identity.serverID()
			for _, h := range c.hosts {
				for _, g := range h.groups() {
					until(t, "the replacement to vote everywhere", func() bool {
						v := g.voters()
						return len(v) == 3 && slices.Contains(v, self) && !slices.Contains(v, old)
					})
				}
			}
		}
	}
	w.write(5)
	for _, h := range c.hosts {
		until(t, fmt.Sprintf("node %d to have %d records", h.NodeID(), len(w.want)), func() bool {
			i, err := h.Partition(w.tp)
			return (err == nil || errors.Is(err, ErrNotLeader)) && int(i.HighWatermark) == len(w.want) && int(i.LogStart) == start
		})
		if got := readAll(t, h, w.tp, record.Offset(start)); !slices.Equal(got, w.want[start:]) {
			t.Errorf("node %d: %d records, want %d", h.NodeID(), len(got), len(w.want)-start)
		}
	}
	c.sameLogs(shard)
}

// sameLogs compares the nodes' logs of a shard entry by entry, as far as all of them reach back.
func (c *trio) sameLogs(s record.ShardID) {
	c.t.Helper()
	var from, to uint64 = 0, 1 << 62
	for _, h := range c.hosts {
		base, _ := h.shardByID(s).log.Base()
		from, to = max(from, base), min(to, h.shardByID(s).raft.CommitIndex())
	}
	for i := from + 1; i <= to; i++ {
		var first raft.Log
		var payload []byte
		for k, h := range c.hosts {
			l := h.shardByID(s).log
			var e raft.Log
			err := l.GetLog(i, &e)
			var p []byte
			if err == nil {
				p, err = l.Payload(i, e.Term)
			}
			if base, _ := l.Base(); base >= i { // freed meanwhile, with all below
				break
			}
			if err != nil {
				c.t.Errorf("node %d: entry %d: %v", k+1, i, err)
				return
			}
			if k == 0 {
				first, payload = e, p
			} else if e.Term != first.Term || e.Type != first.Type || string(e.Data) != string(first.Data) || string(p) != string(payload) {
				c.t.Errorf("node %d: entry %d differs", k+1, i)
			}
		}
	}
}
