package peer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// scripted is a source whose state is the concatenation of what was published. It takes the state in the same step in which the subscription begins, as a group does.
type scripted struct {
	pub *Publisher

	mu    sync.Mutex
	at    Position
	state []byte
	early error // what Begin refuses with
	size  int   // of each payload
	reach Reach
}

func newScripted() *scripted { return &scripted{pub: NewPublisher(1)} }

// publish appends n commands, whose indexes have gaps.
func (s *scripted) publish(n, size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for range n {
		e := FeedEntry{Prev: s.at.Index, Index: s.at.Index + 1 + s.at.Index%3, Term: 7}
		e.Data = fmt.Appendf(nil, "%d;", e.Index)
		if size > 0 {
			e.Data = append(bytes.Repeat([]byte{'x'}, size), e.Data...)
		}
		if s.size > 0 {
			e.Payload = bytes.Repeat([]byte{byte(e.Index)}, s.size)
			e.PayloadCRC = crcOf(e.Payload)
		}
		binary.BigEndian.PutUint64(e.Chain[:], binary.BigEndian.Uint64(s.at.Chain[:])*31+e.Index)
		s.at = Position{e.Index, e.Chain}
		s.state = fmt.Appendf(s.state, "%d;", e.Index)
		s.pub.Publish(e)
	}
}

func (s *scripted) position() Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.at
}

func (s *scripted) Publisher() *Publisher { return s.pub }

func (s *scripted) Begin(from Position, mark func(Position)) (Start, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.early != nil {
		return Start{}, s.early
	}
	mark(s.at)
	if from == s.at && from.Index > 0 {
		return Start{}, nil
	}
	return Start{State: bytes.NewBuffer(bytes.Clone(s.state))}, nil
}

func (s *scripted) Reach(context.Context) Reach {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reach
}

func (s *scripted) Bytes(a BytesAsked) (EntryBytes, error) {
	if a.Index == 13 {
		return EntryBytes{}, errors.New("no such entry")
	}
	return EntryBytes{Applied: a.Index, Total: 1 << 20, Bytes: bytes.Repeat([]byte{byte(a.Place)}, int(a.Len))}, nil
}

// collector is a sink that notes what it gets, and whether that was in order.
type collector struct {
	mu       sync.Mutex
	at       Position
	state    []byte
	states   int
	entries  int
	payloads int
	idle     Position
	idles    int
	wrong    error
	gate     chan struct{} // entries wait for it; nil = they do not
}

func (c *collector) State(at Position, r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at, c.state, c.states = at, b, c.states+1
	return nil
}

func (c *collector) Entry(e FeedEntry) error {
	if c.gate != nil {
		<-c.gate
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.Prev != c.at.Index {
		c.wrong = fmt.Errorf("entry %d behind %d, here behind %d", e.Index, e.Prev, c.at.Index)
		return c.wrong
	}
	c.at, c.entries = Position{e.Index, e.Chain}, c.entries+1
	c.state = append(c.state, e.Data[bytes.LastIndexByte(e.Data, 'x')+1:]...)
	if e.Payload != nil {
		c.payloads++
	}
	return nil
}

func (c *collector) Idle(at Position) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle, c.idles = at, c.idles+1
	if at != c.at {
		c.wrong = fmt.Errorf("the sender is idle at %v, the follower at %v", at, c.at)
	}
	return c.wrong
}

func (c *collector) get() (at Position, state string, states, entries, payloads int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at, string(c.state), c.states, c.entries, c.payloads
}

// feeder is a node that feeds group 1 from src.
func feeder(t testing.TB, src Source, at times, change func(*Config)) (p *Peers, addr string) {
	t.Helper()
	cfg := secretConfig("1.aa")
	cfg.Source = func(group uint32) Source {
		if group == 1 {
			return src
		}
		return nil
	}
	if change != nil {
		change(&cfg)
	}
	return listening(t, cfg, at)
}

// followerOf is a node that follows who listens at addr.
func followerOf(t testing.TB, addr, server string, at times) *Peers {
	t.Helper()
	cfg := secretConfig(server)
	cfg.Follower = true
	cfg.Resolve = func(string) (string, bool) { return addr, true }
	p, err := newPeers(cfg, at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// following runs a feed until the test ends, or stop is called, which returns its error.
func following(t testing.TB, p *Peers, from Position, payload bool, sink Sink) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Follow(ctx, "1.aa", 1, from, payload, sink) }()
	var once sync.Once
	var err error
	stop = func() error { once.Do(func() { cancel(); err = <-done }); return err }
	t.Cleanup(func() { _ = stop() })
	return stop
}

// Followers get the state and then every entry once, in order, whenever they come; one that asks for payload gets it, another does not; where it stands a feed says when there is nothing.
func TestFeedInOrder(t *testing.T) {
	src := newScripted()
	src.size = 300_000 // more than a frame
	src.publish(10, 0)
	at := patient()
	at.idle = time.Millisecond
	p, addr := feeder(t, src, at, nil)
	var all []*collector
	for i := range 6 {
		c := &collector{}
		all = append(all, c)
		following(t, followerOf(t, addr, fmt.Sprintf("%d.aa", 1000+i), patient()), Position{}, i%2 == 0, c)
		src.publish(20, i*100)
	}
	for i, c := range all {
		eventually(t, "a follower to have all, and to hear that this is all", func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.at == src.position() && c.idle == c.at || c.wrong != nil
		})
		at, state, states, entries, payloads := c.get()
		if c.wrong != nil || states != 1 || at != src.position() || state != string(src.state) {
			t.Errorf("follower %d: %d states, at %v: %v", i, states, at, c.wrong)
		}
		if want := entries * (1 - i%2); payloads != want {
			t.Errorf("follower %d: %d entries, %d of them with payload, want %d", i, entries, payloads, want)
		}
	}
	for i := range 6 {
		if n := testutil.ToFloat64(p.m.feedBytes.WithLabelValues(fmt.Sprint(1000 + i))); n < 100 {
			t.Errorf("follower %d has got %v bytes", i, n)
		}
	}
	src.pub.mu.Lock()
	defer src.pub.mu.Unlock()
	if len(src.pub.items) != 0 || src.pub.data != 0 || src.pub.payload != 0 {
		t.Errorf("%d entries wait, of %d and %d bytes, though all have them", len(src.pub.items), src.pub.data, src.pub.payload)
	}
}

// A follower that comes back to where its state is goes on from there, without a state.
func TestFeedGoesOn(t *testing.T) {
	src := newScripted()
	src.publish(5, 0)
	_, addr := feeder(t, src, patient(), nil)
	f := followerOf(t, addr, "1000.aa", patient())
	c := &collector{}
	stop := following(t, f, Position{}, false, c)
	eventually(t, "the state", func() bool { at, _, _, _, _ := c.get(); return at == src.position() })
	if err := stop(); !errors.Is(err, context.Canceled) {
		t.Errorf("a feed that was stopped: %v", err)
	}
	eventually(t, "its end to be seen", func() bool { return src.pub.Followers() == 0 })
	at, _, _, _, _ := c.get()
	following(t, f, at, false, c)
	eventually(t, "the feed", func() bool { return src.pub.Followers() == 1 })
	src.publish(5, 0)
	eventually(t, "the rest", func() bool { at, _, _, _, _ := c.get(); return at == src.position() })
	if _, state, states, entries, _ := c.get(); states != 1 || entries != 5 || state != string(src.state) {
		t.Errorf("%d states, %d entries", states, entries)
	}
}

// A follower that takes nothing is cut off when too much waits for it, and holds up neither who publishes nor the others; begun anew it has everything.
func TestSlowFollowerIsCutOff(t *testing.T) {
	src := newScripted()
	at := patient()
	at.write = time.Hour
	p, addr := feeder(t, src, at, nil)
	slow, quick := &collector{gate: make(chan struct{})}, &collector{}
	f := followerOf(t, addr, "1000.aa", patient())
	stop := following(t, f, Position{}, false, slow)
	following(t, followerOf(t, addr, "1001.aa", patient()), Position{}, false, quick)
	eventually(t, "two followers", func() bool { return src.pub.Followers() == 2 })
	for src.pub.Followers() == 2 { // until the sockets' buffers and the queue are full
		src.publish(1, 1<<20)
		eventually(t, "the quick one to have it", func() bool { at, _, _, _, _ := quick.get(); return at == src.position() })
		src.pub.mu.Lock()
		if src.pub.data > feedBytes+2<<20 {
			t.Fatalf("%d bytes wait", src.pub.data)
		}
		src.pub.mu.Unlock()
	}
	close(slow.gate)
	eventually(t, "the slow one's feed to be ended", func() bool { return testutil.ToFloat64(p.m.feedResets.WithLabelValues("slow")) == 1 })
	if err := stop(); err == nil {
		t.Error("the slow follower does not know")
	}
	if slow.wrong != nil {
		t.Error(slow.wrong)
	}
	following(t, f, slow.at, false, slow)
	eventually(t, "the slow one to have all", func() bool { at, _, _, _, _ := slow.get(); return at == src.position() })
	if _, state, _, _, _ := slow.get(); state != string(src.state) {
		t.Error("another state")
	}
}

// What waits is there once, its frames too; payload beyond the limit is given up, the entries are not.
func TestWaitingEntriesAreShared(t *testing.T) {
	src := newScripted()
	src.size = 1 << 20
	a, b := src.pub.subscribe(Position{}, true), src.pub.subscribe(Position{}, true)
	src.publish(2, 0)
	take := func(s *subscription) net.Buffers {
		t.Helper()
		bufs, err := s.take(t.Context(), time.Hour, nil)
		if err != nil {
			t.Fatal(err)
		}
		return bufs
	}
	x, y := take(a), take(b)
	if len(x) == 0 || len(x) != len(y) {
		t.Fatalf("%d and %d buffers", len(x), len(y))
	}
	for i := range x {
		if &x[i][0] != &y[i][0] {
			t.Fatalf("buffer %d was made twice", i)
		}
	}
	take(a) // b has not taken the second
	src.publish(40, 0)
	if src.pub.payload > feedPayload {
		t.Errorf("%d bytes of payload wait", src.pub.payload)
	}
	var wire []byte
	for n := 0; n < 41; {
		for _, f := range take(b) {
			wire = append(wire, f...)
		}
		n = int(b.next) - 1
	}
	r := reading(wire)
	index, with := uint64(1), 0 // it has the first
	for range 41 {
		m, err := r.next()
		if err != nil {
			t.Fatal(err)
		}
		p, err := decodePart(m)
		if err != nil {
			t.Fatal(err)
		}
		e := p.(FeedEntry)
		if e.Prev != index {
			t.Fatalf("entry %d behind %d, want behind %d", e.Index, e.Prev, index)
		}
		if index = e.Index; e.Payload != nil {
			with++
		}
	}
	if index != src.position().Index || with == 0 || with > feedPayload/src.size {
		t.Errorf("up to entry %d, %d of them with payload", index, with)
	}
	a.close()
	b.close()
	if src.publish(3, 0); len(src.pub.items) != 0 {
		t.Errorf("%d entries wait for nobody", len(src.pub.items))
	}
}

// When a state is replaced its followers begin anew.
func TestReplacedStateEndsFeeds(t *testing.T) {
	src := newScripted()
	src.publish(3, 0)
	p, addr := feeder(t, src, patient(), nil)
	c := &collector{}
	f := followerOf(t, addr, "1000.aa", patient())
	done := make(chan error, 1)
	go func() { done <- f.Follow(t.Context(), "1.aa", 1, Position{}, false, c) }()
	eventually(t, "the feed", func() bool { at, _, _, _, _ := c.get(); return at == src.position() && src.pub.Followers() == 1 })
	src.pub.Reset()
	if err := <-done; err == nil || t.Context().Err() != nil {
		t.Errorf("%v", err)
	}
	eventually(t, "it to be counted", func() bool { return testutil.ToFloat64(p.m.feedResets.WithLabelValues("snapshot")) == 1 })
}

// A feed that says nothing is given up: the connection may lead nowhere.
func TestSilentFeedIsGivenUp(t *testing.T) {
	src := newScripted()
	src.publish(3, 0)
	at := patient()
	at.idle = time.Hour
	_, addr := feeder(t, src, at, nil)
	at.dead = 20 * time.Millisecond
	c := &collector{}
	if err := followerOf(t, addr, "1000.aa", at).Follow(t.Context(), "1.aa", 1, Position{}, false, c); err == nil || t.Context().Err() != nil {
		t.Errorf("%v", err)
	}
}

// Who has more than the source is not sent back, and a group that is not there is no feed.
func TestFeedIsRefused(t *testing.T) {
	src := newScripted()
	src.early = errors.New("this node is behind")
	_, addr := feeder(t, src, patient(), nil)
	f := followerOf(t, addr, "1000.aa", patient())
	for group, want := range map[uint32]string{1: "behind", 2: "no group"} {
		err := f.Follow(t.Context(), "1.aa", group, Position{Index: 9}, true, &collector{})
		if !errors.Is(err, ErrRefused) || !bytes.Contains([]byte(err.Error()), []byte(want)) {
			t.Errorf("group %d: %v", group, err)
		}
	}
}

// A follower's questions are answered beside one another.
func TestQuestions(t *testing.T) {
	src := newScripted()
	src.reach = Reach{Proven: true, Index: 40, Leader: "1.aa"}
	_, addr := feeder(t, src, patient(), nil)
	f := followerOf(t, addr, "1000.aa", patient())
	if r, err := f.Reached(t.Context(), "1.aa", 1); err != nil || r != src.reach {
		t.Errorf("%+v, %v", r, err)
	}
	e, err := f.Bytes(t.Context(), "1.aa", 1, BytesAsked{5, 7, PlacePayload, 0, 1 << 30})
	if err != nil || len(e.Bytes) != bytesMax || e.Bytes[0] != byte(PlacePayload) || e.Total != 1<<20 {
		t.Errorf("%d of %d bytes, %v", len(e.Bytes), e.Total, err)
	}
	if _, err := f.Bytes(t.Context(), "1.aa", 1, BytesAsked{Index: 13}); !errors.Is(err, ErrRefused) {
		t.Errorf("an entry that is not there: %v", err)
	}
	if _, err := f.Reached(t.Context(), "1.aa", 2); !errors.Is(err, ErrRefused) {
		t.Errorf("a group that is not there: %v", err)
	}
}

// Each class of connections carries what it is for and nothing else: a follower can neither vote nor append.
func TestFollowersMayOnlyFollow(t *testing.T) {
	reg := prometheus.NewRegistry()
	_, addr := feeder(t, newScripted(), patient(), func(c *Config) {
		c.Registerer = reg
		c.OnForward = func(context.Context, uint32, []byte) ([]byte, error) { t.Error("forwarded"); return nil, nil }
	})
	f := followerOf(t, addr, "1000.aa", patient())
	for _, cl := range []class{classFeed, classQuery, classBulk, classBeat} {
		for k := kindAppend; k <= kindLast; k++ {
			own := cl == classFeed && k == kindFollow || cl == classQuery && (k == kindReach || k == kindBytes) || !cl.follows() && k <= kindForward
			if own {
				continue
			}
			c, err := f.dial("1.aa")
			if err != nil {
				t.Fatal(err)
			}
			if err := f.introduce(c, "1.aa", cl); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, frameHeader)
			(&header{kind: k, group: 1}).encode(b)
			if _, err := c.Write(b); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
			if n, err := io.Copy(io.Discard, c); err != nil && !isReset(err) || n > 0 {
				t.Errorf("%s on %s: the connection stays open: %d bytes, %v", k, cl, n, err)
			}
			_ = c.Close()
		}
	}
}

// A certificate that names `replica` lets its owner follow, and nothing else.
func TestFollowersCertificate(t *testing.T) {
	ca := newAuthority(t)
	src := newScripted()
	src.publish(3, 0)
	_, addr := feeder(t, src, patient(), func(c *Config) { c.Secret, c.TLS = nil, ca.node("one", "node-1") })
	cfg := tlsConfig("1000.aa", ca.node("replica", "replica"))
	cfg.Follower = true
	for cl, want := range map[class]error{classFeed: nil, classQuery: nil, classBulk: ErrRefused, classBeat: ErrRefused} {
		if err := greet(t, cfg, addr, "1.aa", cl, patient()); !errors.Is(err, want) || (err == nil) != (want == nil) {
			t.Errorf("%s: %v, want %v", cl, err, want)
		}
	}
	cfg.Resolve = func(string) (string, bool) { return addr, true }
	f, err := newPeers(cfg, patient())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if w, err := f.Ask(t.Context(), addr); err != nil || w.Server != "1.aa" {
		t.Errorf("%+v, %v", w, err)
	}
	c := &collector{}
	stop := following(t, f, Position{}, true, c)
	src.size = 500_000
	eventually(t, "the feed", func() bool { return src.pub.Followers() == 1 })
	src.publish(20, 1000)
	eventually(t, "all of it", func() bool { at, _, _, _, _ := c.get(); return at == src.position() })
	_ = stop()
	cfg = tlsConfig("3.cc", ca.node("three", "node-2"))
	cfg.Follower = true
	if _, err := newPeers(cfg, patient()); !errors.Is(err, ErrCertificate) {
		t.Errorf("a follower with a node's certificate: %v", err)
	}
}

// A state must be whole, in order and of one position.
func TestPiecesOfAState(t *testing.T) {
	of := Position{Index: 9}
	for name, c := range map[string]struct {
		pieces []any
		want   bool
	}{
		"whole":            {[]any{statePiece{of, 0, false, []byte("ab")}, statePiece{of, 2, true, []byte("c")}}, true},
		"empty end":        {[]any{statePiece{of, 0, false, []byte("abc")}, statePiece{of, 3, true, nil}}, true},
		"one missing":      {[]any{statePiece{of, 0, false, []byte("ab")}, statePiece{of, 3, true, []byte("c")}}, false},
		"one twice":        {[]any{statePiece{of, 0, false, []byte("ab")}, statePiece{of, 0, false, []byte("ab")}, statePiece{of, 2, true, []byte("c")}}, false},
		"another state":    {[]any{statePiece{of, 0, false, []byte("ab")}, statePiece{Position{Index: 10}, 2, true, []byte("c")}}, false},
		"an entry":         {[]any{statePiece{of, 0, false, []byte("ab")}, FeedEntry{Index: 10}}, false},
		"an end too early": {[]any{statePiece{of, 0, false, []byte("ab")}}, false},
	} {
		left := c.pieces
		r := &stateReader{of: of, next: func() (any, error) {
			if len(left) == 0 {
				return nil, io.ErrUnexpectedEOF
			}
			x := left[0]
			left = left[1:]
			return x, nil
		}}
		b, err := io.ReadAll(r)
		if (err == nil) != c.want || c.want && string(b) != "abc" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}
