package localstack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/estran/estran/tiering/record"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// descriptors skips a test that this machine has too few descriptors for; what a process may have at most it has, the runtime sees to that.
func descriptors(t *testing.T, need uint64) {
	t.Helper()
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil || l.Cur < need {
		t.Skipf("it needs %d descriptors, there are %d (%v)", need, l.Cur, err)
	}
}

// wire is a client's connection that does what no library would.
type wire struct {
	net.Conn
	corr int32
}

// dialWire connects. Nothing on the connection takes longer than until waits: a test that hangs has failed.
func dialWire(n *Node) (*wire, error) {
	c, err := net.DialTimeout("tcp", n.Kafka, waitMost)
	if err != nil {
		return nil, err
	}
	return &wire{Conn: c}, c.SetDeadline(time.Now().Add(waitMost))
}

func (w *wire) send(r kmsg.Request, version int16) error {
	r.SetVersion(version)
	w.corr++
	_, err := w.Write(kmsg.NewRequestFormatter(kmsg.FormatterClientID("load")).AppendRequest(nil, r, w.corr))
	return err
}

// receive reads one answer and drops its bytes; into decodes one whose version is not flexible.
func (w *wire) receive(into kmsg.Response) (size int, err error) {
	var head [8]byte
	if _, err := io.ReadFull(w, head[:]); err != nil {
		return 0, err
	}
	size = int(binary.BigEndian.Uint32(head[:])) - 4
	if into == nil {
		_, err = io.CopyN(io.Discard, w, int64(size))
		return size, err
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(w, body); err != nil {
		return 0, err
	}
	return size, into.ReadFrom(body)
}

// reset closes as a process does that was killed with bytes unread: nothing is said goodbye.
func (w *wire) reset() {
	if c, ok := w.Conn.(*net.TCPConn); ok {
		_ = c.SetLinger(0) // else it is closed in the ordinary way
	}
	_ = w.Close() // twice is no fault
}

// produce is a request of one record.
func produce(topic string, partition int32, value []byte) *kmsg.ProduceRequest {
	b := record.NewBuilder(record.CodecNone)
	b.Add(record.Timestamp(time.Now().UnixMilli()), nil, value)
	batch, err := b.Batch()
	if err != nil {
		panic(err) // a record that does not fit
	}
	p := kmsg.NewProduceRequestTopicPartition()
	p.Partition, p.Records = partition, batch
	x := kmsg.NewProduceRequestTopic()
	x.Topic, x.Partitions = topic, []kmsg.ProduceRequestTopicPartition{p}
	r := kmsg.NewPtrProduceRequest()
	r.Acks, r.TimeoutMillis, r.Topics = -1, 60_000, []kmsg.ProduceRequestTopic{x}
	return r
}

// fetch asks for partitions from an offset on, each with all that an answer may hold.
func fetch(topic string, partitions int32, from int64, wait time.Duration) *kmsg.FetchRequest {
	x := kmsg.NewFetchRequestTopic()
	x.Topic = topic
	for i := range partitions {
		p := kmsg.NewFetchRequestTopicPartition()
		p.Partition, p.FetchOffset, p.PartitionMaxBytes, p.CurrentLeaderEpoch = i, from, 50<<20, -1
		x.Partitions = append(x.Partitions, p)
	}
	r := kmsg.NewPtrFetchRequest()
	r.MaxWaitMillis, r.MinBytes, r.MaxBytes, r.Topics = int32(wait.Milliseconds()), 1, 50<<20, []kmsg.FetchRequestTopic{x}
	return r
}

const (
	produceVersion = 8  // the last that is not flexible
	fetchVersion   = 11 // the same
)

// produced asks for one record to be produced, and wants it acknowledged.
func (w *wire) produced(topic string, partition int32, value []byte) error {
	if err := w.send(produce(topic, partition, value), produceVersion); err != nil {
		return err
	}
	resp := kmsg.NewPtrProduceResponse()
	resp.SetVersion(produceVersion)
	if _, err := w.receive(resp); err != nil {
		return err
	}
	if code := resp.Topics[0].Partitions[0].ErrorCode; code != 0 {
		return fmt.Errorf("code %d", code)
	}
	return nil
}

// use is what a process has of that which leaks.
type use struct{ goroutines, descriptors, connections float64 }

func usage(t *testing.T, n *Node) use {
	t.Helper()
	return use{metric(t, n, "go_goroutines "), metric(t, n, "process_open_fds "), metric(t, n, "estran_kafka_connections ")}
}

// back waits until a node has no more than before of what leaks, but for a few that come and go by themselves: of the test's clients, of sealing, of scrapes.
func back(t *testing.T, n *Node, before use) {
	t.Helper()
	var now use
	defer func() { t.Logf("before %+v, after %+v", before, now) }()
	until(t, "what the connections needed to be given back", func() bool {
		now = usage(t, n)
		return now.connections <= before.connections+100 && now.goroutines <= before.goroutines+100 && now.descriptors <= before.descriptors+100
	})
}

// each runs f so often at once, and fails with the first error.
func each(t *testing.T, n int, f func(i int) error) {
	t.Helper()
	errs := make(chan error, n)
	for i := range n {
		go func() { errs <- f(i) }()
	}
	failed := 0
	for range n {
		if err := <-errs; err != nil {
			if failed++; failed == 1 {
				t.Error(err)
			}
		}
	}
	if failed > 0 {
		t.Fatalf("%d of %d failed", failed, n)
	}
}

// ends is how many records a topic has.
func ends(t *testing.T, n *Node, topic string) (total int64) {
	t.Helper()
	cl := client(t, n)
	defer cl.Close()
	var got kadm.ListedOffsets
	until(t, "every partition to have a leader", func() bool {
		var err error
		got, err = kadm.NewClient(cl).ListEndOffsets(t.Context(), topic)
		return err == nil && got.Error() == nil
	})
	got.Each(func(o kadm.ListedOffset) { total += o.Offset })
	return total
}

// Row 19: 5,000 clients are killed and come back at once. Each is answered, produces and waits in a fetch; none is refused, no record is lost or written twice, and when they have
// gone nothing is left of them.
func TestReconnectHerd(t *testing.T) {
	const clients, partitions = 5000, 4
	descriptors(t, clients+1000)
	n := startNode(t, t.TempDir(), []string{"ESTRAN_QUORUM_SHARDS=2"})
	createTopic(t, n, "t", partitions)
	createTopic(t, n, "idle", 1) // a fetch of it waits
	before := usage(t, n)
	herd := func() []*wire {
		out := make([]*wire, clients)
		each(t, clients, func(i int) (err error) {
			if out[i], err = dialWire(n); err != nil {
				return err
			}
			if err := errors.Join(out[i].send(kmsg.NewPtrApiVersionsRequest(), 0), out[i].send(kmsg.NewPtrMetadataRequest(), 4)); err != nil {
				return err
			}
			for range 2 {
				if _, err := out[i].receive(nil); err != nil {
					return err
				}
			}
			if err := out[i].produced("t", int32(i%partitions), []byte("v")); err != nil {
				return err
			}
			return out[i].send(fetch("idle", 1, 0, time.Second), fetchVersion)
		})
		return out
	}
	for range 2 {
		all := herd()
		if got := usage(t, n); got.connections < clients {
			t.Errorf("%+v with %d clients", got, clients)
		}
		for _, c := range all {
			c.reset()
		}
	}
	if got := ends(t, n, "t"); got != 2*clients {
		t.Errorf("%d records of %d", got, 2*clients)
	}
	if refused := metric(t, n, "estran_kafka_connections_rejected_total"); refused != 0 {
		t.Errorf("%.0f connections were refused", refused)
	}
	back(t, n, before)
}

// Incident 42: 10,000 connections end in every way that there is: closed or reset, in the middle of a frame, half closed, with answers that nobody has read, with a fetch that waits for
// weeks. Descriptors and goroutines are given back, and the node, left alone, does nothing.
func TestDroppedConnections(t *testing.T) {
	const rounds, atOnce = 5, 2000
	descriptors(t, atOnce+1000)
	n := startNode(t, t.TempDir(), []string{"ESTRAN_QUORUM_SHARDS=2"})
	createTopic(t, n, "t", 2)
	createTopic(t, n, "idle", 1)
	if err := client(t, n).ProduceSync(t.Context(), &kgo.Record{Topic: "t", Value: make([]byte, 500_000)}).FirstErr(); err != nil {
		t.Fatal(err)
	}
	before := usage(t, n)
	var half sync.WaitGroup
	for range rounds {
		each(t, atOnce, func(i int) error {
			c, err := dialWire(n)
			if err != nil {
				return err
			}
			switch i % 8 {
			case 0: // nothing is sent
			case 1:
				_, err = c.Write([]byte{0, 0, 1, 0, 0, 0, 0, 8, 0})
			case 2:
				_, err = c.Write(binary.BigEndian.AppendUint32(nil, 1<<31-1))
			case 3:
				err = c.send(produce("t", 0, []byte("v")), produceVersion)
			case 4:
				err = c.send(fetch("t", 2, 0, 0), fetchVersion)
			case 5:
				err = c.produced("t", 1, []byte("v"))
			case 6:
				err = c.send(fetch("idle", 1, 0, 20*24*time.Hour), fetchVersion)
			case 7: // half closed: the node ends it
				if err = errors.Join(c.send(kmsg.NewPtrApiVersionsRequest(), 0), c.Conn.(*net.TCPConn).CloseWrite()); err == nil {
					half.Go(func() {
						_, _ = io.Copy(io.Discard, c) // until its end, however that comes
						c.reset()
					})
					return nil
				}
			}
			if i%16 < 8 {
				c.reset()
			}
			return errors.Join(err, closed(c))
		})
	}
	half.Wait()
	back(t, n, before)
	until(t, "it to do nothing", func() bool {
		cpu, began := metric(t, n, "process_cpu_seconds_total"), time.Now()
		<-time.After(2 * time.Second) // what is measured is a period
		return (metric(t, n, "process_cpu_seconds_total")-cpu)/time.Since(began).Seconds() <= 0.5
	})
}

// closed closes a connection that may be closed.
func closed(c *wire) error {
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// flood holds connections open until it is ended, and says how many of them the node has ended instead.
func flood(t *testing.T, n *Node, size int) (refused func() int, end func()) {
	t.Helper()
	var gone atomic.Int64
	var wg sync.WaitGroup
	conns := make([]*wire, size)
	each(t, size, func(i int) error {
		c, err := dialWire(n)
		if err != nil {
			return err
		}
		conns[i] = c
		wg.Go(func() {
			_, _ = io.Copy(io.Discard, c) // until its end, however that comes
			gone.Add(1)
		})
		return nil
	})
	end = sync.OnceFunc(func() {
		for _, c := range conns {
			c.reset()
		}
		wg.Wait()
	})
	t.Cleanup(end)
	return func() int { return int(gone.Load()) }, end
}

// Row 23: a voter has as many connections of clients as it may have, and 2,000 more are tried. They are refused and counted; its peers reach it as before, a voter that starts among
// them, so that records are acknowledged that need it; and who comes later is served.
func TestConnectionFlood(t *testing.T) {
	const most, size = 200, 2000
	descriptors(t, size+1000)
	nodes := startQuorum(t, 3, "ESTRAN_QUORUM_SHARDS=1", fmt.Sprint("KAFKA_MAX_CONNECTIONS=", most))
	createReplicated(t, nodes[0], "t", 1, 3)
	var leader, flooded, other *Node
	until(t, "a leader", func() bool {
		leader = nil
		for _, n := range nodes {
			if metric(t, n, "estran_raft_state", `group="1"`, `state="Leader"`) == 1 {
				leader = n
			}
		}
		return leader != nil
	})
	for i, n := range nodes {
		if n != leader {
			flooded, other = other, n
		} else {
			mustCluster(t, n, "leader", "transfer", "--group", "shard-1", "--to", fmt.Sprint(i+1)) // whoever leads meanwhile gives it back
		}
	}
	if err := other.Kill(); err != nil { // what is acknowledged now needs the flooded one
		t.Fatal(err)
	}
	until(t, "the connections by which the topic was made to be gone", func() bool { return metric(t, flooded, "estran_kafka_connections ") == 0 })
	refused, end := flood(t, flooded, size)
	until(t, "what is too much to be refused", func() bool { return refused() == size-most })
	if got := metric(t, flooded, "estran_kafka_connections_rejected_total", `reason="max_connections"`); got != size-most {
		t.Errorf("%.0f were counted, %d were refused", got, size-most)
	}
	produceAll := func() {
		t.Helper()
		c, err := dialWire(leader) // a client of a library might ask the flooded one
		if err != nil {
			t.Fatal(err)
		}
		defer c.reset()
		for range 100 {
			until(t, "a record to be acknowledged", func() bool { return c.produced("t", 0, []byte("v")) == nil }) // it may have lost the leadership for a while
		}
	}
	produceAll()
	restart(t, other) // it asks its peers what they remember
	if got := metric(t, flooded, "estran_kafka_connections "); got != most {
		t.Errorf("%.0f connections, %d are allowed", got, most)
	}
	end()
	until(t, "the flooded voter to serve again", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return client(t, flooded).Ping(ctx) == nil
	})
	produceAll()
}

// A process that may have few descriptors is flooded with more connections: it keeps enough for its log and its store, refuses and counts the others, and goes on.
func TestFewDescriptors(t *testing.T) {
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	const limit, size = 400, 1000
	script := filepath.Join(t.TempDir(), "estran")
	if err := os.WriteFile(script, fmt.Appendf(nil, "#!/bin/sh\nulimit -n %d\nexec %s \"$@\"\n", limit, p), 0o700); err != nil {
		t.Fatal(err)
	}
	n := NewNode(script, t.TempDir(), []string{"ESTRAN_QUORUM_SHARDS=1", "ESTRAN_TIERING_SEAL_BYTES=1MiB", "ESTRAN_TIERING_SEAL_AGE=300ms", "ESTRAN_TIERING_LOCAL_RETENTION_BYTES=0"})
	startAll(t, []*Node{n})
	createTopic(t, n, "t", 1)
	cl := client(t, n, kgo.DefaultProduceTopic("t"), kgo.ConnIdleTimeout(15*time.Minute))
	send := func() {
		t.Helper()
		for range 20 {
			if err := cl.ProduceSync(t.Context(), &kgo.Record{Value: make([]byte, 100_000)}).FirstErr(); err != nil {
				t.Fatal(err)
			}
		}
	}
	send()
	refused, end := flood(t, n, size)
	until(t, "what is too much to be refused", func() bool {
		return metric(t, n, "estran_kafka_connections_rejected_total") == float64(refused()) && refused() >= size-limit
	})
	send()
	until(t, "sealing while it is flooded", func() bool { return metric(t, n, "estran_unuploaded_bytes") == 0 })
	end()
	until(t, "the node to serve again", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return client(t, n).Ping(ctx) == nil
	})
	send()
	if !n.Alive() {
		t.Error("the node has ended")
	}
}

// Row 20: clients that hold what others need and do nothing with it: half of a large frame, frames of a byte a second, answers that nobody reads, connections without a word. Others
// produce and consume all the while, and when the slow have gone nothing is left of them.
func TestSlowClients(t *testing.T) {
	descriptors(t, 2000)
	n := startNode(t, t.TempDir(), []string{"ESTRAN_QUORUM_SHARDS=2"})
	createTopic(t, n, "large", 16)
	filler := client(t, n, kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.ProducerBatchCompression(kgo.NoCompression()))
	for i := range 32 { // 1.8 MB in each partition: an answer from all is as large as one may be
		if err := filler.ProduceSync(t.Context(), &kgo.Record{Topic: "large", Partition: int32(i % 16), Value: make([]byte, 900_000)}).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	before := usage(t, n)
	var conns []*wire
	open := func(count int, begin func(*wire) error) []*wire {
		t.Helper()
		from := len(conns)
		for range count {
			c, err := dialWire(n)
			if err == nil {
				err = begin(c)
			}
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, c)
		}
		return conns[from:]
	}
	open(500, func(*wire) error { return nil })
	const whole = 60 << 20
	open(2, func(c *wire) error { // each nearly all that frames may have
		head := []byte{whole >> 24, whole >> 16 & 0xff, whole >> 8 & 0xff, whole & 0xff, 0, 0, 0, produceVersion}
		_, err := c.Write(append(head, make([]byte, 64<<10)...))
		return err
	})
	open(16, func(c *wire) error {
		if err := c.Conn.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
			return err
		}
		return c.send(fetch("large", 16, 0, 0), fetchVersion)
	})
	slow := open(80, func(c *wire) error {
		_, err := c.Write([]byte{0, 1 << 4, 0, 0, 0, 0, 0, produceVersion})
		return err
	})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		for tick := time.NewTicker(time.Second); ; { // their pace
			select {
			case <-tick.C:
			case <-ctx.Done():
				tick.Stop()
				return
			}
			for _, c := range slow {
				_, _ = c.Write([]byte{0}) // the node may have ended it
			}
		}
	})
	createTopic(t, n, "t", 4)
	const records = 2000
	l := newLedger()
	l.produce(t, n, "t", 4, t.Context(), records/4)
	l.verify(t, n, "t")
	if got := l.count(); got != records {
		t.Errorf("%d of %d records", got, records)
	}
	for _, what := range []string{"frame", "answer"} {
		if metric(t, n, "estran_kafka_slow_connections_total", what) == 0 {
			t.Errorf("nobody's %s was in the way", what)
		}
	}
	cancel()
	wg.Wait()
	for _, c := range conns {
		c.reset()
	}
	back(t, n, before)
}

// memoryGroup limits the memory of a process, by a cgroup of its own where there are any and this process may make one; killed is how often the kernel has ended one in it.
func memoryGroup(t *testing.T, n *Node, limit int64) (killed func() int) {
	t.Helper()
	pid := n.PID
	const root = "/sys/fs/cgroup"
	dir, knob, events, swap := filepath.Join(root, fmt.Sprint("estran-", pid)), "memory.max", "memory.events", "memory.swap.max"
	if _, err := os.Stat(filepath.Join(root, "memory", "memory.limit_in_bytes")); err == nil { // version 1
		dir, knob, events, swap = filepath.Join(root, "memory", fmt.Sprint("estran-", pid)), "memory.limit_in_bytes", "memory.oom_control", "memory.memsw.limit_in_bytes"
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Logf("no cgroup here, only the process's own account is looked at: %v", err)
		return func() int { return 0 }
	}
	write := func(name string, n int64) error {
		return os.WriteFile(filepath.Join(dir, name), fmt.Append(nil, n), 0o600)
	}
	t.Cleanup(func() {
		_ = n.Kill()
		until(t, "the cgroup to be empty", func() bool { return os.Remove(dir) == nil })
	})
	if err := errors.Join(write(knob, limit), write("cgroup.procs", int64(pid))); err != nil {
		t.Logf("no limit of memory here, only the process's own account is looked at: %v", err)
		return func() int { return 0 }
	}
	_ = write(swap, limit) // where there is swap
	return func() (n int) {
		b, err := os.ReadFile(filepath.Join(dir, events))
		if err != nil {
			t.Error(err)
		}
		for line := range strings.Lines(string(b)) {
			_, _ = fmt.Sscanf(line, "oom_kill %d", &n) // the others say something else
		}
		return n
	}
}

// resident is a field of the process's status, in bytes: VmRSS is what it has in memory, VmHWM the most that it had. ok is false where it is not told.
func resident(pid int, field string) (n int64, ok bool) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, false // only Linux tells
	}
	for line := range strings.Lines(string(status)) {
		if rest, found := strings.CutPrefix(line, field+":"); found {
			_, err := fmt.Sscan(rest, &n)
			return n << 10, err == nil
		}
	}
	return 0, false
}

// Row 24: 100 clients fetch as much as they may, from the log and from objects, a tenth of them in no hurry, beside twenty producers of large requests, in 512 MiB. Each gets all of its
// answers and acknowledgements, and the process stays below its limit.
func TestBigFetchers(t *testing.T) {
	const limit, fetchers, producers, partitions, answers = 512 << 20, 100, 20, 16, 10
	n := startNode(t, t.TempDir(), []string{"ESTRAN_QUORUM_SHARDS=2", "ESTRAN_TIERING_SEAL_BYTES=8MiB", "ESTRAN_TIERING_SEAL_AGE=300ms", "ESTRAN_TIERING_LOCAL_RETENTION_BYTES=0", "GOMEMLIMIT=400MiB"})
	killed := memoryGroup(t, n, limit)
	defer func() {
		if k := killed(); k > 0 || !n.Alive() {
			t.Errorf("the process was ended for want of memory (%d)", k)
		}
	}()
	createTopic(t, n, "t", partitions)
	fill := client(t, n, kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.ProducerBatchCompression(kgo.NoCompression()), kgo.DefaultProduceTopic("t"))
	value := make([]byte, 900_000)
	for i := range 8 * partitions { // 7 MB in each partition
		if err := fill.ProduceSync(t.Context(), &kgo.Record{Partition: int32(i % partitions), Value: value}).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	errNothing := errors.New("an answer without a record: objects were not read in time")
	var read, cut atomic.Int64
	one := func(i, k int, c *wire) error {
		if i >= fetchers {
			return c.produced("t", int32((i+k)%partitions), value)
		}
		if err := c.send(fetch("t", partitions, int64(k%2*4), time.Second), fetchVersion); err != nil {
			return err
		}
		size, err := c.receive(nil)
		if err == nil && size < len(value) {
			err = errNothing
		}
		read.Add(int64(size))
		return err
	}
	each(t, fetchers+producers, func(i int) error {
		slow := i < fetchers/10
		for k, tries := 0, 0; k < answers; {
			c, err := dialWire(n)
			if err != nil {
				return err
			}
			if slow { // as Java's consumers, which ask for so little
				err = c.Conn.(*net.TCPConn).SetReadBuffer(64 << 10)
			}
			for ; err == nil && k < answers; k++ {
				if err = one(i, k, c); err != nil {
					break
				}
			}
			c.reset()
			if err != nil && !errors.Is(err, errNothing) { // others wait for the memory of its answer: the next is smaller
				cut.Add(1)
			}
			if tries++; err != nil && tries == 100 {
				return fmt.Errorf("client %d, answer %d: %w", i, k, err)
			}
		}
		return nil
	})
	if told := metric(t, n, "estran_kafka_slow_connections_total"); float64(cut.Load()) > told { // on a busy machine the others may be too slow as well
		t.Errorf("%d connections ended, %.0f of them because they were too slow", cut.Load(), told)
	}
	peak, known := resident(n.PID, "VmHWM")
	t.Logf("%d MB were fetched, at most %d MiB were in memory; %.0f MB came from objects", read.Load()/1e6, peak>>20, metric(t, n, "estran_fetch_bytes_total", `tier="object"`)/1e6)
	if known && peak > limit {
		t.Errorf("%d MiB were in memory, %d are the limit", peak>>20, int64(limit)>>20)
	}
	if metric(t, n, "estran_fetch_bytes_total", `tier="object"`) == 0 {
		t.Error("nothing came from objects")
	}
}
