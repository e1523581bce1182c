package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/hashicorp/raft"
)

// Whatever the servers are, and whatever happens to nodes meanwhile, the changes lead to the members, one server at a time, and never from a majority of voters to another set that
// shares none with it.
func TestChangesConverge(t *testing.T) {
	for seed := range uint64(2000) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		inc := func(id int32) string { return fmt.Sprintf("%c", 'a'+rnd.IntN(3)) }
		var servers []raft.Server
		for id := range int32(1 + rnd.IntN(5)) {
			servers = append(servers, raft.Server{ID: serverOf(state.Node{ID: id + 1, Incarnation: inc(id + 1)})})
		}
		var nodes []state.Node
		for id := range int32(7) {
			if rnd.IntN(2) == 0 {
				nodes = append(nodes, state.Node{ID: id + 1, Incarnation: inc(id + 1)})
			}
		}
		if len(nodes) == 0 {
			continue
		}
		member := func(id int32) bool {
			return slices.ContainsFunc(nodes, func(n state.Node) bool { return n.ID == id })
		}
		for step := 0; ; step++ {
			todo := changes(servers, nodes, member)
			if len(todo) == 0 {
				break
			}
			if step > 50 {
				t.Fatalf("seed %d: %v does not become %v: next %v", seed, servers, nodes, todo)
			}
			c := todo[rnd.IntN(len(todo))] // any of them may be the one that can be taken
			i := slices.IndexFunc(servers, func(s raft.Server) bool { return s.ID == c.server })
			switch c.verb {
			case addNonvoter:
				if i >= 0 {
					t.Fatalf("seed %d: %v is there", seed, c)
				}
				servers = append(servers, raft.Server{ID: c.server, Suffrage: raft.Nonvoter})
			case promote:
				servers[i].Suffrage = raft.Voter
				for _, s := range servers {
					if s.ID != c.server && s.Suffrage == raft.Voter && nodeOf(string(s.ID)) == nodeOf(string(c.server)) {
						t.Fatalf("seed %d: node %d votes twice", seed, nodeOf(string(c.server)))
					}
				}
			case replace, remove:
				servers = slices.Delete(servers, i, i+1)
			}
		}
		if len(servers) != len(nodes) {
			t.Fatalf("seed %d: ended with %v for %v", seed, servers, nodes)
		}
	}
}

// extend prepares n more nodes, which know the first voter.
func (c *trio) extend(n int) {
	c.t.Helper()
	for range n {
		addr := freeAddr(c.t)
		c.mu.Lock()
		c.voters = append(slices.Clip(c.voters), Voter{int32(len(c.voters) + 1), addr})
		c.dirs = append(c.dirs, c.t.TempDir())
		c.hosts = append(c.hosts, nil)
		c.mu.Unlock()
	}
}

// states are what each node is, as a node sees it.
func states(h *Host) string {
	var out []string
	for _, m := range h.Status(context.Background()).Members {
		out = append(out, fmt.Sprintf("%d:%s", m.ID, m.State))
	}
	return strings.Join(out, " ")
}

// removeMember takes a member out. That it is none any more may be the outcome of a try before.
func removeMember(t *testing.T, h *Host, node int32) {
	t.Helper()
	decided(t, fmt.Sprintf("node %d to be removed", node), func() error {
		if !h.Cluster().Member(node) {
			return nil
		}
		return h.RemoveMember(t.Context(), node)
	})
}

// untilRemoved waits until a node has found out that it was removed.
func untilRemoved(t *testing.T, h *Host) {
	t.Helper()
	until(t, fmt.Sprintf("node %d to find out that it was removed", h.NodeID()), func() bool {
		select {
		case <-h.removed:
			return true
		default:
			return false
		}
	})
}

func awaitStates(t *testing.T, h *Host, want string) {
	t.Helper()
	until(t, fmt.Sprintf("the members to be %s", want), func() bool { return states(h) == want })
}

// A cluster of one grows to three and to five while it is written to, and shrinks back to one that was not there at first. Nothing that was acknowledged is lost, and the shards that
// come with the members take new partitions.
func TestGrowAndShrink(t *testing.T) {
	c := newTrio(t, 1)
	c.start(0)
	first := c.hosts[0]
	tp := record.TopicPartition{Topic: newTopic(t, first, "t", 1).ID}
	commit := func(h *Host, group string, at record.Offset) error {
		ch := make(chan error, 1)
		h.ProposeGroup(h.GroupShard(group), []state.Command{state.CommitOffsets{Group: group, Offsets: []state.OffsetCommit{{TP: tp, Offset: at}}}}, func(err error) { ch <- err })
		return <-ch
	}
	for i := range 20 {
		if err := commit(first, fmt.Sprint("early-", i), record.Offset(i)); err != nil {
			t.Fatal(err)
		}
	}
	var mu sync.Mutex
	var want []string
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		pace := time.NewTicker(2 * time.Millisecond)
		defer pace.Stop()
		for {
			select {
			case <-stop:
				return
			case <-pace.C:
			}
			v := fmt.Sprint(len(want), strings.Repeat("g", 500))
			if base := c.append(tp, batchOf(t, 7, record.Sequence(len(want)), v)); int(base) != len(want) {
				t.Errorf("record %d at offset %d", len(want), base)
				return
			}
			mu.Lock()
			want = append(want, v)
			mu.Unlock()
		}
	})
	join := func(i int) {
		t.Helper()
		opened := make(chan error, 1)
		go func() { opened <- c.open(i) }()
		id := int32(i + 1)
		until(t, fmt.Sprintf("node %d to announce itself", id), func() bool { _, ok := first.Cluster().Node(id); return ok })
		if !strings.Contains(states(first), fmt.Sprintf("%d:%s", id, StateWaiting)) {
			t.Errorf("node %d has only announced itself: %s", id, states(first))
		}
		if err := first.AddMember(t.Context(), id, "127.0.0.1:1"); !errors.Is(err, ErrInvalid) {
			t.Errorf("added under another address: %v", err)
		}
		decided(t, "the node to be added", func() error { return first.AddMember(t.Context(), id, c.voters[i].Addr) })
		if err := <-opened; err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.stop(i) })
	}
	c.extend(2)
	join(1)
	join(2)
	awaitStates(t, first, "1:voter 2:voter 3:voter")
	until(t, "a shard for each", func() bool { return first.Cluster().Shards == 3 })
	placed := newTopic(t, first, "placed", 3)
	if !slices.ContainsFunc(placed.Partitions, func(p state.PartitionPlace) bool { return p.Shard == 3 }) {
		t.Errorf("no partition of a new topic is in the new shard: %v", placed.Partitions)
	}
	until(t, "leaders to be spread", func() bool {
		led := map[int32]int{}
		for s := range first.Cluster().Shards {
			n, _ := first.Leader(record.ShardID(s + 1))
			led[n]++
		}
		return len(led) == 3
	})
	// groups stay with their offsets; slots without one go to the new shards
	until(t, "no slot to be on its way", func() bool {
		return len(first.Cluster().Moving(1))+len(first.Cluster().Moving(2))+len(first.Cluster().Moving(3)) == 0
	})
	slots := map[record.ShardID]int{}
	for slot := range state.GroupSlots {
		slots[first.Cluster().SlotShard(uint8(slot))]++
	}
	if slots[3] < state.GroupSlots/5 {
		t.Errorf("slots per shard: %v", slots)
	}
	for i := range 20 {
		until(t, fmt.Sprintf("group early-%d to be there after slots moved", i), func() bool { // this node may not have applied yet what another leads
			g := first.Group(fmt.Sprint("early-", i))
			return g != nil && g.Offsets[tp].Offset == record.Offset(i)
		})
	}
	in := map[record.ShardID]bool{}
	for i := range 30 { // new groups are everywhere
		id := fmt.Sprint("later-", i)
		until(t, "a commit of "+id, func() bool {
			s := first.GroupShard(id)
			in[s] = true
			n, ok := first.Leader(s)
			return ok && commit(c.hosts[n-1], id, 1) == nil
		})
	}
	if len(in) != 3 {
		t.Errorf("new groups are in the shards %v", in)
	}
	c.extend(2)
	join(3)
	join(4)
	awaitStates(t, first, "1:voter 2:voter 3:voter 4:voter 5:voter")

	// back to the last one, the first one first
	for i, left := range []string{"2:voter 3:voter 4:voter 5:voter", "3:voter 4:voter 5:voter", "4:voter 5:voter", "5:voter"} {
		asked := c.hosts[4]
		removeMember(t, asked, int32(i+1))
		awaitStates(t, asked, left)
		untilRemoved(t, c.hosts[i])
		c.stop(i)
	}
	if err := c.hosts[4].RemoveMember(t.Context(), 5); !errors.Is(err, ErrMajority) {
		t.Errorf("removing the only member: %v", err)
	}
	close(stop)
	writer.Wait()
	c.agree(tp, want)
	t.Logf("%d records", len(want))
}

func leads(h *Host, node int32) (n int) {
	for _, g := range h.Status(context.Background()).Groups {
		if g.Leader == node {
			n++
		}
	}
	return n
}

// A node that drains leads nothing until it is told to, or starts anew; a chosen leader stays, also when it has been away.
func TestDrainAndPrefer(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	h := c.hosts[2]
	drain := func(on bool) {
		t.Helper()
		decided(t, "node 1 to drain, or not", func() error { return h.DrainNode(t.Context(), 1, on) })
	}
	drain(true)
	until(t, "node 1 to lead nothing", func() bool { return leads(h, 1) == 0 && leads(h, 2)+leads(h, 3) == 3 })
	drain(false)
	until(t, "node 1 to lead again", func() bool { return leads(h, 1) > 0 })
	drain(true)
	until(t, "node 1 to lead nothing", func() bool { return leads(h, 1) == 0 })
	c.stop(0)
	c.start(0)
	until(t, "node 1 to lead after its restart", func() bool { return !h.Cluster().Draining(1) && leads(h, 1) > 0 })

	g, ok := h.GroupNamed("shard-1")
	if !ok {
		t.Fatal("no shard-1")
	}
	decided(t, "node 3 to be preferred", func() error { return c.hosts[0].PreferLeader(t.Context(), g, 3) })
	until(t, "node 3 to lead shard 1", func() bool { n, _ := h.Leader(1); return n == 3 })
	var err error
	until(t, "an answer", func() bool { err = h.PreferLeader(t.Context(), g, 9); return !moved(err) })
	if !errors.Is(err, ErrNotFound) {
		t.Errorf("prefer a node that is no member: %v", err)
	}
	c.stop(2)
	until(t, "another to lead shard 1", func() bool { n, ok := c.hosts[0].Leader(1); return ok && n != 3 })
	c.start(2)
	until(t, "node 3 to lead shard 1 again", func() bool { n, _ := c.hosts[0].Leader(1); return n == 3 })
}

// A member is not removed if those that are left cannot decide anything; one that is dead can be.
func TestLastMajorityStays(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	c.stop(2)
	until(t, "the groups to be led without node 3", func() bool { return leads(c.hosts[0], 1)+leads(c.hosts[0], 2) == 3 })
	if err := c.hosts[0].RemoveMember(t.Context(), 2); !errors.Is(err, ErrMajority) {
		t.Errorf("removed node 2 of 3 while node 3 is away: %v", err)
	}
	removeMember(t, c.hosts[0], 3)
	awaitStates(t, c.hosts[0], "1:voter 2:voter")
	// What comes back has been removed, and learns it although nobody speaks to it. What was on its way to it may tell it of leaders once more: it opens then, and learns it all the same.
	switch err := c.open(2); {
	case err == nil:
		untilRemoved(t, c.hosts[2])
		c.stop(2)
	case !errors.Is(err, ErrRemoved):
		t.Errorf("a removed node opens: %v", err)
	}
	c.hosts[2] = nil
}

// Two processes of one number: the second is turned away, and the first stays what it was.
func TestSecondNodeOfANumber(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	for _, leader := range []int32{3, 1} { // of meta: the node itself, another
		decided(t, "the leader to be preferred", func() error { return c.hosts[0].PreferLeader(t.Context(), 0, leader) })
		until(t, fmt.Sprintf("node %d to lead meta", leader), func() bool { return c.hosts[leader-1].meta.leads.Load() > 0 })
		cfg := c.config(2)
		cfg.DataDir = t.TempDir()
		cfg.PeerListener = listenAt(t, "127.0.0.1:0")
		if _, err := Open(t.Context(), cfg); !errors.Is(err, ErrForeign) {
			t.Errorf("opened while node %d leads: %v", leader, err)
		}
	}
	if n, _ := c.hosts[0].Cluster().Node(3); string(serverOf(n)) != c.hosts[2].identity.serverID() {
		t.Errorf("node 3 is %v now", n)
	}
}

// Who keeps losing a group gets it back later and later, and soon again once that is long ago.
func TestPatience(t *testing.T) {
	var p patience
	at := time.Unix(1e9, 0)
	var got []time.Duration
	for range 5 {
		w := p.now(at)
		got = append(got, w)
		at = at.Add(w)
		p.yielded(at)
		at = at.Add(time.Second) // and the group is lost again
	}
	if want := []time.Duration{balanceEvery, 2 * balanceEvery, 4 * balanceEvery, balanceMost, balanceMost}; !slices.Equal(got, want) {
		t.Errorf("waits %v, want %v", got, want)
	}
	if w := p.now(at.Add(balanceForget)); w != balanceEvery {
		t.Errorf("after a quiet time %v", w)
	}
}

// A founder that has not registered yet has not been removed; who is replaced, or in no list, has.
func TestWhoIsRemoved(t *testing.T) {
	m := state.NewMeta()
	for i, c := range []state.Command{state.InitCluster{ClusterID: "c", Shards: 1, Members: []int32{1, 2}, Level: state.LevelFirst},
		state.RegisterNode{Node: state.Node{ID: 1, Incarnation: "aa", Level: state.LevelNewest}}, state.RegisterNode{Node: state.Node{ID: 3, Incarnation: "cc", Level: state.LevelNewest}}} {
		var e state.Entry
		if _, err := e.Add(c); err != nil {
			t.Fatal(err)
		}
		data, _ := e.Cut(1, nil, record.Timestamp(1000+i), nil)
		m.Apply(state.RaftIndex(i+1), 1, data)
	}
	var h Host
	h.cluster.Store(m.View())
	r := h.memberServers()
	for server, removed := range map[string]bool{"1.aa": false, "1.ab": true, "2.bb": false, "3.cc": true, "4.dd": true} {
		if r.removes(server) != removed {
			t.Errorf("%s of members %v: removed %v", server, r.Members, !removed)
		}
	}
	if (&forwardedResult{}).removes("1.aa") {
		t.Error("a node that knows of no members is believed")
	}
}
