package state

import (
	"cmp"
	"maps"
	"slices"

	"github.com/estran/estran/tiering/record"
)

// nodesMax bounds registered nodes: who knows the cluster's secret can register any number of IDs.
const nodesMax = 64

// shardsMax bounds the shards of a cluster.
const shardsMax = 64

// placement says which nodes should vote and lead. It is never changed in place: readers may keep it.
type placement struct {
	Members  []int32                     `json:",omitempty"` // the nodes that should be voters of every group, in order
	Draining []int32                     `json:",omitempty"` // members that should lead nothing, in order
	Prefer   map[record.ShardID]int32    `json:",omitempty"` // groups whose leader an operator has chosen
	Epoch    uint64                      `json:",omitempty"` // of the last recovery from a lost majority
	Moving   map[uint8]slotMove          `json:",omitempty"` // slots that shards were asked to let go
	Founders map[record.ShardID][]string `json:",omitempty"` // first voters of the shards that were added later
}

func sorted(ids []int32) []int32 {
	out := slices.Clone(ids)
	slices.Sort(out)
	return slices.Compact(out)
}

// Registered returns every node that has registered, member or not, by ID.
func (c *Cluster) Registered() []Node {
	return slices.SortedFunc(maps.Values(c.nodes), func(a, b Node) int { return cmp.Compare(a.ID, b.ID) })
}

// Node returns a registered node.
func (c *Cluster) Node(id int32) (Node, bool) { n, ok := c.nodes[id]; return n, ok }

// Members are the IDs of the nodes that should be voters, in order. A cluster that was made before members were known has all its nodes.
func (c *Cluster) Members() []int32 {
	if c.place.Members != nil {
		return c.place.Members
	}
	return slices.Sorted(maps.Keys(c.nodes))
}

// Member reports whether a node should be a voter.
func (c *Cluster) Member(id int32) bool { return slices.Contains(c.Members(), id) }

// Nodes returns the members that have registered, by ID: what clients see as brokers.
func (c *Cluster) Nodes() (out []Node) {
	for _, id := range c.Members() {
		if n, ok := c.nodes[id]; ok {
			out = append(out, n)
		}
	}
	return out
}

// RecoveryEpoch counts the recoveries from a lost majority.
func (c *Cluster) RecoveryEpoch() uint64 { return c.place.Epoch }

// Draining reports whether a member should lead nothing.
func (c *Cluster) Draining(id int32) bool { return slices.Contains(c.place.Draining, id) }

// Preferred is the node that an operator wants to lead a group; 0 if none.
func (c *Cluster) Preferred(g record.ShardID) int32 { return c.place.Prefer[g] }

// ShardFounders are the server IDs of the first voters of a shard that was added to the cluster; nil for one that it was made with.
func (c *Cluster) ShardFounders(s record.ShardID) []string { return c.place.Founders[s] }

// Leaders is the order in which members should lead a group: the one that an operator chose, then the others, each group beginning with another one, racks taking turns. Who
// drains is not among them, unless all do.
func (c *Cluster) Leaders(g record.ShardID) []int32 {
	order := c.spread(func(id int32) bool { return !c.Draining(id) })
	if len(order) == 0 {
		order = c.spread(func(int32) bool { return true })
	}
	if len(order) == 0 {
		return nil
	}
	first := (int(g) + len(order) - 1) % len(order)
	order = slices.Concat(order[first:], order[:first])
	if i := slices.Index(order, c.Preferred(g)); i > 0 {
		order = slices.Concat(order[i:i+1], order[:i], order[i+1:])
	}
	return order
}

// spread lists members so that neighbours are of different racks, as far as there are any.
func (c *Cluster) spread(take func(int32) bool) (out []int32) {
	racks := map[string][]int32{}
	n := 0
	for _, id := range c.Members() {
		if take(id) {
			r := c.nodes[id].Rack
			racks[r] = append(racks[r], id)
			n++
		}
	}
	names := slices.Sorted(maps.Keys(racks))
	for len(out) < n {
		for _, r := range names {
			if ids := racks[r]; len(ids) > 0 {
				out, racks[r] = append(out, ids[0]), ids[1:]
			}
		}
	}
	return out
}

func (m *Meta) setNode(n Node) {
	m.c.nodes = maps.Clone(m.c.nodes)
	m.c.nodes[n.ID] = n
}

func (m *Meta) registerNode(n Node) Result {
	if _, known := m.c.nodes[n.ID]; !known && len(m.c.nodes) >= nodesMax {
		return Result{Code: Invalid}
	}
	if n.level() < m.c.level {
		return Result{Code: Invalid}
	}
	n.Left = false
	m.setNode(n)
	m.c.place.Draining = without(m.c.place.Draining, n.ID) // it has started anew
	return Result{}
}

// without returns a copy of a list without an ID; nil if nothing is left.
func without(ids []int32, id int32) (out []int32) {
	for _, x := range ids {
		if x != id {
			out = append(out, x)
		}
	}
	return out
}

func (m *Meta) alterMembers(c AlterMembers) Result {
	members := slices.Clone(m.c.Members())
	for _, id := range c.Add {
		n, ok := m.c.nodes[id]
		if !ok || n.Left {
			return Result{Code: NotFound}
		}
		if n.level() < m.c.level {
			return Result{Code: Invalid}
		}
		members = append(members, id)
	}
	for _, id := range c.Remove {
		if !slices.Contains(members, id) {
			return Result{Code: NotFound}
		}
		members = without(members, id)
	}
	if len(members) == 0 {
		return Result{Code: Invalid}
	}
	p := &m.c.place
	p.Members = sorted(members)
	for _, id := range c.Remove {
		if n, ok := m.c.nodes[id]; ok {
			n.Left = true
			m.setNode(n)
		}
		p.Draining = without(p.Draining, id)
		p.Prefer = maps.Clone(p.Prefer)
		maps.DeleteFunc(p.Prefer, func(_ record.ShardID, n int32) bool { return n == id })
	}
	return Result{}
}

// recover forgets every other node: what is left of them belongs to the cluster as it was.
func (m *Meta) recover(c Recover) {
	n, ok := m.c.nodes[c.Node]
	if c.Epoch <= m.c.place.Epoch || !ok {
		return
	}
	m.c.nodes = map[int32]Node{c.Node: n}
	m.c.place = placement{Members: []int32{c.Node}, Epoch: c.Epoch, Moving: m.c.place.Moving, Founders: m.c.place.Founders}
}

func (m *Meta) drain(c Drain) Result {
	if !m.c.Member(c.Node) {
		return Result{Code: NotFound}
	}
	m.c.place.Draining = without(m.c.place.Draining, c.Node)
	if c.On {
		m.c.place.Draining = sorted(append(m.c.place.Draining, c.Node))
	}
	return Result{}
}

func (m *Meta) preferLeader(c PreferLeader) Result {
	if uint32(c.Group) > m.c.Shards || c.Node != 0 && !m.c.Member(c.Node) {
		return Result{Code: NotFound}
	}
	p := map[record.ShardID]int32{}
	maps.Copy(p, m.c.place.Prefer)
	p[c.Group] = c.Node
	if c.Node == 0 {
		delete(p, c.Group)
	}
	m.c.place.Prefer = p
	return Result{}
}

func (m *Meta) forgetNode(c ForgetNode) Result {
	if m.c.Member(c.Node) {
		return Result{Code: Invalid}
	}
	m.c.nodes = maps.Clone(m.c.nodes)
	delete(m.c.nodes, c.Node)
	return Result{}
}

func (m *Meta) addShards(c AddShards) Result {
	if m.c.Shards == 0 || c.Total <= m.c.Shards || c.Total > shardsMax || len(c.Founders) == 0 {
		return Result{Code: Invalid}
	}
	f := map[record.ShardID][]string{}
	maps.Copy(f, m.c.place.Founders)
	first := record.ShardID(m.c.Shards + 1)
	for m.c.Shards < c.Total {
		m.c.Shards++
		s := record.ShardID(m.c.Shards)
		f[s] = slices.Clone(c.Founders)
		m.outboxes[s] = &outbox{First: 1}
		m.tellLevel(s)
	}
	m.c.place.Founders = f
	m.moveSlots(first)
	return Result{}
}
