package raftmeta

import (
	"testing"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// The recent index finds what was dropped last, in order and without a gap, and is bounded.
func TestRecentIndex(t *testing.T) {
	var r recentIndex
	a, b := record.TopicPartition{Partition: 1}, record.TopicPartition{Partition: 2}
	drop := func(tp record.TopicPartition, base, end record.Offset, index state.RaftIndex) {
		r.add([]state.DroppedRef{{TP: tp, Base: base, End: end, Index: index, Term: 7, First: 2, Count: 3}}, 0)
	}
	find := func(tp record.TopicPartition, from record.Offset, most int) []state.HotRef {
		return r.find(tp, from, most, nil)
	}
	drop(a, 0, 10, 1)
	drop(b, 0, 1, 1)
	drop(a, 10, 15, 2)
	if got := find(a, 12, 5); len(got) != 1 || got[0] != (state.HotRef{Index: 2, Term: 7, Base: 10, End: 15, First: 2, Count: 3}) {
		t.Errorf("%+v", got)
	}
	if got := find(a, 3, 5); len(got) != 2 || got[0].End != 10 || got[1].Base != 10 {
		t.Errorf("%+v", got)
	}
	if got := find(a, 0, 1); len(got) != 1 {
		t.Errorf("%+v", got)
	}
	for _, from := range []record.Offset{15, 99} {
		if got := find(a, from, 5); len(got) != 0 {
			t.Errorf("at %d: %+v", from, got)
		}
	}
	drop(a, 20, 30, 3) // a gap
	if len(find(a, 3, 5)) != 0 || len(find(a, 17, 5)) != 0 || len(find(a, 25, 5)) != 1 {
		t.Error("what lies before a gap is found, or what lies behind it is not")
	}
	for i := range record.Offset(recentMax + 100) {
		drop(b, 1+i, 2+i, state.RaftIndex(10+i))
	}
	if len(r.order) != recentMax || len(find(a, 25, 5)) != 0 || len(find(b, 50, 5)) != 0 || len(find(b, recentMax, 500)) != 101 {
		t.Errorf("%d refs; %d %d %d", len(r.order), len(find(a, 25, 5)), len(find(b, 50, 5)), len(find(b, recentMax, 500)))
	}
	total := 0
	for _, l := range r.m {
		total += len(l.refs)
	}
	if total != recentMax {
		t.Errorf("%d refs are held, %d are counted", total, recentMax)
	}
	const freed = 10 + recentMax + 97 // all but the last two
	r.add([]state.DroppedRef{{TP: a, Base: 30, End: 31, Index: freed + 9}}, freed)
	if len(r.order) != 3 || len(find(b, recentMax+99, 500)) != 2 || len(find(b, recentMax+98, 500)) != 0 || len(find(a, 30, 5)) != 1 {
		t.Errorf("%d refs are held of a log of which two entries were left, and one was added", len(r.order))
	}
}
