package raftmeta

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/tiering/record"
)

// What a voter has freed it says, and a position that it does not know the way from gets the state.
func TestFeedOfAVoter(t *testing.T) {
	c := newTrio(t, 1)
	c.start(0)
	topic := newTopic(t, c.hosts[0], "t", 1)
	tp := record.TopicPartition{Topic: topic.ID}
	g := c.hosts[0].groupOf(tp)
	for i := range 5 {
		c.append(tp, batchOf(t, -1, -1, fmt.Sprint(i, strings.Repeat("v", 400_000))))
	}
	mid := func() (p peer.Position) {
		g.mu.RLock()
		defer g.mu.RUnlock()
		return g.machine.position()
	}()
	c.append(tp, batchOf(t, -1, -1, "last"))
	begin := func(from peer.Position) (peer.Start, error) {
		marked := 0
		s, err := g.Begin(from, func(peer.Position) { marked++ })
		if err == nil && marked != 1 {
			t.Errorf("marked %d times", marked)
		}
		return s, err
	}
	if s, err := begin(mid); err != nil || s.State != nil || len(s.Entries) != 1 || s.Entries[0].Prev != mid.Index {
		t.Errorf("from a moment ago: %+v, %v", s, err)
	}
	other := mid
	other.Chain[0] ^= 1
	for name, p := range map[string]peer.Position{"nothing": {}, "another history": other} {
		if s, err := begin(p); err != nil || s.State == nil {
			t.Errorf("from %s: %+v, %v", name, s, err)
		}
	}
	if _, err := begin(peer.Position{Index: mid.Index + 100}); !errors.Is(err, errAhead) {
		t.Errorf("from what is not there yet: %v", err)
	}
	g.mu.RLock()
	ref := g.shard.HotRefs(tp, 0, 1, nil)[0]
	g.mu.RUnlock()
	ask := peer.BytesAsked{Index: uint64(ref.Index), Term: uint64(ref.Term), Place: peer.PlacePayload, Len: 1 << 20}
	if e, err := g.Bytes(ask); err != nil || e.Gone || int(e.Total) < 400_000 || len(e.Bytes) != int(e.Total) {
		t.Errorf("%d of %d bytes, %v", len(e.Bytes), e.Total, err)
	}
	ahead := ask
	ahead.Index += 1000
	if _, err := g.Bytes(ahead); !errors.Is(err, errAhead) {
		t.Errorf("an entry that is not there yet: %v", err)
	}
	if _, err := c.hosts[0].DeleteRecords(t.Context(), tp, -1); err != nil {
		t.Fatal(err)
	}
	until(t, "the log to be freed", func() bool {
		snapshotNow(t, g)
		base, _ := g.log.Base()
		if base <= mid.Index {
			c.append(tp, batchOf(t, -1, -1, strings.Repeat("f", 400_000)))
			_, _ = c.hosts[0].DeleteRecords(t.Context(), tp, -1)
		}
		return base > mid.Index
	})
	e, err := g.Bytes(ask)
	if err != nil || !e.Gone || e.Applied <= ask.Index {
		t.Errorf("a freed entry: %+v, %v", e, err)
	}
	if s, err := begin(mid); err != nil || s.State == nil {
		t.Errorf("from what was freed: %+v, %v", s, err)
	}
}
