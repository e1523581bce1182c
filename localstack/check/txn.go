package check

// graph has an edge from each operation to those that must come after it.
type graph struct{ out [][]int32 }

func (g *graph) edge(a, b int32) {
	if a != b {
		g.out[a] = append(g.out[a], b)
	}
}

// transactions finds reads of a transaction's own writes and cycles of information among transactions: G1c, which is fatal if reads alone make it. Cycles of writes (G0) are
// allowed in Kafka, where transactions interleave.
func (c *checker) transactions() {
	any := false
	for i := range c.ops {
		if c.ops[i].Kind == Txn {
			any = true
			c.ownReads(&c.ops[i])
		}
	}
	if !any {
		return
	}
	ww, wr := c.writeEdges(), c.readEdges()
	process, real := c.processEdges(), c.realtimeEdges()
	if n := cycles(wr); n > 0 {
		c.add("G1c", -1, "%d transactions read from one another in a circle", n)
	}
	for _, v := range []struct {
		name string
		all  []*graph
	}{{"G0", []*graph{ww}}, {"G0-process", []*graph{ww, process}}, {"G0-realtime", []*graph{ww, real}},
		{"G1c-ww", []*graph{ww, wr}}, {"G1c-process", []*graph{ww, wr, process}}, {"G1c-realtime", []*graph{ww, wr, real}}} {
		if n := cycles(v.all...); n > 0 {
			c.Notes[v.name] += n
		}
	}
}

func (c *checker) ownReads(o *Op) {
	for j := range o.Records {
		if r := &o.Records[j]; o.reads(r) && r.Value < uint64(len(c.writes)) && c.writes[r.Value].op >= 0 && &c.ops[c.writes[r.Value].op] == o {
			c.add("precommitted-read", r.Key, "a transaction read its own value %d", r.Value)
		}
	}
}

func (c *checker) writer(v uint64) int32 {
	if v >= uint64(len(c.writes)) {
		return -1
	}
	return c.writes[v].op
}

func (c *checker) writeEdges() *graph {
	g := &graph{make([][]int32, 2*len(c.ops))}
	for _, all := range c.order {
		for i := 1; i < len(all); i++ {
			if a, b := c.writer(all[i-1].value), c.writer(all[i].value); a >= 0 && b >= 0 {
				g.edge(a, b)
			}
		}
	}
	return g
}

func (c *checker) readEdges() *graph {
	g := &graph{make([][]int32, 2*len(c.ops))}
	for i := range c.ops {
		o := &c.ops[i]
		for j := range o.Records {
			if r := &o.Records[j]; o.reads(r) && o.Outcome == OK {
				if w := c.writer(r.Value); w >= 0 {
					g.edge(w, int32(i))
				}
			}
		}
	}
	return g
}

func (c *checker) processEdges() *graph {
	g, last := &graph{make([][]int32, 2*len(c.ops))}, map[int32]int32{}
	for i := range c.ops {
		if before, ok := last[c.ops[i].Process]; ok {
			g.edge(before, int32(i))
		}
		last[c.ops[i].Process] = int32(i)
	}
	return g
}

// realtimeEdges: each end is a node of its own in a chain, so that there are few edges.
func (c *checker) realtimeEdges() *graph {
	g := &graph{make([][]int32, 2*len(c.ops))}
	ends := make([]span, len(c.ops))
	for i := range c.ops {
		ends[i] = span{c.ops[i].End, c.ops[i].End, int64(i)}
	}
	sortByStart(ends)
	next := 0
	node := func(i int) int32 { return int32(len(c.ops) + i) }
	for i := range c.ops { // by their beginning
		for ; next < len(ends) && ends[next].end < c.ops[i].Start; next++ {
			g.edge(int32(ends[next].n), node(next))
			if next > 0 {
				g.edge(node(next-1), node(next))
			}
		}
		if next > 0 {
			g.edge(node(next-1), int32(i))
		}
	}
	return g
}

// cycles counts the operations that lie on circles: Tarjan's components, without recursion.
func cycles(all ...*graph) (members int) {
	n := len(all[0].out)
	number, low, on := make([]int32, n), make([]int32, n), make([]bool, n)
	type frame struct {
		node    int32
		g, edge int
	}
	var stack []int32
	var frames []frame
	count := int32(0)
	enter := func(v int32) {
		count++
		number[v], low[v], on[v] = count, count, true
		stack, frames = append(stack, v), append(frames, frame{node: v})
	}
	for root := range n {
		if number[root] != 0 {
			continue
		}
		for enter(int32(root)); len(frames) > 0; {
			f := &frames[len(frames)-1]
			v := f.node
			if f.g < len(all) {
				if f.edge == len(all[f.g].out[v]) {
					f.g, f.edge = f.g+1, 0
					continue
				}
				w := all[f.g].out[v][f.edge]
				if f.edge++; number[w] == 0 {
					enter(w)
				} else if on[w] {
					low[v] = min(low[v], number[w])
				}
				continue
			}
			if frames = frames[:len(frames)-1]; len(frames) > 0 {
				up := frames[len(frames)-1].node
				low[up] = min(low[up], low[v])
			}
			if low[v] != number[v] {
				continue
			}
			size := 0
			for w := int32(-1); w != v; size++ {
				w = stack[len(stack)-1]
				stack, on[w] = stack[:len(stack)-1], false
			}
			if size > 1 {
				members += size
			}
		}
	}
	return members
}
