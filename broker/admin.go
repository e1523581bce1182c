package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// adminTimeout bounds a change where the request names no time.
const adminTimeout = 30 * time.Second

func timeoutOf(ms int32) time.Duration {
	if ms <= 0 {
		return adminTimeout
	}
	return min(time.Duration(ms)*time.Millisecond, 5*time.Minute)
}

// partitionsMax bounds a topic.
const partitionsMax = 10_000

// current lets this node see all that any node has acknowledged before the request. Before that it must not be said that a topic exists, or does not.
func (r *request) current(ctx context.Context) (err error) {
	if !r.fresh {
		err = r.s.b.Current(ctx)
		r.fresh = err == nil
	}
	return err
}

// findTopic finds one by what its meta state says now.
func (r *request) findTopic(ctx context.Context, find func(*state.Cluster) (*state.Topic, bool)) (*state.Topic, error) {
	if t, ok := find(r.s.b.Cluster()); ok {
		return t, nil
	}
	if err := r.current(ctx); err != nil {
		return nil, err
	}
	if t, ok := find(r.s.b.Cluster()); ok {
		return t, nil
	}
	return nil, raftmeta.ErrUnknownTopic
}

// errNoTopic does not say which: its name stands beside it in every answer.
var errNoTopic error = codedError{codeUnknownTopicOrPartition, "the topic does not exist"}

func (r *request) topicNamed(ctx context.Context, name string) (*state.Topic, error) {
	t, err := r.findTopic(ctx, func(c *state.Cluster) (*state.Topic, bool) { return c.Topic(name) })
	if errors.Is(err, raftmeta.ErrUnknownTopic) {
		err = errNoTopic
	}
	return t, err
}

// topicToChange is topicNamed, never behind: a topic that was deleted elsewhere, and made again, has another ID than what this node still has under its name.
func (r *request) topicToChange(ctx context.Context, name string) (*state.Topic, error) {
	if err := r.current(ctx); err != nil {
		return nil, err
	}
	return r.topicNamed(ctx, name)
}

// checkTopic reports why a topic cannot be created, with Kafka's code; it fills in defaults. current is asked before it says that the topic exists.
func (s *Server) checkTopic(ctx context.Context, t *raftmeta.TopicSpec, current func(context.Context) error) error {
	if err := checkTopicName(t.Name); err != nil {
		return codedError{codeInvalidTopic, err.Error()}
	}
	if _, ok := s.b.Cluster().Topic(t.Name); ok {
		if err := current(ctx); err != nil { // it may have been deleted
			return err
		}
		if _, ok := s.b.Cluster().Topic(t.Name); ok {
			return codedError{codeTopicExists, fmt.Sprintf("topic %q exists", t.Name)}
		}
	}
	if t.Partitions == -1 {
		t.Partitions = s.cfg.NumPartitions
	}
	if t.Partitions < 1 || t.Partitions > partitionsMax {
		return codedError{codeInvalidPartitions, fmt.Sprintf("%d partitions are not between 1 and %d", t.Partitions, partitionsMax)}
	}
	voters := s.b.Voters()
	if t.ReplicationFactor == -1 {
		t.ReplicationFactor = int16(min(3, voters))
	}
	if t.ReplicationFactor < 1 || int(t.ReplicationFactor) > voters {
		return codedError{codeInvalidReplicationFactor, fmt.Sprintf("replication factor %d with %d voters", t.ReplicationFactor, voters)}
	}
	if err := s.checkTopicConfig(t.Configs); err != nil {
		return codedError{codeInvalidConfig, err.Error()}
	}
	t.Parsed = s.parsed(t.Configs)
	return nil
}

// createTopic checks and creates a topic.
func (s *Server) createTopic(ctx context.Context, t raftmeta.TopicSpec) (*state.Topic, error) {
	if err := s.checkTopic(ctx, &t, s.b.Current); err != nil {
		return nil, err
	}
	made := s.b.CreateTopics(ctx, []raftmeta.TopicSpec{t})[0]
	return made.Topic, made.Err
}

// newTopic is a topic of a CreateTopics request. Which nodes a client assigns decides nothing, since every voter has every partition; how many is the replication factor.
type newTopic struct {
	spec     raftmeta.TopicSpec
	assigned map[int32][]int32 // by partition
	twice    bool              // the request names it more than once
	made     *state.Topic
	err      error
}

func (t *newTopic) assign(partition int32, nodes []int32) {
	if t.assigned == nil {
		t.assigned = map[int32][]int32{}
	}
	if _, twice := t.assigned[partition]; twice {
		t.err = codedError{codeInvalidReplicaAssignment, fmt.Sprintf("partition %d is assigned twice", partition)}
	}
	t.assigned[partition] = nodes
}

// checkAssignment takes partitions and replication factor from an assignment that could be one.
func (t *newTopic) checkAssignment(c *state.Cluster) {
	bad := func(format string, args ...any) {
		t.err = codedError{codeInvalidReplicaAssignment, fmt.Sprintf(format, args...)}
	}
	t.spec.Partitions, t.spec.ReplicationFactor = int32(len(t.assigned)), int16(min(len(t.assigned[0]), 1<<15-1))
	for p := range t.spec.Partitions {
		nodes, ok := t.assigned[p]
		if !ok || len(nodes) == 0 || len(nodes) != int(t.spec.ReplicationFactor) {
			bad("partition %d is assigned to %d nodes, partition 0 to %d", p, len(nodes), t.spec.ReplicationFactor)
			return
		}
		seen := map[int32]bool{}
		for _, n := range nodes {
			if !c.Member(n) || seen[n] {
				bad("partition %d is assigned to %v: node %d does not exist or is there twice", p, nodes, n)
				return
			}
			seen[n] = true
		}
	}
}

// CreateTopics (19), versions 0-7: validate_only from 1, defaults from 4 (KIP-464), the configuration in the answer from 5 (KIP-525), topic IDs from 7.
func handleCreateTopics(r *request) error {
	var topics []*newTopic
	var again newTopic // takes what is said of a topic that was named before
	byName := map[string]*newTopic{}
	for range max(r.array(8), 0) {
		name := r.str()
		t := byName[name]
		if t == nil {
			t = &newTopic{}
			byName[name], topics = t, append(topics, t)
		} else {
			t.twice, t = true, &again
		}
		t.spec.Name, t.spec.Partitions, t.spec.ReplicationFactor = name, r.i32(), r.i16()
		for range max(r.array(5), 0) {
			p := r.i32()
			t.assign(p, r.i32s())
			r.tags()
		}
		for range max(r.array(2), 0) {
			k, v := r.str(), r.nstr()
			r.tags()
			if t.spec.Configs == nil {
				t.spec.Configs = map[string]string{}
			}
			if v != nil {
				t.spec.Configs[k] = *v
			}
		}
		r.tags()
		if r.err != nil {
			return r.err
		}
	}
	wait := timeoutOf(r.i32())
	validate := r.version >= 1 && r.bool()
	r.tags()
	if r.err != nil {
		return r.err
	}
	ctx, cancel := r.timeout(wait)
	defer cancel()
	var specs []raftmeta.TopicSpec
	var asked []*newTopic
	for _, t := range topics {
		switch {
		case t.twice:
			t.err = codedError{codeInvalidRequest, fmt.Sprintf("topic %q is named more than once", t.spec.Name)}
		case len(t.assigned) > 0 && (t.spec.Partitions != -1 || t.spec.ReplicationFactor != -1):
			t.err = codedError{codeInvalidRequest, "with an assignment of replicas the number of partitions and the replication factor must be -1"}
		case len(t.assigned) > 0 && t.err == nil:
			t.checkAssignment(r.s.b.Cluster())
		}
		if t.err == nil {
			t.err = r.s.checkTopic(ctx, &t.spec, r.current)
		}
		if t.err == nil && !validate {
			specs, asked = append(specs, t.spec), append(asked, t)
		}
	}
	for i, made := range r.s.b.CreateTopics(ctx, specs) {
		asked[i].made, asked[i].err = made.Topic, made.Err
	}
	w := r.respond(128 * len(topics))
	if r.version >= 2 {
		w.i32(0)
	}
	w.array(len(topics))
	for _, t := range topics {
		w.str(t.spec.Name)
		if r.version >= 7 {
			var id record.TopicID
			if t.made != nil {
				id = t.made.ID
			}
			w.uuid(id)
		}
		w.i16(codeOf(t.err))
		if r.version >= 1 {
			w.text(messageOf(t.err))
		}
		if r.version >= 5 {
			r.encodeCreated(w, &t.spec, t.err)
		}
		w.tags()
	}
	w.tags()
	r.finish(w)
	return nil
}

func (r *request) encodeCreated(w *writer, t *raftmeta.TopicSpec, err error) {
	if err != nil {
		w.i32(-1)
		w.i16(-1)
		w.array(0)
		return
	}
	w.i32(t.Partitions)
	w.i16(t.ReplicationFactor)
	settings := topicSettings()
	w.array(len(settings))
	for _, s := range settings {
		v, set := t.Configs[s.name]
		source := sourceDefault
		if set {
			source = sourceTopic
		} else {
			v = r.s.defaults[s.name]
		}
		w.str(s.name)
		w.nstr(&v)
		w.bool(false)
		w.i8(source)
		w.bool(false)
		w.tags()
	}
}

func messageOf(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// DeleteTopics (20), versions 0-6: error messages from 5, by topic ID from 6.
func handleDeleteTopics(r *request) error {
	least, each := r.leastString(), 16
	if r.version >= 6 {
		least, each = 17, 32
	}
	asked := r.readTopics(max(r.array(least), 0), least, func() (k topicKey) {
		if r.version < 6 {
			k.name = r.str()
			return k
		}
		if name := r.nstr(); name != nil {
			k.name = *name
		}
		k.id = r.uuid()
		r.tags()
		return k
	})
	wait := timeoutOf(r.i32())
	r.tags()
	if r.err != nil {
		return r.err
	}
	ctx, cancel := r.timeout(wait)
	defer cancel()
	var ids []record.TopicID
	var gone []*topicMeta
	for i := range asked {
		m := &asked[i]
		var err error
		named := m.name != "" || r.version < 6
		if named {
			if err = r.current(ctx); err == nil { // else one that was made again has another ID here
				m.t, err = r.findTopic(ctx, func(c *state.Cluster) (*state.Topic, bool) { return c.Topic(m.name) })
			}
		} else {
			m.t, err = r.findTopic(ctx, func(c *state.Cluster) (*state.Topic, bool) { return c.TopicByID(m.id) })
		}
		switch {
		case err == nil:
			m.id, m.name = m.t.ID, m.t.Name
			ids, gone = append(ids, m.id), append(gone, m)
		case !named && errors.Is(err, raftmeta.ErrUnknownTopic):
			m.code = codeUnknownTopicID
		default:
			m.code = codeOf(err)
		}
	}
	for i, err := range r.s.b.DeleteTopics(ctx, ids) {
		gone[i].code = codeOf(err)
	}
	w := r.respond(each * len(asked))
	if r.version >= 1 {
		w.i32(0)
	}
	w.array(len(asked))
	for i := range asked {
		m := &asked[i]
		if r.version >= 6 {
			w.text(m.name)
			w.uuid(m.id)
		} else {
			w.str(m.name)
		}
		w.i16(m.code)
		if r.version >= 5 {
			w.nstr(nil)
		}
		w.tags()
	}
	w.tags()
	r.finish(w)
	return nil
}

// DeleteRecords (21), versions 0-2: -1 is the high watermark.
func handleDeleteRecords(r *request) error {
	type part struct {
		topic  string
		p      int32
		offset int64
		low    record.Offset
		code   int16
	}
	var topics [][]part
	for range max(r.array(3), 0) {
		name := r.str()
		parts := make([]part, max(r.array(12), 0))
		for i := range parts {
			parts[i] = part{topic: name, p: r.i32(), offset: r.i64(), low: -1}
			r.tags()
		}
		topics = append(topics, parts)
		r.tags()
	}
	wait := timeoutOf(r.i32())
	r.tags()
	if r.err != nil {
		return r.err
	}
	ctx, cancel := r.timeout(wait)
	defer cancel()
	w := r.respond(256)
	w.i32(0)
	w.array(len(topics))
	for _, parts := range topics {
		if len(parts) > 0 {
			w.str(parts[0].topic)
		} else {
			w.str("")
		}
		w.array(len(parts))
		for i := range parts {
			p := &parts[i]
			t, err := r.topicNamed(ctx, p.topic)
			switch {
			case err != nil:
				p.code = codeOf(err)
			case p.p < 0 || int(p.p) >= len(t.Partitions):
				p.code = codeUnknownTopicOrPartition
			case p.offset < -1:
				p.code = codeOffsetOutOfRange
			default:
				low, err := r.s.b.DeleteRecords(ctx, record.TopicPartition{Topic: t.ID, Partition: p.p}, record.Offset(p.offset))
				p.low, p.code = low, codeOf(err)
			}
			w.i32(p.p)
			w.i64(int64(p.low))
			w.i16(p.code)
			w.tags()
		}
		w.tags()
	}
	w.tags()
	r.finish(w)
	return nil
}

// CreatePartitions (37), versions 0-3.
func handleCreatePartitions(r *request) error {
	type topic struct {
		name  string
		total int32
		twice bool
		err   error
	}
	var topics []*topic
	byName := map[string]*topic{}
	for range max(r.array(7), 0) {
		name, total := r.str(), r.i32()
		for range max(r.array(4), 0) { // assignments are accepted: every voter has every partition
			r.take(4 * max(r.array(4), 0))
			r.tags()
		}
		r.tags()
		if r.err != nil {
			return r.err
		}
		if first := byName[name]; first != nil {
			first.twice = true
			continue
		}
		t := &topic{name: name, total: total}
		byName[name], topics = t, append(topics, t)
	}
	wait := timeoutOf(r.i32())
	validate := r.bool()
	r.tags()
	if r.err != nil {
		return r.err
	}
	ctx, cancel := r.timeout(wait)
	defer cancel()
	w := r.respond(64 * len(topics))
	w.i32(0)
	w.array(len(topics))
	for _, t := range topics {
		old, err := r.topicToChange(ctx, t.name)
		switch {
		case t.twice:
			t.err = codedError{codeInvalidRequest, fmt.Sprintf("topic %q is named more than once", t.name)}
		case err != nil:
			t.err = err
		case int(t.total) <= len(old.Partitions):
			t.err = codedError{codeInvalidPartitions, fmt.Sprintf("topic %q has %d partitions, it cannot be given %d", t.name, len(old.Partitions), t.total)}
		case t.total > partitionsMax:
			t.err = codedError{codeInvalidPartitions, fmt.Sprintf("%d partitions, at most %d", t.total, partitionsMax)}
		case !validate:
			t.err = r.s.b.CreatePartitions(ctx, old.ID, t.total)
		}
		w.str(t.name)
		w.i16(codeOf(t.err))
		w.text(messageOf(t.err))
		w.tags()
	}
	w.tags()
	r.finish(w)
	return nil
}

// DescribeCluster (60), versions 0-2: endpoint type from 1, fenced brokers from 2.
func handleDescribeCluster(r *request) error {
	r.bool() // authorized operations
	kind := int8(1)
	if r.version >= 1 {
		kind = r.i8()
	}
	fenced := r.version >= 2 && r.bool()
	r.tags()
	if r.err != nil {
		return r.err
	}
	c := r.s.b.Cluster()
	w := r.respond(256)
	w.i32(0)
	if kind != 1 {
		w.i16(codeInvalidRequest)
		w.text("only brokers can be asked for here")
	} else {
		w.i16(codeNone)
		w.nstr(nil)
	}
	if r.version >= 1 {
		w.i8(kind)
	}
	w.str(c.ID)
	w.i32(r.s.b.NodeID())
	nodes := slices.DeleteFunc(c.Nodes(), func(n state.Node) bool { return !fenced && r.s.b.Down(n.ID) })
	w.array(len(nodes))
	for _, n := range nodes {
		w.i32(n.ID)
		w.str(n.Host)
		w.i32(n.Port)
		w.text(n.Rack)
		if r.version >= 2 {
			w.bool(r.s.b.Down(n.ID))
		}
		w.tags()
	}
	w.i32(noOperations)
	w.tags()
	r.finish(w)
	return nil
}
