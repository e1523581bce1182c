package peer

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/estran/estran/localstack"
	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// eventually polls what other goroutines and nodes do; there is no event to wait for.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	const most = 3 * time.Minute // no claim about how fast it is: the machine may be busy with something else
	for end := time.Now().Add(most); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not after %s", what, most)
		}
	}
}

type machine struct {
	mu     sync.Mutex
	values []uint64
	index  uint64
}

func (m *machine) Apply(l *raft.Log) any {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.index = l.Index
	if l.Type == raft.LogCommand {
		var v uint64
		if _, err := fmt.Sscanf(string(l.Data[raftlog.HeaderBytes:]), "%d", &v); err != nil {
			panic(err)
		}
		m.values = append(m.values, v)
	}
	return nil
}

func (m *machine) Snapshot() (raft.FSMSnapshot, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, err := json.Marshal(m.values)
	return frozen(b), err
}

func (m *machine) Restore(r io.ReadCloser) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return json.NewDecoder(r).Decode(&m.values)
}

func (m *machine) all() []uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]uint64(nil), m.values...)
}

type frozen []byte

func (f frozen) Persist(s raft.SnapshotSink) error {
	if _, err := s.Write(f); err != nil {
		return s.Cancel()
	}
	return s.Close()
}
func (frozen) Release() {}

// node is a voter of one group over the real log and this transport.
type node struct {
	behind func(group uint32, why string) // may be nil
	t      testing.TB
	net    *network
	id     string
	dir    string
	slow   bool // timers that never run out in a test
	quiet  bool // nor does CommitTimeout
	peers  *Peers
	trans  *Transport
	log    *raftlog.Log
	stable *raftlog.Stable
	snaps  *raftlog.Snapshots
	raft   atomic.Pointer[raft.Raft]
	fsm    *machine
	snapMu sync.Mutex
	addr   string
	tls    *TLS
	at     times
	now    func() time.Time
	free   func() int64
	back   atomic.Int64 // buffers that were given back
	fails  atomic.Int64 // so many of the next connections that it makes do
}

func (n *node) start(first []raft.Server) {
	n.t.Helper()
	if n.addr == "" {
		ports, err := localstack.FreePorts(1) // none that a connection may get while the node is down
		if err != nil {
			n.t.Fatal(err)
		}
		n.addr = fmt.Sprintf("127.0.0.1:%d", ports[0])
	}
	l, err := net.Listen("tcp", n.addr)
	if err != nil {
		n.t.Fatal(err)
	}
	n.addr = l.Addr().String()
	n.net.mu.Lock()
	n.net.addrs[n.id] = n.addr
	n.net.mu.Unlock()
	check := func(err error) {
		n.t.Helper()
		if err != nil {
			n.t.Fatal(err)
		}
	}
	pc := Config{ServerID: n.id, ClusterID: "c", Secret: []byte("secret"), TLS: n.tls, Listener: l, Resolve: n.net.resolve, Dial: n.dial, StageDir: n.dir, Now: n.now, Free: n.free, OnBehind: n.behind,
		GetBuffer: func(k int) []byte { return make([]byte, k) }, PutBuffer: func(b []byte) {
			n.back.Add(1)
			for i := range b { // whoever still looks at it sees that it is something else now
				b[i] = 0xEE
			}
		}}
	if n.tls != nil {
		pc.Secret = nil
	}
	n.peers, err = newPeers(pc, n.at)
	check(err)
	n.log, err = raftlog.Open(raftlog.Config{Dir: filepath.Join(n.dir, "log"), Group: 1, FileBytes: 1 << 20, TailBytes: 1 << 20})
	check(err)
	n.stable, err = raftlog.OpenStable(raftlog.OS{}, filepath.Join(n.dir, "log"), func(err error) { n.t.Error(err) })
	check(err)
	n.snaps, err = raftlog.OpenSnapshots(n.log)
	check(err)
	n.fsm = &machine{}
	cfg := raft.DefaultConfig()
	cfg.LocalID = raft.ServerID(n.id)
	cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout, cfg.CommitTimeout = 300*time.Millisecond, 300*time.Millisecond, 300*time.Millisecond, 10*time.Millisecond
	if n.slow {
		cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout = 10*time.Minute, 10*time.Minute, 10*time.Minute
	}
	if n.quiet {
		cfg.CommitTimeout = 10 * time.Minute
	}
	cfg.SnapshotThreshold, cfg.SnapshotInterval, cfg.TrailingLogs = math.MaxUint64, 1000*time.Hour, 0
	cfg.Logger = hclog.NewNullLogger()
	n.trans = n.peers.Open(Group{ID: 1, Log: n.log,
		Term: func() (uint64, bool) {
			if r := n.raft.Load(); r != nil {
				return r.CurrentTerm(), true
			}
			return 0, false
		},
		Leader: func() string {
			if r := n.raft.Load(); r != nil {
				_, id := r.LeaderWithID()
				return string(id)
			}
			return ""
		},
		Rank:      func() int { return int(n.id[0] - '1') },
		Installed: func(index, _ uint64) uint64 { return index },
		Install: func(index, term, installed uint64, hand func() error) (bool, error) {
			n.snapMu.Lock()
			defer n.snapMu.Unlock()
			n.snaps.ExpectInstall(index, term, installed, func() uint64 { return n.raft.Load().AppliedIndex() })
			err := hand()
			return n.snaps.InstallRefused(), err
		}})
	if first != nil {
		has, err := raft.HasExistingState(n.log, n.stable, n.snaps.All())
		check(err)
		if !has {
			check(raft.BootstrapCluster(cfg, n.log, n.stable, n.snaps.All(), n.trans, raft.Configuration{Servers: first}))
		}
	}
	r, err := raft.NewRaft(cfg, n.fsm, n.log, n.stable, n.snaps.Store(), n.trans)
	check(err)
	n.raft.Store(r)
}

func (n *node) dial(ctx context.Context, addr string) (net.Conn, error) {
	if n.fails.Add(-1) >= 0 {
		return nil, errors.New("no connection today")
	}
	return n.net.dialer(n.id)(ctx, addr)
}

// stop ends the node as a crash would, as far as others can see.
func (n *node) stop() {
	r := n.raft.Swap(nil)
	if r == nil {
		return
	}
	_ = n.trans.Close()
	_ = n.peers.Close()
	if err := r.Shutdown().Error(); err != nil {
		n.t.Error(err)
	}
	_ = n.log.Close()
	_ = n.stable.Close()
}

func (n *node) leads() bool {
	r := n.raft.Load()
	return r != nil && r.State() == raft.Leader
}

type cluster struct {
	t     testing.TB
	net   *network
	nodes []*node
	first []raft.Server
}

func newCluster(t testing.TB, size int, slow bool) *cluster {
	t.Helper()
	c := newClusterOf(t, size, func(n *node) { n.slow = slow })
	if slow {
		c.elect()
	}
	return c
}

// elect makes a cluster whose timers do not run out elect a leader: the first of the nodes whose logs are the longest, as no other can win. A vote may be lost on a busy machine: then it
// stands again, which no timer would make it do.
func (c *cluster) elect() (lead *node) {
	c.t.Helper()
	var stood time.Time
	eventually(c.t, "a node to be elected", func() bool {
		if slices.ContainsFunc(c.nodes, (*node).leads) {
			return true
		}
		// A candidate that was not heard goes on with its election for as long as its timer says, and stands for no other before: whoever follows can end that.
		if n := slices.MaxFunc(c.nodes, func(a, b *node) int {
			return cmp.Or(cmp.Compare(b.candidacy(), a.candidacy()), cmp.Compare(a.last().Term, b.last().Term), cmp.Compare(a.last().Index, b.last().Index))
		}); time.Since(stood) > 2*n.at.vote {
			stood = time.Now()
			n.trans.ElectNow()
		}
		return false
	})
	return c.leader()
}

// candidacy is 1 of a node that stands for election.
func (n *node) candidacy() int {
	if r := n.raft.Load(); r != nil && r.State() == raft.Candidate {
		return 1
	}
	return 0
}

// last is the last entry of the node's log.
func (n *node) last() (e raft.Log) {
	i, err := n.log.LastIndex()
	if err == nil {
		err = n.log.GetLog(i, &e)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	return e
}

// newClusterOf makes nodes as change says and starts them.
func newClusterOf(t testing.TB, size int, change func(*node)) *cluster {
	t.Helper()
	c := &cluster{t: t, net: newNetwork(t)}
	for i := range size {
		n := &node{t: t, net: c.net, id: fmt.Sprintf("%d.%08x", i+1, rand.Uint32()), dir: t.TempDir(), at: defaultTimes()}
		change(n)
		c.nodes = append(c.nodes, n)
		c.first = append(c.first, raft.Server{Suffrage: raft.Voter, ID: raft.ServerID(n.id), Address: raft.ServerAddress(n.id)})
	}
	for _, n := range c.nodes {
		n.start(c.first)
		t.Cleanup(n.stop)
	}
	return c
}

// leader waits for one that a majority follows.
func (c *cluster) leader() (lead *node) {
	c.t.Helper()
	eventually(c.t, "a leader", func() bool {
		for _, n := range c.nodes {
			if n.leads() && n.raft.Load().VerifyLeader().Error() == nil {
				lead = n
				return true
			}
		}
		return false
	})
	return lead
}

func command(term, v uint64, size int) raft.Log {
	payload := bytes.Repeat([]byte{byte(v)}, size)
	h := raftlog.EntryHeader{Term: term, Version: 1}
	if size > 0 {
		h.Place, h.PayloadLen, h.PayloadCRC = raftlog.PlaceInline, uint32(size), crc32.Checksum(payload, castagnoli)
	}
	return raft.Log{Data: fmt.Appendf(raftlog.AppendEntryHeader(nil, h), "%d", v), Extensions: payload}
}

// propose appends v at the node; a payload of size bytes goes with it.
func (n *node) propose(v uint64, size int) error {
	r := n.raft.Load()
	return r.ApplyLog(command(r.CurrentTerm(), v, size), 10*time.Second).Error()
}

// write appends from..to wherever the leader is, one after the other; every value is acknowledged when it returns.
func (c *cluster) write(from, to uint64, size func(uint64) int) {
	c.t.Helper()
	for v := from; v < to; v++ {
		eventually(c.t, fmt.Sprintf("an acknowledgement of %d", v), func() bool {
			for _, n := range c.nodes {
				if n.leads() && n.propose(v, size(v)) == nil {
					return true
				}
			}
			return false
		})
	}
}

// agree waits until every node that runs has applied the same values, all of want among them in order, and compares their logs byte by byte.
func (c *cluster) agree(want uint64) {
	c.t.Helper()
	var all []*node
	for _, n := range c.nodes {
		if n.raft.Load() != nil {
			all = append(all, n)
		}
	}
	var lead *node
	eventually(c.t, "a leader that has applied everything", func() bool {
		lead = c.leader()
		return lead.raft.Load().Barrier(10*time.Second).Error() == nil
	})
	values := lead.fsm.all()
	eventually(c.t, "the same values everywhere", func() bool {
		for _, n := range all {
			if fmt.Sprint(n.fsm.all()) != fmt.Sprint(values) {
				return false
			}
		}
		return true
	})
	next := uint64(0)
	for _, v := range values {
		if v == next { // one whose outcome was unknown may be there twice
			next++
		}
	}
	if next != want {
		c.t.Errorf("%d of %d values are there in order", next, want)
	}
	last, _ := lead.log.LastIndex()
	for i := uint64(1); i <= last; i++ {
		var e raft.Log
		if err := lead.log.GetLog(i, &e); err != nil || e.Type != raft.LogCommand {
			continue
		}
		body, err := lead.log.Payload(i, e.Term)
		if err != nil {
			continue // freed
		}
		for _, n := range all {
			if base, _ := n.log.Base(); i <= base {
				continue
			}
			if p, err := n.log.Payload(i, e.Term); err != nil || !bytes.Equal(p, body) {
				c.t.Errorf("entry %d at %s: %v, %d bytes, the leader has %d", i, n.id, err, len(p), len(body))
			}
		}
	}
}
