package peer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// calm makes a cluster without elections but the first: nothing is proposed twice, so every value must be there once. at changes how long things may take.
func calm(t *testing.T, at func(*times)) (c *cluster, lead *node, others []*node) {
	c = newClusterOf(t, 3, func(n *node) {
		n.slow = true
		if at != nil {
			at(&n.at)
		}
	})
	lead = c.elect()
	for _, n := range c.nodes {
		if n != lead {
			others = append(others, n)
		}
	}
	return c, lead, others
}

// once checks that every node has the values below want, each once and in order.
func (c *cluster) once(want uint64) {
	c.t.Helper()
	c.agree(want)
	for _, n := range c.nodes {
		if got := len(n.fsm.all()); got != int(want) {
			c.t.Errorf("%s has %d values, want %d", n.id, got, want)
		}
	}
}

// A peer that is silent holds up no other: entries are acknowledged, questions answered; when it is back it gets what it has missed.
func TestStalledPeer(t *testing.T) {
	c, lead, others := calm(t, nil)
	size := func(uint64) int { return 100_000 }
	c.write(0, 3, size)
	gone, here := others[0], others[1]
	c.net.sever(lead.id, gone.id, true)
	c.net.sever(gone.id, lead.id, true)
	c.write(3, 60, size)
	beat := func(n *node) error {
		h := raft.RPCHeader{ProtocolVersion: 3, ID: []byte(lead.id), Addr: []byte(lead.id)}
		return lead.trans.AppendEntries(raft.ServerID(n.id), raft.ServerAddress(n.id), &raft.AppendEntriesRequest{RPCHeader: h, Term: lead.raft.Load().CurrentTerm()}, new(raft.AppendEntriesResponse))
	}
	eventually(t, "a heartbeat beside a stalled peer", func() bool { return beat(here) == nil })
	eventually(t, "an answer beside a stalled peer", func() bool {
		return len(lead.peers.Standings(t.Context(), 1, []string{gone.id, here.id}, func(s []Standing) bool { return len(s) > 0 })) == 1
	})
	if err := beat(gone); !errors.Is(err, ErrTimeout) && !errors.Is(err, errBroken) {
		t.Errorf("a heartbeat to a stalled peer: %v", err)
	}
	c.net.sever(lead.id, gone.id, false)
	c.net.sever(gone.id, lead.id, false)
	c.once(60)
}

// A connection that breaks at any point of a frame, either way, loses nothing and repeats nothing: the next one goes on.
func TestBrokenFrames(t *testing.T) {
	c, lead, others := calm(t, nil)
	size := func(v uint64) int { return []int{0, 10, 1000, 70_000, 300_000}[v%5] }
	next := uint64(0)
	for _, back := range []bool{false, true} {
		for _, at := range []int{0, 1, frameHeader - 1, frameHeader, frameHeader + 1, 300, 5000, 80_000, chunkMax + frameHeader, 400_000} {
			from, to := lead, others[int(next)%2]
			if back {
				if at > 1000 {
					continue // answers are small
				}
				from, to = to, from
			}
			c.net.limit(from.id, to.id, at, false)
			eventually(t, fmt.Sprintf("the way from %s to %s to break after %d bytes", from.id, to.id, at), func() bool {
				c.write(next, next+1, size)
				next++
				return c.net.used(from.id, to.id)
			})
			c.write(next, next+3, size)
			next += 3
		}
	}
	c.once(next)
}

// A way that is cut within a frame and healed goes on where it was, on the same connection.
func TestCutWithinAFrame(t *testing.T) {
	c, lead, others := calm(t, func(at *times) { at.call, at.body, at.write = time.Hour, time.Hour, time.Hour }) // however long the cut lasts
	size := func(uint64) int { return 200_000 }
	c.write(0, 2, size)
	l := lead.peers.link(others[0].id, classBulk)
	current := func() net.Conn {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.conn
	}
	eventually(t, "a connection", func() bool { return current() != nil })
	before := current()
	c.net.limit(lead.id, others[0].id, 50_000, true)
	next := uint64(2)
	eventually(t, "the cut", func() bool {
		c.write(next, next+1, size)
		next++
		return c.net.used(lead.id, others[0].id)
	})
	c.net.sever(lead.id, others[0].id, false)
	c.write(next, next+3, size)
	c.once(next + 3)
	if current() != before {
		t.Error("the connection was given up")
	}
}

// Over a slow network everything arrives, in order.
func TestSlowNetwork(t *testing.T) {
	c, lead, others := calm(t, nil)
	for _, n := range others {
		c.net.slow(lead.id, n.id, 3*time.Millisecond)
		c.net.slow(n.id, lead.id, 3*time.Millisecond)
	}
	c.write(0, 30, func(v uint64) int { return int(v) * 10_000 })
	c.once(30)
}

// A connection that leads nowhere any more, without either end being told, is given up when a call's time has passed without a word; the next one works.
func TestForgottenConnection(t *testing.T) {
	c, lead, others := calm(t, func(at *times) { at.call = time.Second })
	size := func(uint64) int { return 1000 }
	c.write(0, 5, size)
	for _, n := range others {
		c.net.forget(lead.id, n.id)
	}
	c.write(5, 10, size)
	c.once(10)
}

// silent listens, does the handshake and says nothing more; with deaf it reads nothing either.
func silent(t *testing.T, server string, deaf bool) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(secretConfig(server))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		var open []net.Conn
		for {
			c, err := l.Accept()
			if err != nil {
				for _, c := range open {
					_ = c.Close()
				}
				return
			}
			open = append(open, c)
			if _, _, err := p.receive(c); err == nil && !deaf {
				go func() { _, _ = io.Copy(io.Discard, c) }()
			}
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done; _ = p.Close() })
	return l.Addr().String()
}

// Nothing waits for a peer for ever: every wait has an end, each by itself.
func TestEveryDeadline(t *testing.T) {
	short := 30 * time.Millisecond
	at := func(change func(*times)) *Peers {
		long := times{}
		for _, d := range []*time.Duration{&long.dial, &long.hello, &long.write, &long.body, &long.call, &long.beat, &long.vote, &long.step, &long.restore} {
			*d = time.Hour
		}
		long.redial = time.Millisecond
		change(&long)
		addr := silent(t, "1.aa", false)
		cfg := secretConfig("2.bb")
		cfg.Resolve = func(string) (string, bool) { return addr, true }
		p, err := newPeers(cfg, long)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Close() })
		return p
	}
	group := func(p *Peers) *Transport {
		g := p.Open(Group{ID: 1, Log: noLog{}, Installed: func(uint64, uint64) uint64 { return 0 }})
		t.Cleanup(func() { _ = g.Close() })
		return g
	}
	h := raft.RPCHeader{ID: []byte("2.bb"), Addr: []byte("2.bb")}
	timedOut := func(name string, err error) {
		if !errors.Is(err, ErrTimeout) && !errors.Is(err, errBroken) { // the connection may break first: nothing was heard on it
			t.Errorf("%s: %v", name, err)
		}
	}
	p := at(func(x *times) { x.vote = short })
	timedOut("vote", group(p).RequestVote("", "1.aa", &raft.RequestVoteRequest{RPCHeader: h}, new(raft.RequestVoteResponse)))
	p = at(func(x *times) { x.beat = short })
	timedOut("heartbeat", group(p).AppendEntries("", "1.aa", &raft.AppendEntriesRequest{RPCHeader: h}, new(raft.AppendEntriesResponse)))
	p = at(func(x *times) { x.call = short })
	timedOut("append", group(p).AppendEntries("", "1.aa", &raft.AppendEntriesRequest{RPCHeader: h, PrevLogEntry: 1}, new(raft.AppendEntriesResponse)))
	install := func(p *Peers, size int) error {
		return group(p).InstallSnapshot("", "1.aa", &raft.InstallSnapshotRequest{RPCHeader: h, Size: int64(size)}, new(raft.InstallSnapshotResponse), bytes.NewReader(make([]byte, size)))
	}
	held := &holding{}
	p = at(func(x *times) { x.step = short })
	g := p.Open(Group{ID: 1, Log: held, Installed: func(uint64, uint64) uint64 { return 0 }})
	timedOut("the first piece of a snapshot", g.InstallSnapshot("", "1.aa", &raft.InstallSnapshotRequest{RPCHeader: h, Size: 3 * chunkMax}, new(raft.InstallSnapshotResponse), bytes.NewReader(make([]byte, 3*chunkMax))))
	_ = g.Close()
	if held.n > 0 {
		t.Error("the log is kept for a peer that does not answer: for ever, since raft tries again")
	}
	timedOut("a piece of a snapshot", install(at(func(x *times) { x.step = short }), 2*chunkMax))
	timedOut("a snapshot's last piece", install(at(func(x *times) { x.restore = short }), 10))
	p = at(func(x *times) { x.dial = short })
	p.cfg.Dial = func(ctx context.Context, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	if _, err := p.Ask(t.Context(), "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dialling: %v", err)
	}
	p = at(func(x *times) { x.write = short })
	deaf := silent(t, "1.aa", true)
	p.cfg.Resolve = func(string) (string, bool) { return deaf, true }
	c := &call{kind: kindAppend, group: 1, meta: []byte{0}, bulk: net.Buffers{make([]byte, messageMax-1)}, size: messageMax - 1}
	if _, err := p.link("1.aa", classBulk).ask(c, time.Hour); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("writing to a peer that does not read: %v", err)
	}
}

// holding counts how often the log is to be kept.
type holding struct {
	noLog
	n int
}

func (h *holding) HoldAt(string, uint64, time.Time) { h.n++ }

// noLog is a log about which nothing needs to be known.
type noLog struct{}

func (noLog) Matches(uint64, uint64, uint64, []*raft.Log) bool { return true }
func (noLog) Payload(uint64, uint64) ([]byte, error)           { return nil, nil }
func (noLog) Lengths(*raft.Log) (int, uint32, error)           { return 0, 0, nil }
func (noLog) Base() (uint64, uint64)                           { return 0, 0 }
func (noLog) LastIndex() (uint64, error)                       { return 0, nil }
func (noLog) HoldAt(string, uint64, time.Time)                 {}
func (noLog) Check(*raft.Log, uint32) error                    { return nil }
func (noLog) Lend([]*raft.Log) func()                          { return func() {} }
func (noLog) Stalled() time.Duration                           { return 0 }

// A frame that has begun and does not go on ends the connection; one that has not begun may be waited for.
func TestHalfAFrame(t *testing.T) {
	at := defaultTimes()
	at.body = 300 * time.Millisecond
	_, addr := listening(t, secretConfig("1.aa"), at)
	cfg := secretConfig("2.bb")
	cfg.Resolve = func(string) (string, bool) { return addr, true }
	q, err := newPeers(cfg, defaultTimes())
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	whole := make([]byte, frameHeader)
	(&header{kind: kindTerm, id: 1}).encode(whole)
	vote := make([]byte, frameHeader+5)
	(&header{kind: kindVote, length: 10, total: 10, meta: 10}).encode(vote)
	for name, half := range map[string][]byte{"header": whole[:7], "body": vote} {
		c, err := q.dial("1.aa")
		if err != nil {
			t.Fatal(err)
		}
		if err := q.introduce(c, "1.aa", classBeat); err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		for range 2 { // a whole one is answered, also after a pause
			if _, err := c.Write(whole); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, make([]byte, frameHeader+1)); err != nil {
				t.Fatalf("%s: a whole frame: %v", name, err)
			}
		}
		if _, err := c.Write(half); err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, c); err != nil && !isReset(err) || n > 0 {
			t.Errorf("half a %s: %d bytes, %v", name, n, err)
		}
		_ = c.Close()
	}
}

// Questions to a server whose place another has taken fail at once: it will not come back, and who asks whether it lives must not wait.
func TestReplacedServerIsNotWaitedFor(t *testing.T) {
	long := defaultTimes()
	long.call, long.vote = time.Hour, time.Hour
	_, addr := listening(t, secretConfig("1.new"), long)
	cfg := secretConfig("2.bb")
	cfg.Resolve = func(string) (string, bool) { return addr, true }
	q, err := newPeers(cfg, long)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	if _, err := q.link("1.old", classBeat).ask(&call{kind: kindTerm}, time.Hour); !errors.Is(err, ErrGone) || !errors.Is(err, ErrRefused) {
		t.Errorf("%v", err)
	}
	if got := q.Standings(t.Context(), 0, []string{"1.old"}, func(s []Standing) bool { return len(s) > 0 }); len(got) > 0 {
		t.Errorf("%v", got)
	}
}

// A question to a link that has closed ends once, also if the one who asks is closing too.
func TestAskWhenAllIsClosed(t *testing.T) {
	_, addr := listening(t, secretConfig("1.aa"), defaultTimes())
	cfg := secretConfig("2.bb")
	cfg.Resolve = func(string) (string, bool) { return addr, true }
	p, err := newPeers(cfg, defaultTimes())
	if err != nil {
		t.Fatal(err)
	}
	l := p.link("1.aa", classBeat)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	close(closed)
	for range 100 { // select chooses
		if _, err := l.askUntil(&call{kind: kindAppend, group: 1}, time.Hour, closed); !errors.Is(err, ErrClosed) {
			t.Fatal(err)
		}
	}
}
