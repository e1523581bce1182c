package check

import (
	"cmp"
	"fmt"
	"slices"
)

// Options say what a history may be asked.
type Options struct {
	Final         bool  // it ends with readers that read every partition to its end, after all faults
	Transactional bool  // offsets may be missing: markers take some
	Kept          int32 // keys below it lose nothing: nobody deletes records and no retention ends
}

// Anomaly is a rule that a history breaks.
type Anomaly struct {
	Rule, Text string
	Key        int32
}

// Report is what was found. Notes are normal, anomalies are not.
type Report struct {
	Observed  int // records that were sent or read
	Acked     int
	Counts    map[string]int // anomalies by rule
	Notes     map[string]int // what is allowed
	Anomalies []Anomaly      // the first of each rule
}

// kept is how many anomalies of a rule are told.
const kept = 5

func (r *Report) add(rule string, key int32, format string, args ...any) {
	if r.Counts[rule]++; r.Counts[rule] <= kept {
		r.Anomalies = append(r.Anomalies, Anomaly{rule, fmt.Sprintf(format, args...), key})
	}
}

// place is a value at an offset.
type place struct {
	offset int64
	value  uint64
}

// write is what is known of a value.
type write struct {
	op     int32 // that wrote it; -1 = none
	key    int32
	hash   uint32
	read   bool
	first  int32 // index in its key's order; -1 = none
	last   int32
	offset int64 // as acknowledged; -1 = none
}

// checker holds what the rules share.
type checker struct {
	Report
	opt    Options
	ops    []Op
	writes []write   // by value
	order  [][]place // by key: every offset that holds something, ascending
	start  []int64   // by key: the highest log start that anybody was told
	high   []int64   // by key: what is known to exist ends here
}

// Check finds the anomalies of a history. It sorts ops by their beginning.
func Check(ops []Op, opt Options) *Report {
	slices.SortStableFunc(ops, func(a, b Op) int { return cmp.Compare(a.Start, b.Start) })
	c := &checker{Report: Report{Counts: map[string]int{}, Notes: map[string]int{}}, opt: opt, ops: ops}
	c.collect()
	c.versions()
	c.values()
	c.clients()
	c.realtime()
	c.groups()
	c.lookups()
	c.leaders()
	c.transactions()
	return &c.Report
}

// collect finds who wrote what, and the bounds.
func (c *checker) collect() {
	keys, values := int32(0), uint64(0)
	for i := range c.ops {
		o := &c.ops[i]
		for j := range o.Records {
			r := &o.Records[j]
			if keys = max(keys, r.Key+1); o.writes(r) {
				values = max(values, r.Value)
			}
		}
		for _, m := range o.Marks {
			keys = max(keys, m.Key+1)
		}
	}
	c.order, c.start, c.high = make([][]place, keys), make([]int64, keys), make([]int64, keys)
	c.writes = make([]write, values+1)
	for i := range c.writes {
		c.writes[i] = write{op: -1, first: -1, last: -1, offset: -1}
	}
	for i := range c.ops {
		o := &c.ops[i]
		for _, m := range o.Marks {
			c.start[m.Key], c.high[m.Key] = max(c.start[m.Key], m.LogStart), max(c.high[m.Key], m.High)
		}
		for j := range o.Records {
			r := &o.Records[j]
			if !o.writes(r) {
				continue
			}
			c.Observed++
			w := &c.writes[r.Value]
			w.op, w.key, w.hash = int32(i), r.Key, r.Hash
			if o.Outcome == OK {
				c.Acked++
				if w.offset = r.Offset; r.Offset >= 0 {
					c.order[r.Key] = append(c.order[r.Key], place{r.Offset, r.Value})
				}
			}
		}
	}
}

// versions makes the dense order of each key from acknowledged sends and all polls.
func (c *checker) versions() {
	for i := range c.ops {
		o := &c.ops[i]
		for j := range o.Records {
			r := &o.Records[j]
			if !o.reads(r) || o.Outcome == Fail {
				continue
			}
			c.Observed++
			c.judgeRead(o, r)
			c.order[r.Key] = append(c.order[r.Key], place{r.Offset, r.Value})
		}
	}
	for k, all := range c.order {
		slices.SortFunc(all, func(a, b place) int {
			return cmp.Or(cmp.Compare(a.offset, b.offset), cmp.Compare(a.value, b.value))
		})
		all = slices.Compact(all)
		index, dense := int32(-1), all[:0]
		for i, p := range all {
			if i > 0 && p.offset == dense[len(dense)-1].offset {
				c.add("inconsistent-offsets", int32(k), "offset %d holds %d and %d", p.offset, dense[len(dense)-1].value, p.value)
			} else {
				if i > 0 && c.opt.Final && !c.opt.Transactional && p.offset != dense[len(dense)-1].offset+1 && p.offset > c.start[k] {
					c.add("offset-gap", int32(k), "offset %d follows %d", p.offset, dense[len(dense)-1].offset)
				}
				index++
				dense = append(dense, p)
			}
			if p.value == 0 || p.value >= uint64(len(c.writes)) {
				continue
			}
			w := &c.writes[p.value]
			if w.first >= 0 && w.last != index {
				c.add("duplicate", int32(k), "value %d is at offset %d too", p.value, p.offset)
			}
			if w.first < 0 {
				w.first = index
			}
			w.last = index
		}
		c.order[k] = dense
		if len(dense) > 0 {
			c.high[k] = max(c.high[k], dense[len(dense)-1].offset+1)
		}
	}
}

// judgeRead compares a record that was read with what was sent.
func (c *checker) judgeRead(o *Op, r *Record) {
	if r.Value == 0 || r.Value >= uint64(len(c.writes)) || c.writes[r.Value].op < 0 {
		c.add("unsent", r.Key, "offset %d holds what nobody sent", r.Offset)
		return
	}
	w := &c.writes[r.Value]
	w.read = w.read || o.Outcome == OK
	if w.key != r.Key {
		c.add("wrong-key", r.Key, "value %d was sent to key %d", r.Value, w.key)
	}
	if c.ops[w.op].Outcome == Fail && o.Outcome == OK {
		c.add("G1a", r.Key, "value %d at offset %d is of a send that failed", r.Value, r.Offset)
	}
	if w.hash != 0 && r.Hash != 0 && w.hash != r.Hash {
		c.add("content", r.Key, "value %d at offset %d has other bytes than were sent", r.Value, r.Offset)
	}
}

// values finds writes that are gone.
func (c *checker) values() {
	bound := make([]int32, len(c.order))
	for i := range c.writes {
		if w := &c.writes[i]; w.read {
			bound[w.key] = max(bound[w.key], w.first)
		}
	}
	for v := range c.writes {
		w := &c.writes[v]
		if w.op < 0 || w.read || c.ops[w.op].Outcome != OK || w.offset >= 0 && w.offset < c.start[w.key] {
			continue
		}
		if w.last >= 0 && w.last < bound[w.key] {
			c.add("lost-write", w.key, "value %d, acknowledged at offset %d, was read by nobody", v, w.offset)
		} else if c.opt.Final {
			c.add("unseen", w.key, "value %d, acknowledged at offset %d, was not read by the end", v, w.offset)
		}
	}
}

// index of an offset in its key's order.
func (c *checker) index(r *Record) int {
	i, _ := slices.BinarySearchFunc(c.order[r.Key], r.Offset, func(p place, o int64) int { return cmp.Compare(p.offset, o) })
	return i
}

// client is what one process saw last, by key.
type client struct {
	subscribed bool
	polled     []int // index + 1
	sent       []int64
	marks      []Mark
}

// clients judges what each process saw, in its own order.
func (c *checker) clients() {
	all := map[int32]*client{}
	for i := range c.ops {
		o := &c.ops[i]
		p := all[o.Process]
		if p == nil {
			p = &client{polled: make([]int, len(c.order)), sent: make([]int64, len(c.order)), marks: make([]Mark, len(c.order))}
			all[o.Process] = p
		}
		if o.Kind == Assign || o.Kind == Subscribe {
			p.subscribed = o.Kind == Subscribe
			clear(p.polled)
			for j := range o.Records {
				if r := &o.Records[j]; o.Kind == Assign && r.Offset > 0 {
					p.polled[r.Key] = c.index(r) // as if it had read what lies before
				}
			}
		}
		c.marks(p, o)
		if o.Outcome != OK {
			continue
		}
		c.polls(p, o)
		c.sends(p, o)
	}
}

func (c *checker) marks(p *client, o *Op) {
	for _, m := range o.Marks {
		last := &p.marks[m.Key]
		for _, v := range []struct {
			name string
			new  int64
			old  *int64
		}{{"high watermark", m.High, &last.High}, {"last stable offset", m.Stable, &last.Stable}, {"log start", m.LogStart, &last.LogStart}} {
			if v.new >= 0 && v.new < *v.old {
				c.add("watermark-falls", m.Key, "client %d: %s %d after %d", o.Process, v.name, v.new, *v.old)
			}
			*v.old = max(*v.old, v.new)
		}
		if m.Key < c.opt.Kept && m.LogStart > 0 {
			c.add("early-delete", m.Key, "client %d: the log starts at %d, nothing may be gone", o.Process, m.LogStart)
		}
	}
}

func (c *checker) polls(p *client, o *Op) {
	inside := map[int32]bool{}
	for j := range o.Records {
		r := &o.Records[j]
		if !o.reads(r) {
			continue
		}
		prefix, at, before := "", c.index(r), p.polled[r.Key]
		if inside[r.Key] {
			prefix = "int-"
		}
		if before > 0 && (prefix != "" || !p.subscribed) {
			if delta := at - (before - 1); delta < 1 {
				c.add(prefix+"nonmonotonic-poll", r.Key, "client %d read offset %d again", o.Process, r.Offset)
			} else if delta > 1 && c.order[r.Key][at-1].offset >= c.start[r.Key] {
				c.add(prefix+"poll-skip", r.Key, "client %d read offset %d and not %d before it", o.Process, r.Offset, c.order[r.Key][at-1].offset)
			}
		}
		inside[r.Key], p.polled[r.Key] = true, at+1
	}
}

func (c *checker) sends(p *client, o *Op) {
	inside := map[int32]bool{}
	for j := range o.Records {
		r := &o.Records[j]
		if !o.writes(r) || r.Offset < 0 {
			continue
		}
		if before := p.sent[r.Key]; before > r.Offset { // offset + 1
			rule := "nonmonotonic-send"
			if o.Kind == Txn && inside[r.Key] {
				rule = "int-nonmonotonic-send"
			}
			c.add(rule, r.Key, "client %d: offset %d after %d", o.Process, r.Offset, before-1)
		} else if o.Kind == Txn && inside[r.Key] && before < r.Offset {
			c.Notes["int-send-skip"]++
		}
		inside[r.Key], p.sent[r.Key] = true, r.Offset+1
	}
}
