package check

import (
	"cmp"
	"slices"
)

// span is a number that was true at some moment between two times.
type span struct{ start, end, n int64 }

// falls calls f for every span that begins after one with a higher number has ended.
func falls(all []span, f func(before, after span)) {
	sortByStart(all)
	ended := slices.Clone(all)
	slices.SortStableFunc(ended, func(a, b span) int { return cmp.Compare(a.end, b.end) })
	next, top := 0, span{n: -1 << 63}
	for _, s := range all {
		for ; next < len(ended) && ended[next].end < s.start; next++ {
			if ended[next].n > top.n {
				top = ended[next]
			}
		}
		if top.n > s.n {
			f(top, s)
		}
	}
}

// realtime: what was acknowledged before a send began lies below it.
func (c *checker) realtime() {
	sends := make([][]span, len(c.order))
	for i := range c.ops {
		o := &c.ops[i]
		if o.Kind != Send || o.Outcome != OK {
			continue
		}
		for _, r := range o.Records {
			if r.Offset >= 0 {
				sends[r.Key] = append(sends[r.Key], span{o.Start, o.End, r.Offset})
			}
		}
	}
	for k, all := range sends {
		falls(all, func(a, b span) {
			c.add("realtime-send-order", int32(k), "offset %d was acknowledged before the send to offset %d began", a.n, b.n)
		})
	}
}

type groupKey struct{ group, key int32 }

// groups: committed offsets never fall, and never pass what exists; generations never fall.
func (c *checker) groups() {
	offsets, generations := map[groupKey][]span{}, map[int32][]span{}
	for i := range c.ops {
		o := &c.ops[i]
		if o.Outcome != OK || o.Kind == Served || o.Kind == OutOfRange {
			continue
		}
		if o.Generation > 0 {
			generations[o.Group] = append(generations[o.Group], span{o.Start, o.End, int64(o.Generation)})
		}
		for _, r := range o.Records {
			s, k := span{o.Start, o.End, r.Offset}, groupKey{o.Group, r.Key}
			if o.Kind != Commit && o.Kind != Committed {
				continue
			}
			offsets[k] = append(offsets[k], s)
			if r.Offset > c.high[r.Key] {
				c.add("commit-beyond-end", r.Key, "group %d: %d, the partition ends at %d", o.Group, r.Offset, c.high[r.Key])
			}
		}
	}
	for k, all := range offsets {
		falls(all, func(a, b span) {
			c.add("commit-falls", k.key, "group %d: %d after %d", k.group, b.n, a.n)
		})
	}
	for g, all := range generations {
		falls(all, func(a, b span) { c.add("generation-falls", -1, "group %d: %d after %d", g, b.n, a.n) })
	}
}

// lookups: the answer for a timestamp never falls, and a later timestamp is not before an earlier one in one answer.
func (c *checker) lookups() {
	type asked struct {
		key int32
		at  uint64
	}
	all := map[asked][]span{}
	for i := range c.ops {
		o := &c.ops[i]
		if o.Kind != Lookup || o.Outcome != OK {
			continue
		}
		for j, r := range o.Records {
			if r.Offset < 0 {
				continue
			}
			all[asked{r.Key, r.Value}] = append(all[asked{r.Key, r.Value}], span{o.Start, o.End, r.Offset})
			for _, b := range o.Records[:j] {
				if b.Key == r.Key && (b.Value < r.Value && b.Offset > r.Offset || b.Value > r.Value && b.Offset < r.Offset && b.Offset >= 0) {
					c.add("list-offsets", r.Key, "timestamp %d is at %d, %d at %d", b.Value, b.Offset, r.Value, r.Offset)
				}
			}
		}
	}
	for k, spans := range all {
		falls(spans, func(a, b span) { c.add("list-offsets", k.key, "timestamp %d was at %d and is at %d", k.at, a.n, b.n) })
	}
}

func sortByStart(all []span) {
	slices.SortStableFunc(all, func(a, b span) int { return cmp.Compare(a.start, b.start) })
}
