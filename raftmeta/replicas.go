package raftmeta

import (
	"slices"

	"github.com/estran/estran/tiering/record"
)

// Replicas are the nodes that have a shard's partitions.
type Replicas struct {
	// Voters begin with the one that should lead; the others follow by their IDs, from there on. A node is there once, also while a new incarnation takes its place.
	Voters []int32
	// InSync are the voters, its leader among them, that are in contact with it within its lease, by ID; none while no leader is known.
	InSync []int32
}

// Replicas returns a shard's.
func (h *Host) Replicas(s record.ShardID) Replicas {
	g := h.shardByID(s)
	if g == nil {
		return Replicas{}
	}
	var r Replicas
	for _, v := range g.voters() {
		if n := nodeOf(v); !slices.Contains(r.Voters, n) {
			r.Voters = append(r.Voters, n)
		}
	}
	slices.Sort(r.Voters)
	if i := slices.Index(r.Voters, g.preferred()); i > 0 {
		r.Voters = append(slices.Clone(r.Voters[i:]), r.Voters[:i]...)
	}
	leader, ok := h.Leader(s)
	if !ok {
		return r
	}
	for _, n := range append(g.inContact(), leader) {
		if slices.Contains(r.Voters, n) && !slices.Contains(r.InSync, n) {
			r.InSync = append(r.InSync, n)
		}
	}
	slices.Sort(r.InSync)
	return r
}

// inContact are the nodes that the group's leader is in contact with, as it sees it or has told lately.
func (g *group) inContact() (nodes []int32) {
	var servers []string
	if g.leads.Load() > 0 {
		servers = g.trans.Contacts()
	} else {
		servers, _ = g.trans.ToldContacts(g.leaderServer())
	}
	for _, s := range servers {
		nodes = append(nodes, nodeOf(s))
	}
	return nodes
}

// Voters is how many nodes the quorum has.
func (h *Host) Voters() int { return len(h.Replicas(1).Voters) }
