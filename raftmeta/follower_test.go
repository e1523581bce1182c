package raftmeta

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func (c *trio) addrs() (out []string) {
	for _, v := range c.voters {
		out = append(out, v.Addr)
	}
	return out
}

// follow opens a follower of the trio.
func (c *trio) follow(change func(*FollowerConfig)) *Follower {
	c.t.Helper()
	cfg := FollowerConfig{NodeID: 1000, Cluster: c.addrs(), Secret: []byte("s"), Payload: true, OnFatal: func(err error) { c.t.Errorf("follower: fatal: %v", err) }}
	if change != nil {
		change(&cfg)
	}
	ctx, cancel := context.WithTimeout(context.Background(), waitMost)
	defer cancel()
	f, err := OpenFollower(ctx, cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = f.Close() })
	return f
}

// bytesOf is a state as a snapshot.
func bytesOf(t testing.TB, f io.WriterTo) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := f.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// same waits until the follower has what the hosts have, and compares the states' bytes: at an equal index with an equal chain hash they are the same.
func (c *trio) same(f *Follower) {
	c.t.Helper()
	for _, h := range c.alive() {
		for _, g := range h.groups() {
			m := f.meta
			if g.id != 0 {
				m = f.shardByID(g.id)
			}
			until(c.t, fmt.Sprintf("the follower to be where node %d is in group %d", h.NodeID(), g.id), func() bool {
				g.mu.Lock()
				defer g.mu.Unlock()
				m.mu.Lock()
				defer m.mu.Unlock()
				at := m.positionLocked()
				if g.machine.position().Index != at.Index {
					return false
				}
				if g.machine.position() != at {
					c.t.Errorf("group %d at index %d: another chain hash than node %d", g.id, at.Index, h.NodeID())
				}
				mine := io.WriterTo(nil)
				if m.meta != nil {
					x := m.meta.Freeze()
					mine = &x
				} else {
					x := m.shard.Freeze()
					mine = &x
				}
				if !bytes.Equal(bytesOf(c.t, mine), bytesOf(c.t, g.machine.freeze())) {
					c.t.Errorf("group %d at index %d: another state than node %d", g.id, at.Index, h.NodeID())
				}
				return true
			})
		}
	}
}

// valuesAt reads a partition's records at a follower, as far as it says that they are visible.
func valuesAt(t testing.TB, f *Follower, tp record.TopicPartition, from record.Offset) (out []string) {
	t.Helper()
	var info state.PartitionInfo
	until(t, "the follower to serve the partition", func() (ok bool) {
		var err error
		info, err = f.Partition(tp)
		return err == nil
	})
	for from < info.HighWatermark {
		ctx, cancel := context.WithTimeout(t.Context(), waitMost)
		res, err := f.ReadHot(ctx, tp, from, tiering.Limits{MaxBytes: 100_000, AtLeastOne: true, UpTo: info.HighWatermark})
		cancel()
		if err != nil {
			t.Fatalf("at %d: %v", from, err)
		}
		if res.Next == from { // nobody who has it was there
			continue
		}
		for data := bytes.Join(res.Buffers, nil); len(data) > 0; {
			b, rest, err := record.Next(data)
			if err != nil || b.CheckCRC() != nil {
				t.Fatal(err)
			}
			if err := record.Each(b, 0, func(o record.Offset, r *record.Record) bool {
				if o >= from {
					if o != from {
						t.Fatalf("offset %d where %d is due", o, from)
					}
					out, from = append(out, string(r.Value)), from+1
				}
				return true
			}); err != nil {
				t.Fatal(err)
			}
			data = rest
		}
		res.Release()
	}
	return out
}

// Followers have every group's state, byte for byte, and its records, while voters are restarted one after the other; one that comes late too, and one that gets headers only.
func TestFollower(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	f := c.follow(nil)
	bare := c.follow(func(cfg *FollowerConfig) { cfg.NodeID, cfg.Payload = 1001, false })
	tp := record.TopicPartition{Topic: newTopic(t, c.hosts[0], "t", 1).ID}
	var want []string
	write := func(n int) {
		for range n {
			v := fmt.Sprint(len(want), strings.Repeat("v", 5000))
			c.append(tp, batchOf(t, 7, record.Sequence(len(want)), v))
			want = append(want, v)
		}
	}
	write(50)
	for i := range 3 {
		c.stop(i)
		write(20)
		c.start(i)
		write(20)
	}
	late := c.follow(func(cfg *FollowerConfig) { cfg.NodeID = 1002 })
	for i, x := range []*Follower{f, bare, late} {
		c.same(x)
		if got := valuesAt(t, x, tp, 0); !slices.Equal(got, want) {
			t.Errorf("follower %d has %d records, want %d", i, len(got), len(want))
		}
	}
	if n := testutil.ToFloat64(f.m.resyncs); n != 0 {
		t.Errorf("%v feeds did not continue the state", n)
	}
	if n := testutil.ToFloat64(f.m.states); n > 6 { // one for each of three groups, and what a voter that was behind cannot continue
		t.Errorf("%v states for three groups: followers that change their voter should go on", n)
	}
	m := bare.mirrorOf(tp)
	if m.ring.bytes > m.ring.limit || m.far.bytes > m.far.limit {
		t.Errorf("%d and %d bytes in memory", m.ring.bytes, m.far.bytes)
	}
}

// What a follower shows a reader is never above what was acknowledged to be committed, is never another record, and never goes back; what is acknowledged before a proof is there after it.
func TestFollowerUnderFaults(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	topic := newTopic(t, c.hosts[0], "t", 1)
	tp := record.TopicPartition{Topic: topic.ID}
	f := c.follow(func(cfg *FollowerConfig) { cfg.RingBytes = 1 << 20 })
	var acked, begun atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		high := record.Offset(0)
		for {
			select {
			case <-stop:
				return
			default:
			}
			before := acked.Load()
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			err := f.Prove(ctx, topic.Partitions[0].Shard)
			cancel()
			info, perr := f.Partition(tp)
			if perr != nil {
				continue
			}
			if err == nil && int64(info.HighWatermark) < before {
				t.Errorf("%d records were acknowledged, proven, and %d are visible", before, info.HighWatermark)
			}
			if most := begun.Load(); int64(info.HighWatermark) > most || info.HighWatermark < high {
				t.Errorf("high watermark %d: %d before, %d records were begun", info.HighWatermark, high, most)
			}
			high = info.HighWatermark
		}
	})
	var want []string
	write := func(n int) {
		for range n {
			v := fmt.Sprint(len(want), strings.Repeat("v", 20_000))
			begun.Add(1)
			c.append(tp, batchOf(t, 7, record.Sequence(len(want)), v))
			want = append(want, v)
			acked.Add(1)
		}
	}
	write(10)
	for i := range 6 {
		h := c.alive()[0]
		switch i % 3 {
		case 0: // leadership goes
			for _, x := range c.alive() {
				x.HandOver()
			}
		case 1: // a voter goes and comes back
			n := int(h.NodeID()) - 1
			c.stop(n)
			write(10)
			c.start(n)
		case 2: // feeds end as when a snapshot is installed
			for _, x := range c.alive() {
				for _, g := range x.groups() {
					g.mu.Lock()
					g.pub.Reset()
					g.mu.Unlock()
				}
			}
		}
		write(10)
	}
	close(stop)
	wg.Wait()
	c.same(f)
	if got := valuesAt(t, f, tp, 0); !slices.Equal(got, want) {
		t.Errorf("%d records, want %d", len(got), len(want))
	}
}

// A voter that is cut off goes on feeding what it has; its follower, which cannot reach the others, stops serving, and serves again when it can.
func TestStaleFollowerServesNothing(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	topic := newTopic(t, c.hosts[0], "t", 1)
	tp := record.TopicPartition{Topic: topic.ID}
	c.append(tp, batchOf(t, -1, -1, "a"))
	var only atomic.Pointer[string]
	f := c.follow(func(cfg *FollowerConfig) {
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			return gated{conn, addr, &only}, err
		}
	})
	until(t, "the follower to serve", func() bool { _, err := f.Partition(tp); return err == nil })
	follower := -1
	until(t, "a voter that does not lead the shard", func() bool {
		l, ok := c.hosts[0].Leader(topic.Partitions[0].Shard)
		for i := range c.voters {
			if ok && int32(i+1) != l {
				follower = i
			}
		}
		return follower >= 0
	})
	only.Store(&c.voters[follower].Addr)
	until(t, "the follower to be stale", func() bool { _, err := f.Partition(tp); return errors.Is(err, ErrNotLeader) })
	if f.Ready() {
		t.Error("a stale follower is ready")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := f.Prove(ctx, topic.Partitions[0].Shard); err == nil {
		t.Error("a proof without the leader")
	}
	c.append(tp, batchOf(t, -1, -1, "b"))
	only.Store(nil)
	until(t, "the follower to serve again", func() bool { info, err := f.Partition(tp); return err == nil && info.HighWatermark == 2 })
	if got := valuesAt(t, f, tp, 0); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("%q", got)
	}
}

// gated fails whatever goes to other addresses than the one, while there is one.
type gated struct {
	net.Conn
	addr string
	only *atomic.Pointer[string]
}

func (g gated) Write(b []byte) (int, error) {
	if only := g.only.Load(); only != nil && *only != g.addr {
		return 0, errors.Join(errors.New("cut off"), g.Conn.Close())
	}
	return g.Conn.Write(b)
}

func (g gated) Read(b []byte) (int, error) {
	n, err := g.Conn.Read(b)
	if only := g.only.Load(); only != nil && *only != g.addr {
		return 0, errors.Join(errors.New("cut off"), g.Conn.Close())
	}
	return n, err
}

// The voter that a follower follows is away for longer than the others keep their log, and comes back with a snapshot: the follower, which reaches no other, is never sent back, and has in the
// end what all have.
func TestFollowedVoterGetsASnapshot(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	topic := newTopic(t, c.hosts[0], "t", 1)
	tp, shard := record.TopicPartition{Topic: topic.ID}, topic.Partitions[0].Shard
	var want []string
	write := func(n int) {
		for range n {
			v := fmt.Sprint(len(want), strings.Repeat("v", 100_000))
			c.append(tp, batchOf(t, 7, record.Sequence(len(want)), v))
			want = append(want, v)
		}
	}
	write(5)
	var only atomic.Pointer[string]
	f := c.follow(func(cfg *FollowerConfig) {
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			return gated{conn, addr, &only}, err
		}
	})
	m := f.shardByID(shard)
	high := atomic.Int64{} // what was visible must stay
	stop := f.Watch([]record.TopicPartition{tp}, func() {
		info, err := m.partition(tp)
		if before := high.Swap(int64(info.HighWatermark)); err != nil || before > int64(info.HighWatermark) {
			t.Errorf("%v, and from %d back to %d", err, before, info.HighWatermark)
		}
	})
	defer stop()
	only.Store(&c.voters[2].Addr)
	c.stop(2)
	write(30)
	until(t, "the records to be deleted", func() bool { // what is hot cannot be freed
		return slices.ContainsFunc(c.alive(), func(h *Host) bool {
			_, err := h.DeleteRecords(t.Context(), tp, 35)
			return err == nil
		})
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
	until(t, "the late voter's follower to have all", func() bool {
		info, err := m.partition(tp)
		return err == nil && int(info.HighWatermark) == len(want) && info.LogStart == 35
	})
	if base, _ := c.hosts[2].shardByID(shard).log.Base(); base <= 15 {
		t.Errorf("no snapshot was installed: its log begins behind %d", base)
	}
	only.Store(nil)
	c.same(f)
	if got := valuesAt(t, f, tp, 35); !slices.Equal(got, want[35:]) {
		t.Errorf("%d records, want %d", len(got), len(want)-35)
	}
}

// A second level follows the first: the same states and records, and nothing more at the voters.
func TestSecondLevel(t *testing.T) {
	c := newTrio(t, 1)
	c.start(0)
	topic := newTopic(t, c.hosts[0], "t", 1)
	tp := record.TopicPartition{Topic: topic.ID}
	first := c.follow(func(cfg *FollowerConfig) { cfg.PeerListener = listenAt(t, freeAddr(t)) })
	var want []string
	for i := range 30 {
		want = append(want, fmt.Sprint(i))
		c.append(tp, batchOf(t, -1, -1, want[i]))
	}
	c.same(first)
	reg := prometheus.NewRegistry()
	var voters atomic.Int64
	second := c.follow(func(cfg *FollowerConfig) {
		cfg.NodeID, cfg.Cluster, cfg.Stay, cfg.Registerer = 2000, []string{first.cfg.PeerListener.Addr().String()}, true, reg
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			if addr == c.voters[0].Addr {
				voters.Add(1)
			}
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}
	})
	for i := range 30 {
		want = append(want, fmt.Sprint("more", i))
		c.append(tp, batchOf(t, -1, -1, want[30+i]))
	}
	if err := second.Prove(t.Context(), topic.Partitions[0].Shard); err != nil {
		t.Fatal(err)
	}
	if got := valuesAt(t, second, tp, 0); !slices.Equal(got, want) {
		t.Errorf("%d records, want %d", len(got), len(want))
	}
	c.same(second)
	if n := voters.Load(); n > 0 {
		t.Errorf("%d connections to a voter", n)
	}
}

// A feed that loses, repeats, changes or reorders entries, or sends a state that goes back, changes nothing that is visible.
func TestWrongFeeds(t *testing.T) {
	c := newTrio(t, 1)
	c.start(0)
	topic := newTopic(t, c.hosts[0], "t", 1)
	tp := record.TopicPartition{Topic: topic.ID}
	g := c.hosts[0].groupOf(tp)
	for i := range 10 {
		c.append(tp, batchOf(t, -1, -1, fmt.Sprint(i)))
	}
	f := c.follow(nil)
	whole := f.mirrorOf(tp).position()
	first, ok := g.between(peer.Position{Index: 1}, whole, nil) // the first entry is the configuration
	if !ok || len(first) < 11 {
		t.Fatalf("%d entries", len(first))
	}
	es := first[1:]
	fresh := func() *mirror {
		m := newMirror(f, g.id)
		m.source = g.self
		if err := m.Entry(withPrev(first[0], 0)); err != nil {
			t.Fatal(err)
		}
		for _, e := range es[:3] {
			if err := m.Entry(e); err != nil {
				t.Fatal(err)
			}
		}
		return m
	}
	changed := func(e peer.FeedEntry, change func(*peer.FeedEntry)) peer.FeedEntry {
		e.Data = bytes.Clone(e.Data)
		change(&e)
		return e
	}
	for name, e := range map[string]peer.FeedEntry{
		"lost":          es[4],
		"repeated":      es[2],
		"older":         es[0],
		"another chain": changed(es[3], func(e *peer.FeedEntry) { e.Chain[3] ^= 1 }),
		"another term":  changed(es[3], func(e *peer.FeedEntry) { e.Term++ }),
		"another index": changed(es[3], func(e *peer.FeedEntry) { e.Index++ }),
		"changed":       changed(es[3], func(e *peer.FeedEntry) { e.Data[len(e.Data)-1] ^= 1 }),
		"lost, hidden":  changed(es[4], func(e *peer.FeedEntry) { e.Prev = es[2].Index }),
		"other payload": changed(es[3], func(e *peer.FeedEntry) { e.Payload = []byte("x") }),
	} {
		m := fresh()
		before := m.position()
		state := bytesOf(t, frozenOf(m))
		if err := m.Entry(e); !errors.Is(err, peer.ErrResync) {
			t.Errorf("%s: %v", name, err)
		}
		if m.position() != before || !bytes.Equal(state, bytesOf(t, frozenOf(m))) {
			t.Errorf("%s: the state has changed", name)
		}
		if err := m.Entry(es[3]); err != nil {
			t.Errorf("%s: the right entry afterwards: %v", name, err)
		}
	}
	m := fresh()
	old := bytesOf(t, frozenOf(m))
	oldAt := m.position()
	for _, e := range es[3:] {
		if err := m.Entry(e); err != nil {
			t.Fatal(err)
		}
	}
	if m.position() != whole {
		t.Errorf("at %v, want %v", m.position(), whole)
	}
	if err := m.State(oldAt, bytes.NewReader(old)); !errors.Is(err, peer.ErrResync) || m.position() != whole {
		t.Errorf("a state that goes back: %v", err)
	}
	if err := m.State(whole, bytes.NewReader(old)); !errors.Is(err, peer.ErrResync) || m.position() != whole {
		t.Errorf("a state that is not the one that was announced: %v", err)
	}
	if err := m.Idle(oldAt); !errors.Is(err, peer.ErrResync) {
		t.Errorf("a sender that is elsewhere: %v", err)
	}
}

func withPrev(e peer.FeedEntry, prev uint64) peer.FeedEntry {
	e.Prev = prev
	e.Chain = state.ChainHash([16]byte{}, state.RaftIndex(e.Index), state.Term(e.Term), e.Data)
	return e
}

func frozenOf(m *mirror) io.WriterTo {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.shard.Freeze()
	return &f
}

// A follower that is given damaged bytes by a voter's disk serves none of them: it gets them from another, and nothing if nobody has them whole.
func TestFollowerServesNoDamage(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	topic := newTopic(t, c.hosts[0], "t", 1)
	tp, shard := record.TopicPartition{Topic: topic.ID}, topic.Partitions[0].Shard
	var want []string
	for i := range 4 { // together more than the tail in memory
		want = append(want, "to be damaged "+strings.Repeat(string(rune('a'+i)), 700<<10))
		c.append(tp, batchOf(t, 7, record.Sequence(i), want[i]))
	}
	for _, h := range c.alive() {
		until(t, "every voter to have all", func() bool { i, _ := h.Partition(tp); return i.HighWatermark == 4 })
	}
	harm := func(node int) {
		damage(t, filepath.Join(c.dirs[node], fmt.Sprintf("shard-%d", shard)), []byte(want[0][:40])) // the first record, of which nobody has a copy in memory
	}
	lead := c.leads(shard)
	harm(lead)
	f := c.follow(func(cfg *FollowerConfig) { cfg.Payload = false })
	if got := valuesAt(t, f, tp, 0); !slices.Equal(got, want) {
		t.Errorf("%d records are not those that were written", len(got))
	}
	for i := range c.hosts {
		if i != lead {
			harm(i)
		}
	}
	late := c.follow(func(cfg *FollowerConfig) { cfg.NodeID, cfg.Payload = 1001, false })
	ctx, cancel := context.WithTimeout(t.Context(), waitMost)
	defer cancel()
	m := late.mirrorOf(tp)
	m.mu.RLock()
	ref := m.shard.HotRefs(tp, 0, 1, nil)[0]
	m.mu.RUnlock()
	if err := m.fetchEntry(ctx, uint64(ref.Index), uint64(ref.Term)); !errors.Is(err, errDamaged) {
		t.Errorf("an entry that nobody has whole: %v", err)
	}
	if res, err := late.ReadHot(ctx, tp, 0, tiering.Limits{MaxBytes: 1, AtLeastOne: true, UpTo: 4}); err != nil || res.Bytes > 0 {
		t.Errorf("%d bytes of it, %v", res.Bytes, err)
	}
}
