package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/hashicorp/raft"
)

// Status is the cluster as one node sees it.
type Status struct {
	ClusterID    string         `json:"cluster_id"`
	Node         int32          `json:"node"` // who tells
	Shards       uint32         `json:"shards"`
	FeatureLevel uint32         `json:"feature_level"`
	Topics       int            `json:"topics"`
	Members      []MemberStatus `json:"members"`
	Groups       []GroupStatus  `json:"groups"`
}

// What a node is to the cluster.
const (
	StateVoter   = "voter"   // a voter of every group
	StateJoining = "joining" // a member that does not vote everywhere yet
	StateWaiting = "waiting" // registered, not yet added
	StateLeaving = "leaving" // removed, but still a voter somewhere
	StateLeft    = "left"
)

// MemberStatus is a node that is a member, waits to be added, or goes.
type MemberStatus struct {
	ID       int32    `json:"id"`
	Kafka    string   `json:"kafka"`
	Peer     string   `json:"peer"`
	Rack     string   `json:"rack,omitempty"`
	Server   string   `json:"server"` // ID and incarnation
	State    string   `json:"state"`
	Draining bool     `json:"draining,omitempty"`
	Answers  bool     `json:"answers"` // it answered a question just now
	Leads    []string `json:"leads"`   // names of groups
}

// GroupStatus is a Raft group.
type GroupStatus struct {
	Name    string         `json:"name"`   // meta, shard-1, …
	Leader  int32          `json:"leader"` // 0 = not known
	Term    uint64         `json:"term"`
	Commit  uint64         `json:"commit"`
	Servers []ServerStatus `json:"servers"`
	// Prefer is the node that an operator chose to lead; 0 = none.
	Prefer int32 `json:"prefer,omitempty"`
}

// ServerStatus is a server of a group's configuration.
type ServerStatus struct {
	Node    int32  `json:"node"`
	Server  string `json:"server"`
	Voter   bool   `json:"voter"`
	Answers bool   `json:"answers"`
	Last    uint64 `json:"last"` // its last log index, if it answers
}

// statusTime bounds the questions that a status asks other nodes.
const statusTime = time.Second

func (g *group) name() string {
	if g.id == 0 {
		return "meta"
	}
	return fmt.Sprintf("shard-%d", g.id)
}

// GroupNamed is the group of a name as Status gives it.
func (h *Host) GroupNamed(name string) (record.ShardID, bool) {
	for _, g := range h.groups() {
		if g.name() == name {
			return g.id, true
		}
	}
	return 0, false
}

// Status describes the cluster; it asks every server of every group where it is, for at most statusTime.
func (h *Host) Status(ctx context.Context) Status {
	ctx, cancel := context.WithTimeout(ctx, statusTime)
	defer cancel()
	c := h.Cluster()
	groups := h.groups()
	out := Status{ClusterID: h.ClusterID(), Node: h.cfg.NodeID, Shards: c.Shards, FeatureLevel: c.FeatureLevel(), Topics: c.TopicCount(), Groups: make([]GroupStatus, len(groups))}
	var wg sync.WaitGroup
	for i, g := range groups {
		wg.Go(func() {
			out.Groups[i] = g.status(ctx)
			out.Groups[i].Prefer = c.Preferred(g.id)
		})
	}
	wg.Wait()
	for _, n := range c.Registered() {
		out.Members = append(out.Members, memberStatus(c, n, out.Groups))
	}
	return out
}

func (g *group) status(ctx context.Context) GroupStatus {
	s := GroupStatus{Name: g.name(), Leader: nodeOf(g.leaderServer()), Term: g.raft.CurrentTerm(), Commit: g.raft.CommitIndex()}
	servers := g.servers()
	s.Servers = make([]ServerStatus, len(servers))
	var wg sync.WaitGroup
	for i, x := range servers {
		s.Servers[i] = ServerStatus{Node: nodeOf(string(x.ID)), Server: string(x.ID), Voter: x.Suffrage == raft.Voter}
		if string(x.ID) == g.host.identity.serverID() {
			s.Servers[i].Answers, s.Servers[i].Last = true, g.raft.LastIndex()
			continue
		}
		wg.Go(func() {
			got := g.host.peers.Standings(ctx, uint32(g.id), []string{string(x.ID)}, func(a []peer.Standing) bool { return len(a) > 0 })
			if len(got) == 1 {
				s.Servers[i].Answers, s.Servers[i].Last = true, got[0].LastIndex
			}
		})
	}
	wg.Wait()
	return s
}

func memberStatus(c *state.Cluster, n state.Node, groups []GroupStatus) MemberStatus {
	m := MemberStatus{ID: n.ID, Kafka: fmt.Sprintf("%s:%d", n.Host, n.Port), Peer: n.Peer, Rack: n.Rack, Server: string(serverOf(n)), Draining: c.Draining(n.ID), Leads: []string{}}
	votes, there := 0, 0
	for _, g := range groups {
		if g.Leader == n.ID {
			m.Leads = append(m.Leads, g.Name)
		}
		voter := false
		for _, s := range g.Servers {
			if s.Node == n.ID {
				there++
				voter = voter || s.Voter && s.Server == m.Server
				m.Answers = m.Answers || s.Answers && s.Server == m.Server
			}
		}
		if voter {
			votes++
		}
	}
	switch {
	case c.Member(n.ID) && votes == len(groups) && len(groups) == int(c.Shards)+1:
		m.State = StateVoter
	case c.Member(n.ID):
		m.State = StateJoining
	case there > 0:
		m.State = StateLeaving
	case n.Left:
		m.State = StateLeft
	default:
		m.State = StateWaiting
	}
	return m
}

// AddMember makes a registered node a voter of every group; it returns when that is decided, not when it has happened. Peer, unless "", must be where the node says that it is.
// ErrNotFound: no such node has registered.
func (h *Host) AddMember(ctx context.Context, id int32, peer string) error {
	n, ok := h.Cluster().Node(id)
	switch {
	case !ok || n.Left:
		return fmt.Errorf("%w: no node %d has announced itself", ErrNotFound, id)
	case peer != "" && peer != n.Peer:
		return fmt.Errorf("%w: node %d says that it is at %s, not %s", ErrInvalid, id, n.Peer, peer)
	}
	return h.decideMeta(ctx, state.AlterMembers{Add: []int32{id}})
}

// ErrMajority: too few nodes would be left that answer.
var ErrMajority = fmt.Errorf("%w: the last majority is not removed", ErrInvalid)

// RemoveMember takes a member out of every group; it returns when that is decided, not when it has happened. It is refused with ErrMajority if without the node fewer than a majority of
// the members answer.
func (h *Host) RemoveMember(ctx context.Context, id int32) error {
	c := h.Cluster()
	if !c.Member(id) {
		return fmt.Errorf("%w: node %d is no member", ErrNotFound, id)
	}
	left := slices.DeleteFunc(slices.Clone(c.Members()), func(m int32) bool { return m == id })
	var gone []string
	for _, m := range h.Status(ctx).Members {
		if slices.Contains(left, m.ID) && !m.Answers {
			gone = append(gone, fmt.Sprint(m.ID))
		}
	}
	if len(left)-len(gone) < len(left)/2+1 {
		if len(left) == 0 {
			return fmt.Errorf("%w: node %d is the only member", ErrMajority, id)
		}
		return fmt.Errorf("%w: of the members %v that would be left, %s does not answer", ErrMajority, left, strings.Join(gone, ", "))
	}
	if err := h.decideMeta(ctx, state.AlterMembers{Remove: []int32{id}}); !errors.Is(err, ErrNotFound) {
		return err
	}
	return nil // it was a member: the command has been given twice, or somebody else's came first
}

// DrainNode makes a member give up leading, or lead again. A restart of the node ends it too.
func (h *Host) DrainNode(ctx context.Context, id int32, on bool) error {
	return h.decideMeta(ctx, state.Drain{Node: id, On: on})
}

// PreferLeader makes a member lead a group, as long as it can; node 0 leaves it to the spreading again.
func (h *Host) PreferLeader(ctx context.Context, group record.ShardID, node int32) error {
	return h.decideMeta(ctx, state.PreferLeader{Group: group, Node: node})
}

// decideMeta commits what says how the cluster should be: twice is the same as once.
func (h *Host) decideMeta(ctx context.Context, c state.Command) error {
	r, err := h.insist(ctx, c)
	if err != nil {
		return err
	}
	if r.Code == state.NotFound {
		return ErrNotFound
	}
	return code(r.Code)
}
