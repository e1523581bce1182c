package check

import (
	"cmp"
	"slices"
)

// leaders: a voter that has answered clients of a leader epoch answers none of an earlier one; and none is told that an offset lies behind the end when all below it were acknowledged before it asked.
func (c *checker) leaders() {
	epochs := map[groupKey][]span{}
	ends := c.acknowledgedEnds()
	for i := range c.ops {
		o := &c.ops[i]
		for _, r := range o.Records {
			switch o.Kind {
			case Served:
				if o.Generation < 0 { // it knows none
					continue
				}
				k := groupKey{o.Group, r.Key}
				epochs[k] = append(epochs[k], span{o.Start, o.End, int64(o.Generation)})
			case OutOfRange:
				if end := ends.before(r.Key, o.Start); r.Offset <= end && r.Offset >= c.start[r.Key] {
					c.add("out-of-range", r.Key, "voter %d: offset %d is out of range, the record before offset %d was acknowledged", o.Group, r.Offset, end)
				}
			}
		}
	}
	for k, all := range epochs {
		falls(all, func(a, b span) {
			c.add("epoch-falls", k.key, "voter %d served clients of leader epoch %d, then of %d", k.group, a.n, b.n)
		})
	}
}

// ends are, by key, what was acknowledged: how far at which time.
type ends [][]span

// acknowledgedEnds are in order of time, and rise.
func (c *checker) acknowledgedEnds() ends {
	out := make(ends, len(c.order))
	for i := range c.ops {
		o := &c.ops[i]
		if o.Kind != Send || o.Outcome != OK {
			continue
		}
		for _, r := range o.Records {
			out[r.Key] = append(out[r.Key], span{end: o.End, n: r.Offset + 1})
		}
	}
	for _, all := range out {
		slices.SortStableFunc(all, func(a, b span) int { return cmp.Compare(a.end, b.end) })
		for i := 1; i < len(all); i++ {
			all[i].n = max(all[i].n, all[i-1].n)
		}
	}
	return out
}

// before is how far records of key were acknowledged before time t.
func (e ends) before(key int32, t int64) int64 {
	i, _ := slices.BinarySearchFunc(e[key], t, func(s span, t int64) int { return cmp.Compare(s.end, t) })
	if i == 0 {
		return -1
	}
	return e[key][i-1].n
}
