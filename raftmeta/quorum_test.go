package raftmeta

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/estran/estran/localstack"
	"github.com/estran/estran/tiering/record"

	"github.com/hashicorp/raft"
)

// trio is a cluster of voters in this process.
type trio struct {
	t      testing.TB
	voters []Voter
	dirs   []string
	mu     sync.Mutex // guards hosts, and the list of voters
	hosts  []*Host
	change func(i int, cfg *Config) // before a node is opened; may be nil
}

func newTrio(t testing.TB, n int) *trio {
	t.Helper()
	c := &trio{t: t, hosts: make([]*Host, n)}
	for i := range n {
		c.voters = append(c.voters, Voter{int32(i + 1), freeAddr(t)})
		c.dirs = append(c.dirs, t.TempDir())
	}
	return c
}

func (c *trio) config(i int) Config {
	return Config{NodeID: int32(i + 1), DataDir: c.dirs[i], Host: "127.0.0.1", Port: int32(9000 + i), Shards: 2, HotMaxBytes: 1 << 30, FileBytes: 1 << 20, TailBytes: 1 << 20, Voters: c.voters, Secret: []byte("s"),
		OnFatal: func(err error) {
			if !errors.Is(err, ErrRemoved) {
				c.t.Errorf("node %d: fatal: %v", i+1, err)
			}
		}}
}

func (c *trio) open(i int) error {
	cfg := c.config(i)
	if c.change != nil {
		c.change(i, &cfg)
	}
	cfg.PeerListener = listenAt(c.t, c.voters[i].Addr)
	ctx, cancel := context.WithTimeout(context.Background(), waitMost)
	defer cancel()
	h, err := Open(ctx, cfg)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hosts[i] = h
	return err
}

// freeAddr is where a node may listen again and again: no connection is given that port while it does not.
func freeAddr(t testing.TB) string {
	t.Helper()
	ports, err := localstack.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", ports[0])
}

// listenAt takes a port, also that of a node that ended a moment ago; nil if it cannot be had.
func listenAt(t testing.TB, addr string) net.Listener {
	for end := time.Now().Add(waitMost); ; time.Sleep(5 * time.Millisecond) {
		l, err := net.Listen("tcp", addr)
		if err == nil {
			return l
		}
		if time.Now().After(end) {
			t.Error(err)
			return nil
		}
	}
}

func closeIf(h *Host) error {
	if h == nil {
		return nil
	}
	return h.Close(context.Background())
}

// start opens nodes at once and waits for all.
func (c *trio) start(nodes ...int) {
	c.t.Helper()
	var wg sync.WaitGroup
	for _, i := range nodes {
		wg.Go(func() {
			if err := c.open(i); err != nil {
				c.t.Errorf("node %d: %v", i+1, err)
			}
		})
	}
	wg.Wait()
	if c.t.Failed() {
		c.t.FailNow()
	}
	for _, i := range nodes {
		c.t.Cleanup(func() { c.stop(i) })
	}
}

func (c *trio) stop(i int) {
	c.mu.Lock()
	h := c.hosts[i]
	c.hosts[i] = nil
	c.mu.Unlock()
	if h != nil {
		_ = h.Close(context.Background())
	}
}

func (c *trio) alive() (out []*Host) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range c.hosts {
		if h != nil {
			out = append(out, h)
		}
	}
	return out
}

// append appends through whichever node leads, until it is acknowledged; refusals must be of the kinds that a client repeats.
func (c *trio) append(tp record.TopicPartition, b record.Batch) record.Offset {
	c.t.Helper()
	for end := time.Now().Add(waitMost); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		for _, h := range c.alive() {
			ch := make(chan []AppendResult, 1)
			h.Append(context.Background(), AppendRequest{Batches: []AppendBatch{{tp, b}}}, func(r []AppendResult) { ch <- r })
			r := (<-ch)[0]
			if r.Err == nil {
				return r.Base
			}
			if !errors.Is(r.Err, ErrNotLeader) && !errors.Is(r.Err, ErrUnknownOutcome) && !errors.Is(r.Err, ErrUnknownPartition) {
				c.t.Fatalf("append: %v", r.Err)
			}
		}
	}
	c.t.Fatal("nothing is acknowledged any more")
	return 0
}

// agree waits until every node that runs has the same partition, and compares the records.
func (c *trio) agree(tp record.TopicPartition, want []string) {
	c.t.Helper()
	for _, h := range c.alive() {
		until(c.t, fmt.Sprintf("node %d to have %d records", h.NodeID(), len(want)), func() bool {
			i, err := h.Partition(tp)
			return (err == nil || errors.Is(err, ErrNotLeader)) && int(i.HighWatermark) >= len(want)
		})
		if got := readAll(c.t, h, tp, 0); !slices.Equal(got, want) {
			c.t.Errorf("node %d has %d records, want %d", h.NodeID(), len(got), len(want))
		}
	}
}

// Voters start in any order, some late; they found one cluster, and what one decides all know.
func TestFoundingInAnyOrder(t *testing.T) {
	c := newTrio(t, 3)
	first := make(chan error, 1)
	go func() { first <- c.open(2) }()
	select {
	case err := <-first:
		t.Fatalf("founded alone: %v", err)
	case <-time.After(300 * time.Millisecond): // it must not happen at all: there is nothing to wait for
	}
	c.start(0, 1)
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.stop(2) })
	topic := newTopic(t, c.hosts[0], "made-at-1", 4)
	for _, h := range c.hosts {
		until(t, "the topic to be known", func() bool { _, ok := h.Cluster().Topic("made-at-1"); return ok })
		if len(h.Cluster().Nodes()) != 3 || h.ClusterID() != c.hosts[0].ClusterID() {
			t.Errorf("node %d sees nodes %v of cluster %s", h.NodeID(), h.Cluster().Nodes(), h.ClusterID())
		}
	}
	ids := map[record.ProducerID]bool{}
	for _, h := range c.hosts { // admin writes go to any node
		newTopic(t, h, fmt.Sprint("made-at-", h.NodeID(), "-too"), 1)
		var id record.ProducerID
		decided(t, "a producer ID", func() (err error) { id, err = h.AllocateProducerID(t.Context()); return err })
		if ids[id] {
			t.Errorf("producer ID %d of node %d was given out before", id, h.NodeID())
		}
		ids[id] = true
	}
	leaders := map[int32]int{}
	for _, p := range topic.Partitions {
		for _, h := range c.hosts {
			until(t, "one leader everywhere", func() bool { n, ok := h.Leader(p.Shard); m, _ := c.hosts[0].Leader(p.Shard); return ok && n == m })
		}
		n, _ := c.hosts[0].Leader(p.Shard)
		leaders[n]++
	}
	t.Logf("leaders: %v", leaders)
}

// Nodes end one after the other under load, and come back: what was acknowledged is there at its offset, on every node.
func TestEveryNodeRestarts(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	tp := record.TopicPartition{Topic: newTopic(t, c.hosts[0], "t", 1).ID}
	var want []string
	write := func(n int) {
		for range n {
			v := fmt.Sprint(len(want))
			if base := c.append(tp, batchOf(t, 7, record.Sequence(len(want)), v)); int(base) != len(want) {
				t.Fatalf("record %s at offset %d", v, base)
			}
			want = append(want, v)
		}
	}
	write(50)
	for i := range 3 {
		c.stop(i)
		write(50)
		c.start(i)
		write(50)
	}
	c.agree(tp, want)
	for i := range 3 {
		c.stop(i)
	}
	c.start(0, 1, 2)
	write(10)
	c.agree(tp, want)
}

// With most voters gone nothing is acknowledged, and nothing is proven.
func TestMinorityServesNothing(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	topic := newTopic(t, c.hosts[0], "t", 1)
	tp := record.TopicPartition{Topic: topic.ID}
	c.append(tp, batchOf(t, -1, -1, "first"))
	lead := int32(0)
	until(t, "a leader", func() bool { var ok bool; lead, ok = c.hosts[0].Leader(topic.Partitions[0].Shard); return ok })
	for i := range c.hosts {
		if int32(i+1) != lead {
			c.stop(i)
		}
	}
	h := c.hosts[lead-1]
	var answered atomic.Bool
	done := make(chan AppendResult, 1)
	h.Append(t.Context(), AppendRequest{Batches: []AppendBatch{{tp, batchOf(t, -1, -1, "lost")}}}, func(r []AppendResult) { answered.Store(true); done <- r[0] })
	if r := <-done; r.Err == nil {
		t.Error("acknowledged without a majority")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if err := h.Prove(ctx, topic.Partitions[0].Shard); err == nil {
		t.Error("proven without a majority")
	}
	for i := range c.hosts {
		if int32(i+1) != lead {
			c.start(i)
		}
	}
	c.append(tp, batchOf(t, -1, -1, "second"))
	until(t, "a proof", func() bool {
		for _, h := range c.hosts {
			if h.Prove(t.Context(), topic.Partitions[0].Shard) == nil {
				return true
			}
		}
		return false
	})
}

// A voter that has been away for longer than the others keep their log is given a snapshot.
func TestLateVoterGetsASnapshot(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	topic := newTopic(t, c.hosts[0], "t", 1)
	tp := record.TopicPartition{Topic: topic.ID}
	shard := topic.Partitions[0].Shard
	var want []string
	write := func(n int) {
		for range n {
			v := fmt.Sprint(len(want), strings.Repeat("v", 100_000))
			c.append(tp, batchOf(t, 7, record.Sequence(len(want)), v)) // once each: a record that is there twice stays hot, and the log with it
			want = append(want, v)
		}
	}
	write(5)
	until(t, "all to follow", func() bool {
		return c.hosts[2].shardByID(shard).applied.Load() >= c.hosts[0].shardByID(shard).applied.Load()
	})
	c.stop(2)
	write(30)
	until(t, "the records to be deleted", func() bool { // what is hot cannot be freed
		for _, h := range c.alive() {
			if _, err := h.DeleteRecords(t.Context(), tp, 35); err == nil {
				return true
			}
		}
		return false
	})
	for _, h := range c.alive() {
		g := h.shardByID(shard)
		until(t, "the log to be freed", func() bool {
			snapshotNow(t, g)
			base, _ := g.log.Base()
			return base > 15
		})
	}
	for i := range 2 { // new instances, which have nothing on its way to the third
		c.stop(i)
	}
	c.start(0, 1)
	write(10)
	c.start(2)
	write(5)
	h := c.hosts[2]
	until(t, "the late voter to have all", func() bool {
		i, err := h.Partition(tp)
		return (err == nil || errors.Is(err, ErrNotLeader)) && int(i.HighWatermark) == len(want) && i.LogStart == 35
	})
	if got := readAll(t, h, tp, 35); !slices.Equal(got, want[35:]) {
		t.Errorf("%d records, want %d", len(got), len(want)-35)
	}
	if base, _ := h.shardByID(shard).log.Base(); base <= 15 {
		t.Errorf("no snapshot was installed: its log begins behind %d", base)
	}
}

// A voter that comes back without its directory takes the place of what it was, by itself: then any other may go, and all that was acknowledged is there.
func TestWipedVoterIsReplaced(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	tp := record.TopicPartition{Topic: newTopic(t, c.hosts[0], "t", 1).ID}
	var want []string
	write := func(n int) {
		for range n {
			v := fmt.Sprint(len(want), strings.Repeat("w", 20_000))
			if base := c.append(tp, batchOf(t, 7, record.Sequence(len(want)), v)); int(base) != len(want) {
				t.Fatalf("record %d at offset %d", len(want), base)
			}
			want = append(want, v)
		}
	}
	write(20)
	for i := range 3 { // one after the other: in the end nobody is left of the founders
		old := c.hosts[i].identity.serverID()
		c.stop(i)
		c.dirs[i] = t.TempDir()
		write(20)
		c.start(i)
		self := c.hosts[i].identity.serverID()
		if self == old {
			t.Fatal("the same incarnation")
		}
		for _, h := range c.alive() {
			for _, g := range h.groups() {
				until(t, fmt.Sprintf("node %d to see %s vote in group %d, and not %s", h.NodeID(), self, g.id, old), func() bool {
					v := g.voters()
					return len(v) == 3 && slices.Contains(v, self) && !slices.Contains(v, old)
				})
			}
		}
		other := (i + 1) % 3
		c.stop(other) // now the new one is needed for every acknowledgement
		write(20)
		c.start(other)
	}
	c.agree(tp, want)
}

// mute is a connection that breaks behind the first message with these words that goes over it: nobody hears what came of that.
type mute struct {
	net.Conn
	words *atomic.Pointer[string] // nil when one has
}

// muted makes the connections of nodes that are opened from now on break so.
func muted(words *atomic.Pointer[string]) func(cfg *Config) {
	return func(cfg *Config) {
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			return mute{conn, words}, err
		}
	}
}

func (m mute) Write(b []byte) (int, error) {
	n, err := m.Conn.Write(b)
	if w := m.words.Load(); w != nil && bytes.Contains(b, []byte(*w)) && m.words.CompareAndSwap(w, nil) {
		err = errors.Join(err, m.Conn.Close())
	}
	return n, err
}

// A node that starts at another address tells the leader of meta, again if the answer does not come: it does not end because that leader goes.
func TestRegistrationIsRepeated(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	c.stop(2)
	var words atomic.Pointer[string]
	words.Store(new(`"Incarnation":`))
	c.change = func(_ int, cfg *Config) {
		cfg.Port = 9999
		muted(&words)(cfg)
	}
	c.start(2)
	if words.Load() != nil {
		t.Fatal("no registration went over the network")
	}
	if n, _ := c.hosts[2].Cluster().Node(3); n.Port != 9999 {
		t.Errorf("node 3 is registered as %+v", n)
	}
}

// A command that says how the members should be is given to the leader of meta again if its answer does not come, and a removal that had been done is done.
func TestMemberCommandsAreRepeated(t *testing.T) {
	c := newTrio(t, 3)
	var words atomic.Pointer[string]
	c.change = func(_ int, cfg *Config) { muted(&words)(cfg) }
	c.start(0, 1, 2)
	lead := -1
	until(t, "a leader of meta", func() bool {
		lead = slices.IndexFunc(c.hosts, func(h *Host) bool { return h.meta.leads.Load() > 0 })
		return lead >= 0
	})
	asked, victim := c.hosts[(lead+1)%3], int32((lead+2)%3+1)
	ctx, cancel := context.WithTimeout(t.Context(), waitMost)
	defer cancel()
	for _, x := range []struct {
		words string
		do    func() error
		done  func() bool
	}{
		{`"On":true`, func() error { return asked.DrainNode(ctx, victim, true) }, func() bool { return asked.Cluster().Draining(victim) }},
		{`"On":false`, func() error { return asked.DrainNode(ctx, victim, false) }, func() bool { return !asked.Cluster().Draining(victim) }},
		{`"Remove":[`, func() error { return asked.RemoveMember(ctx, victim) }, func() bool { return !asked.Cluster().Member(victim) }},
	} {
		words.Store(&x.words)
		err := x.do()
		if words.Load() != nil {
			t.Fatalf("%s: nothing of it went over the network", x.words)
		}
		if err != nil || !x.done() {
			t.Errorf("%s: %v", x.words, err)
		}
	}
}

// A founder that has voted in a group and lost that group's directory alone must not vote again.
func TestLostGroupIsRefused(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	c.stop(1)
	if err := os.RemoveAll(filepath.Join(c.dirs[1], "shard-1")); err != nil {
		t.Fatal(err)
	}
	if err := c.open(1); !errors.Is(err, ErrForeign) {
		t.Errorf("%v", err)
	}
}

// Who waits for a leader learns of the next one.
func TestAwaitLeader(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	lead := c.leads(1)
	other := c.hosts[(lead+1)%3]
	ctx, cancel := context.WithTimeout(t.Context(), waitMost)
	defer cancel()
	c.stop(lead)
	until(t, "another leader", func() bool {
		other.AwaitLeader(ctx, 1)
		now, ok := other.Leader(1)
		return ok && int(now) != lead+1
	})
	cancel()
	other.AwaitLeader(ctx, 99) // a shard that nobody has
}

// transferring stands for a transfer of leadership that the test decides.
type transferring chan error

func (c transferring) Error() error { return <-c }

// A node that hands its leadership over does not name itself, and does again if it keeps it.
func TestLeaderWhileItYields(t *testing.T) {
	c := newTrio(t, 1)
	c.start(0)
	h := c.hosts[0]
	leads := func(when string, want bool) {
		t.Helper()
		if node, ok := h.Leader(1); ok != want {
			t.Errorf("%s: node %d leads: %v", when, node, ok)
		}
	}
	transfer := func() (decided transferring, done chan error) {
		decided, done = make(transferring), make(chan error, 1)
		begun := make(chan struct{})
		go func() {
			done <- h.shardByID(1).transfer(func() raft.Future { close(begun); return decided })
		}()
		<-begun
		return decided, done
	}
	failed := errors.New("nobody takes it")
	leads("before", true)
	first, firstDone := transfer()
	second, secondDone := transfer()
	leads("while it hands over", false)
	second <- failed // there is one already
	<-secondDone
	leads("while it still hands over", false)
	first <- failed
	if err := <-firstDone; !errors.Is(err, failed) {
		t.Error(err)
	}
	leads("after it kept the leadership", true)
	first, firstDone = transfer()
	first <- nil
	if err := <-firstDone; err != nil {
		t.Error(err)
	}
	leads("after it gave the leadership away, which it has not noticed yet", false)
}

// What one node has acknowledged another knows once it is current; it would not at once.
func TestCurrent(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	late := 0
	for i := range 60 {
		name := fmt.Sprint("t", i)
		newTopic(t, c.hosts[i%3], name, 1)
		h := c.hosts[(i+1)%3]
		if _, ok := h.Cluster().Topic(name); !ok {
			late++
		}
		if err := h.Current(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, ok := h.Cluster().Topic(name); !ok {
			t.Fatalf("node %d does not know topic %s", h.NodeID(), name)
		}
	}
	t.Logf("%d of 60 topics were not known at once", late)
	c.stop(0)
	c.stop(1)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := c.hosts[2].Current(ctx); !errors.Is(err, ErrTimeout) {
		t.Errorf("without a majority: %v", err)
	}
}

// A snapshot that comes while raft is being opened is refused, and sent again: raft's goroutines run before anybody else has it.
func TestInstallWhileOpening(t *testing.T) {
	_, err := (&group{host: &Host{}}).transportGroup().Install(5, 1, 5, func() error {
		t.Error("raft was handed a snapshot")
		return nil
	})
	if err == nil {
		t.Error("it was taken")
	}
}
