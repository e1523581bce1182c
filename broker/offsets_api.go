package broker

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/estran/estran/broker/group"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// groupRow is a group in a list.
type groupRow struct{ id, protocol, state string }

// list returns the groups that this node coordinates, live or durable.
func (c *coordinator) list(states, types []string) (out []groupRow) {
	if len(types) > 0 && !slices.ContainsFunc(types, func(t string) bool { return strings.EqualFold(t, "classic") }) {
		return nil
	}
	c.mu.Lock()
	shards := make([]*shardGroups, 0, len(c.shards))
	for _, sg := range c.shards {
		shards = append(shards, sg)
	}
	c.mu.Unlock()
	for _, sg := range shards {
		seen := map[string]bool{}
		sg.mu.Lock()
		for id, g := range sg.groups {
			if g.Size() > 0 {
				seen[id] = true
				out = append(out, groupRow{id, g.ProtocolType, string(g.State)})
			}
		}
		sg.mu.Unlock()
		for _, st := range c.s.b.Groups(sg.id) {
			if !seen[st.ID] {
				out = append(out, groupRow{st.ID, st.ProtocolType, string(group.Empty)})
			}
		}
	}
	wanted := map[string]bool{} // the list that was sent is gone through once a state, not once a group
	for _, state := range []group.State{group.Empty, group.PreparingRebalance, group.CompletingRebalance, group.Stable, group.Dead} {
		wanted[string(state)] = len(states) == 0 || slices.ContainsFunc(states, func(s string) bool { return strings.EqualFold(s, string(state)) })
	}
	out = slices.DeleteFunc(out, func(g groupRow) bool { return !wanted[g.state] })
	slices.SortFunc(out, func(a, b groupRow) int { return cmp.Compare(a.id, b.id) })
	return out
}

// remove deletes an empty group.
func (c *coordinator) remove(id string) int16 {
	if code := checkGroupID(id); code != codeNone {
		return code
	}
	if !c.exists(id) {
		if _, code := c.shardOf(id); code != codeNone {
			return code
		}
		return codeGroupIDNotFound
	}
	busy := false
	code := c.use(id, func(g *liveGroup) { busy = g.Size() > 0 })
	switch {
	case code != codeNone:
		return code
	case busy:
		return codeNonEmptyGroup
	}
	ch := make(chan error, 1)
	c.s.b.ProposeGroup(c.s.b.GroupShard(id), []state.Command{state.DeleteGroup{ID: id}}, func(err error) { ch <- err })
	select {
	case err := <-ch:
		return groupCodeOf(err)
	case <-c.s.ctx.Done():
		return codeCoordinatorNotAvailable
	}
}

// commitPart is one partition of an OffsetCommit.
type commitPart struct {
	partition int32
	offset    int64
	epoch     int32
	metadata  *string
	code      int16
}

type commitTopic struct {
	name  string
	parts []commitPart
}

// OffsetCommit (8), versions 1-9: no retention time from 5, leader epoch from 6, static members from 7.
func handleOffsetCommit(r *request) error {
	id := r.str()
	generation, member, instance := r.i32(), r.str(), ""
	if r.version >= 7 {
		if s := r.nstr(); s != nil {
			instance = *s
		}
	}
	if r.version >= 2 && r.version <= 4 {
		r.i64() // retention: the broker's applies
	}
	topics := make([]commitTopic, max(r.array(3), 0))
	for i := range topics {
		t := &topics[i]
		t.name = r.str()
		t.parts = make([]commitPart, max(r.array(13), 0))
		for j := range t.parts {
			p := &t.parts[j]
			p.partition, p.offset, p.epoch = r.i32(), r.i64(), -1
			if r.version >= 6 {
				p.epoch = r.i32()
			}
			if r.version == 1 {
				r.i64() // commit time: the broker's applies
			}
			p.metadata = r.nstr()
			r.tags()
		}
		r.tags()
		if r.err != nil {
			return r.err
		}
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	code := checkGroupID(id)
	if code == codeNone {
		var check int16
		code = r.s.groups.use(id, func(g *liveGroup) { check = g.CheckCommit(time.Now(), member, instance, generation) })
		if code == codeNone {
			code = check
		}
	}
	if code == codeNone && r.version >= 9 && generation >= 0 && !r.s.groups.exists(id) {
		code = codeGroupIDNotFound
	}
	r.commit(id, topics, code)
	return nil
}

// commit makes the offsets durable and answers.
func (r *request) commit(id string, topics []commitTopic, code int16) {
	n := 0
	for i := range topics {
		n += len(topics[i].parts)
	}
	cmd := state.CommitOffsets{Group: id, Offsets: make([]state.OffsetCommit, 0, n)}
	now := record.Timestamp(r.s.cfg.Now().UnixMilli())
	for i := range topics {
		t, ok := r.s.b.Cluster().Topic(topics[i].name)
		for j := range topics[i].parts {
			p := &topics[i].parts[j]
			meta := ""
			if p.metadata != nil {
				meta = *p.metadata
			}
			switch {
			case code != codeNone:
				p.code = code
			case !ok || p.partition < 0 || int(p.partition) >= len(t.Partitions):
				p.code = codeUnknownTopicOrPartition
			case len(meta) > r.s.cfg.OffsetMetadataMax:
				p.code = codeOffsetMetadataTooLarge
			default:
				cmd.Offsets = append(cmd.Offsets, state.OffsetCommit{TP: record.TopicPartition{Topic: t.ID, Partition: p.partition}, Offset: record.Offset(p.offset),
					Epoch: record.LeaderEpoch(p.epoch), Metadata: meta, At: now})
			}
		}
	}
	if len(cmd.Offsets) == 0 {
		r.committed(topics, nil)
		return
	}
	r.s.b.ProposeGroup(r.s.b.GroupShard(id), []state.Command{cmd}, func(err error) { r.committed(topics, err) })
}

func (r *request) committed(topics []commitTopic, err error) {
	w := r.respond(64 * (1 + len(topics)))
	if r.version >= 3 {
		w.i32(0)
	}
	w.array(len(topics))
	for _, t := range topics {
		w.str(t.name)
		w.array(len(t.parts))
		for _, p := range t.parts {
			w.i32(p.partition)
			if p.code == codeNone {
				p.code = groupCodeOf(err)
			}
			w.i16(p.code)
			w.tags()
		}
		w.tags()
	}
	w.tags()
	r.finish(w)
}

// fetchGroup is one group of an OffsetFetch.
type fetchGroup struct {
	id     string
	all    bool
	topics []fetchTopic
	code   int16
}

type fetchTopic struct {
	name  string
	parts []int32
}

// OffsetFetch (9), versions 1-9: all topics from 2, leader epoch from 5, require_stable from 7 (without transactions everything is), several groups from 8, member epoch
// from 9.
func handleOffsetFetch(r *request) error {
	var groups []fetchGroup
	if r.version <= 7 {
		g := fetchGroup{id: r.str()}
		g.decodeTopics(r)
		groups = []fetchGroup{g}
	} else {
		n := max(r.array(3), 0)
		groups = make([]fetchGroup, 0, r.room(n, 3))
		again := repeated(n, func(i int) string { return groups[i].id })
		for range n {
			g := fetchGroup{id: r.str()}
			if r.version >= 9 {
				r.nstr()
				r.i32()
			}
			g.decodeTopics(r)
			r.tags()
			if !again(g.id) {
				groups = append(groups, g)
			}
		}
	}
	if r.version >= 7 {
		r.bool()
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	ctx, cancel := r.timeout(5 * time.Second)
	defer cancel()
	size := 256
	for i := range groups {
		g := &groups[i]
		size += 16 + len(g.id) + 24*len(g.topics)
		if g.code = checkGroupID(g.id); g.code == codeNone {
			_, g.code = r.s.groups.shardOf(g.id)
		}
		if g.code == codeNone { // never a guess: what was acknowledged before must be applied here
			if err := r.s.b.Prove(ctx, r.s.b.GroupShard(g.id)); err != nil {
				g.code = groupCodeOf(err)
			}
		}
	}
	w := r.respond(size)
	if r.version >= 3 {
		w.i32(0)
	}
	if r.version <= 7 {
		r.encodeOffsets(w, &groups[0])
		if r.version >= 2 {
			w.i16(groups[0].code)
		}
	} else {
		w.array(len(groups))
		for i := range groups {
			w.str(groups[i].id)
			r.encodeOffsets(w, &groups[i])
			w.i16(groups[i].code)
			w.tags()
		}
	}
	w.tags()
	r.finish(w)
	return nil
}

func (g *fetchGroup) decodeTopics(r *request) {
	n := r.array(3)
	if n < 0 {
		g.all = true
		return
	}
	g.topics = make([]fetchTopic, n)
	for i := range g.topics {
		g.topics[i] = fetchTopic{name: r.str(), parts: r.i32s()}
		r.tags()
		if r.err != nil {
			return
		}
	}
}

// encodeOffsets writes the topics of a group; every partition that was asked for is in the answer, with -1 if nothing was committed.
func (r *request) encodeOffsets(w *writer, g *fetchGroup) {
	var offsets map[record.TopicPartition]state.OffsetCommit
	if st := r.s.b.Group(g.id); st != nil && g.code == codeNone {
		offsets = st.Offsets
	}
	cluster := r.s.b.Cluster()
	topics := g.topics
	if g.all {
		byName := map[string][]int32{}
		for tp := range offsets {
			if t, ok := cluster.TopicByID(tp.Topic); ok {
				byName[t.Name] = append(byName[t.Name], tp.Partition)
			}
		}
		topics = nil
		for name, parts := range byName {
			slices.Sort(parts)
			topics = append(topics, fetchTopic{name, parts})
		}
		slices.SortFunc(topics, func(a, b fetchTopic) int { return cmp.Compare(a.name, b.name) })
	}
	w.array(len(topics))
	for _, t := range topics {
		w.str(t.name)
		w.array(len(t.parts))
		topic, known := cluster.Topic(t.name)
		for _, p := range t.parts {
			o := state.OffsetCommit{Offset: -1, Epoch: -1}
			if known {
				if c, ok := offsets[record.TopicPartition{Topic: topic.ID, Partition: p}]; ok {
					o = c
				}
			}
			w.i32(p)
			w.i64(int64(o.Offset))
			if r.version >= 5 {
				w.i32(int32(o.Epoch))
			}
			w.str(o.Metadata)
			if r.version == 1 {
				w.i16(g.code)
			} else {
				w.i16(codeNone)
			}
			w.tags()
		}
		w.tags()
	}
}
