package raftmeta

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/estran/estran/tiering/record"
)

// A majority is as full as the fullest voter that it cannot do without.
func TestNeededFree(t *testing.T) {
	const all = math.MaxInt64
	for _, c := range []struct {
		voters int
		others []int64
		want   int64
	}{
		{1, nil, all},
		{3, []int64{10, 500}, 500},   // the full one is not needed
		{3, []int64{10, 20}, 20},     // one of them is
		{3, []int64{10}, 10},         // the other one is dead
		{3, []int64{-7, -9}, -7},     // beyond its budget
		{3, nil, all},                // nobody speaks: nothing is acknowledged anyway
		{5, []int64{1, 2, 3, 4}, 3},  // two beside the leader
		{5, []int64{4, 1, 3}, 3},     // one is dead
		{5, []int64{9}, 9},           // no majority speaks
		{4, []int64{30, 20, 10}, 20}, // three of four
	} {
		if got := neededFree(c.voters, c.others); got != c.want {
			t.Errorf("of %d voters, the others have %v: %d, want %d", c.voters, c.others, got, c.want)
		}
	}
}

// The time is the median of those in contact, of two the lower; without a majority that agrees there is none, whatever one node says.
func TestMedianClock(t *testing.T) {
	at := time.UnixMilli(1_700_000_000_000)
	const day = 24 * time.Hour
	for name, c := range map[string]struct {
		voters int
		own    time.Duration
		others []time.Duration
		store  *time.Duration
		want   time.Duration
		ok     bool
	}{
		"alone":                              {1, 3 * time.Second, nil, nil, 3 * time.Second, true},
		"all agree":                          {3, 2 * time.Second, []time.Duration{0, time.Second}, nil, time.Second, true},
		"own clock far ahead":                {3, 30 * day, []time.Duration{0, time.Second}, nil, time.Second, true},
		"own clock far behind":               {3, -30 * day, []time.Duration{0, time.Second}, nil, 0, true},
		"another far ahead":                  {3, 0, []time.Duration{30 * day, time.Second}, nil, time.Second, true},
		"two in contact, the lower":          {3, time.Minute, []time.Duration{0}, nil, 0, true},
		"two in contact, one is wrong":       {3, 0, []time.Duration{30 * day}, nil, 0, false},
		"nobody in contact":                  {3, 0, nil, nil, 0, false},
		"three that differ":                  {3, 0, []time.Duration{day, -day}, nil, 0, false},
		"five, two wrong":                    {5, 30 * day, []time.Duration{30 * day, 0, 1, 2}, nil, 2, true},
		"five, three wrong in their own way": {5, 30 * day, []time.Duration{-30 * day, 60 * day, 1, 2}, nil, 0, false},
		"the store confirms the lower":       {3, 0, []time.Duration{30 * day}, new(time.Duration), 0, true},
		"the store refutes all":              {3, day, []time.Duration{day, day}, new(time.Duration), 0, false},
	} {
		k := newClock(func() time.Time { return at.Add(c.own) },
			func() (time.Time, bool) {
				if c.store == nil {
					return time.Time{}, false
				}
				return at.Add(*c.store), true
			},
			func() (out []time.Time, voters int) {
				for _, o := range c.others {
					out = append(out, at.Add(o))
				}
				return out, c.voters
			}, slog.New(slog.DiscardHandler))
		want := record.Timestamp(0)
		if c.ok {
			want = record.Timestamp(at.Add(c.want).UnixMilli())
		}
		if got := k.stamp(0); got != want {
			t.Errorf("%s: %d, want %d", name, got, want)
		}
	}
}

// A time that runs ahead of the monotonic one is not stored, also if all voters say so; when they are put right it goes on.
func TestClocksThatJump(t *testing.T) {
	mono := time.Now()
	wall := func(d time.Duration) time.Time { return mono.Round(0).Add(d) }
	shift := time.Duration(0)
	k := newClock(func() time.Time { return mono.Add(time.Minute) }, func() (time.Time, bool) { return time.Time{}, false },
		func() ([]time.Time, int) { return []time.Time{wall(shift + time.Minute), wall(shift + time.Minute)}, 3 }, slog.New(slog.DiscardHandler))
	if k.stamp(0) == 0 || !k.trusted() {
		t.Fatal("not trusted at first")
	}
	shift = 30 * 24 * time.Hour
	if got := k.stamp(0); got != 0 || k.trusted() {
		t.Errorf("30 days in no time: %d", got)
	}
	shift = 0
	if k.stamp(0) == 0 || !k.trusted() {
		t.Error("not trusted after it was put right")
	}
}

// replicated are the replicated clocks of a node's groups.
func replicated(h *Host) (out []record.Timestamp) {
	for _, g := range h.groups() {
		g.mu.RLock()
		out = append(out, g.machine.clock())
		g.mu.RUnlock()
	}
	return out
}

// A node whose clock is wrong by a month moves the time of no group, though it leads: nothing expires early, and nothing for ever.
func TestOneWrongClock(t *testing.T) {
	for _, wrong := range []time.Duration{30 * 24 * time.Hour, -30 * 24 * time.Hour} {
		t.Run(wrong.String(), func(t *testing.T) {
			c := newTrio(t, 3)
			c.change = func(node int, cfg *Config) {
				if node == 0 {
					cfg.Now = func() time.Time { return time.Now().Add(wrong) }
				}
			}
			c.start(0, 1, 2)
			topic := newTopic(t, c.hosts[0], "t", 2)
			h := c.hosts[0]
			until(t, "the first node to lead a shard", func() bool { n, ok := h.Leader(1); return ok && n == 1 })
			for p := range topic.Partitions {
				c.append(record.TopicPartition{Topic: topic.ID, Partition: int32(p)}, batchOf(t, -1, -1, "x"))
			}
			near := func(at record.Timestamp) bool { return time.Since(time.UnixMilli(int64(at))).Abs() < time.Hour }
			until(t, "a time that retention may go by", func() bool { at, ok := h.Clock(1); return ok && near(at) })
			c.append(record.TopicPartition{Topic: topic.ID}, batchOf(t, -1, -1, "y"))
			for _, h := range c.hosts {
				for g, at := range replicated(h) {
					if at != 0 && !near(at) {
						t.Errorf("group %d on node %d is at %s", g, h.NodeID(), time.UnixMilli(int64(at)))
					}
				}
			}
		})
	}
}

// A time that was put back is no time: what it stamped would be as old as the moment in which it was, once it is put right.
func TestClocksThatWerePutBack(t *testing.T) {
	c := newTrio(t, 3)
	var back atomic.Int64
	c.change = func(_ int, cfg *Config) {
		cfg.Now = func() time.Time { return time.Now().Add(-time.Duration(back.Load())) }
	}
	c.start(0, 1, 2)
	topic := newTopic(t, c.hosts[0], "t", 1)
	tp := record.TopicPartition{Topic: topic.ID}
	c.append(tp, batchOf(t, -1, -1, "x"))
	leader := func() *Host {
		for _, h := range c.hosts {
			if n, ok := h.Leader(topic.Partitions[0].Shard); ok && n == h.NodeID() {
				return h
			}
		}
		return nil
	}
	goes := func() bool {
		h := leader()
		if h == nil {
			return false
		}
		_, ok := h.Clock(topic.Partitions[0].Shard)
		return ok
	}
	until(t, "a time that things may expire by", goes)
	back.Store(int64(time.Hour))
	until(t, "the time to be refused", func() bool { return leader() != nil && !goes() })
	c.append(tp, batchOf(t, -1, -1, "y")) // with the followers' answers come their clocks
	if goes() {
		t.Error("an hour back, and things may expire")
	}
	back.Store(int64(100 * time.Millisecond)) // as clocks differ
	until(t, "the time to go on", goes)
}

// While no majority agrees on the time, entries carry none and nothing expires.
func TestClocksThatDisagree(t *testing.T) {
	c := newTrio(t, 3)
	c.change = func(node int, cfg *Config) {
		cfg.Now = func() time.Time { return time.Now().Add(time.Duration(node) * 30 * 24 * time.Hour) }
	}
	c.start(0, 1, 2)
	topic := newTopic(t, c.hosts[0], "t", 2)
	for p := range topic.Partitions {
		for range 20 {
			c.append(record.TopicPartition{Topic: topic.ID, Partition: int32(p)}, batchOf(t, -1, -1, "x"))
		}
	}
	for _, h := range c.hosts {
		for g, at := range replicated(h) {
			if at != 0 {
				t.Errorf("group %d on node %d is at %s", g, h.NodeID(), time.UnixMilli(int64(at)))
			}
		}
		if at, ok := h.Clock(1); ok {
			t.Errorf("node %d would let expire by %s", h.NodeID(), time.UnixMilli(int64(at)))
		}
	}
}

// A voter whose budget is used up stops nothing while a majority has room without it; when it is needed for one, the leader refuses, however much room it has itself.
func TestBudgetsAcrossVoters(t *testing.T) {
	c := newTrio(t, 3)
	c.change = func(node int, cfg *Config) {
		if node == 2 {
			cfg.HotMaxBytes = 1 << 20
		}
	}
	c.start(0, 1, 2)
	tp := record.TopicPartition{Topic: newTopic(t, c.hosts[0], "t", 1).ID}
	shard := c.hosts[0].groupOf(tp).id
	n := 0
	leads := func(i int) bool { return c.hosts[i] != nil && c.hosts[i].shardByID(shard).leads.Load() > 0 }
	write := func() error {
		v := fmt.Sprint(n, strings.Repeat("v", 100_000))
		err := error(ErrNotLeader)
		for i, h := range c.hosts {
			if i == 2 || !leads(i) { // the third refuses by its own budget: that is not what is meant here
				continue
			}
			ch := make(chan []AppendResult, 1)
			h.Append(t.Context(), AppendRequest{Batches: []AppendBatch{{tp, batchOf(t, -1, -1, v)}}}, func(r []AppendResult) { ch <- r })
			if err = (<-ch)[0].Err; err == nil {
				n++
			}
		}
		return err
	}
	until(t, "the third to be full", func() bool { _ = write(); return c.hosts[2].room() < 0 })
	lead := int(c.hosts[0].shardByID(shard).preferred()) - 1 // whoever leads meanwhile gives it back
	if lead == 2 {
		t.Fatalf("node 3 should lead shard %d", shard)
	}
	until(t, "the preferred node to lead, and to know that the third is full", func() bool {
		r, ok := c.hosts[lead].peers.Report(c.hosts[2].identity.serverID(), time.Hour)
		return ok && r.Free < 0 && leads(lead)
	})
	want := n + 10 // a refusal is right while nothing is heard of the other, which a busy machine may cause
	until(t, "records to be taken though one voter is full", func() bool { _ = write(); return n >= want })
	c.stop(1 - lead)
	until(t, "a refusal", func() bool {
		err := write()
		return errors.Is(err, ErrBudget) && strings.Contains(err.Error(), "fullest voter")
	})
	if h := c.hosts[lead]; h.FreeBudget() < h.cfg.HotMaxBytes/2 {
		t.Errorf("the leader has %d bytes left: it refuses for itself", h.FreeBudget())
	}
	decided(t, "records to be deleted", func() error { _, err := c.hosts[lead].DeleteRecords(t.Context(), tp, 1); return err }) // what makes room is always let in
	c.start(1 - lead)
	until(t, "the others to go on without it", func() bool { return write() == nil })
}

// What a census says is asked for with every batch: it must not cost much.
func BenchmarkRoomFor(b *testing.B) {
	c := newTrio(b, 3)
	c.start(0, 1, 2)
	h := c.hosts[0]
	until(b, "a leader", func() bool { _, ok := h.Leader(1); return ok })
	g := h.shardByID(1)
	b.ReportAllocs()
	for b.Loop() {
		if h.roomFor(g) < 0 {
			b.Fatal("full")
		}
	}
}
