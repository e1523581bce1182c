package broker

import (
	"errors"
	"slices"
	"time"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// Metadata (3), versions 0-12: from 4 the client says whether topics may be created, from 8 authorized operations, topic IDs from 10 and look-up by ID from 12
// (KIP-516).

// noOperations says that authorized operations were not asked for.
const noOperations int32 = -2147483648

// topicKey is what a topic is asked for by.
type topicKey struct {
	name string
	id   record.TopicID
}

// topicMeta is one topic of an answer.
type topicMeta struct {
	topicKey
	t    *state.Topic
	code int16
}

// readTopics reads n topics of least bytes each, every one once.
func (r *request) readTopics(n, least int, read func() topicKey) []topicMeta {
	out := make([]topicMeta, 0, r.room(n, least))
	again := repeated(n, func(i int) topicKey { return out[i].topicKey })
	for range n {
		if k := read(); !again(k) {
			out = append(out, topicMeta{topicKey: k})
		}
	}
	return out
}

func handleMetadata(r *request) error {
	least := 2
	if r.version >= 10 {
		least = 17
	}
	n := r.array(least)
	all := n < 0 || n == 0 && r.version == 0
	asked := r.readTopics(max(n, 0), least, func() (k topicKey) {
		if r.version >= 10 {
			k.id = r.uuid()
			if name := r.nstr(); name != nil {
				k.name = *name
			}
		} else {
			k.name = r.str()
		}
		r.tags()
		return k
	})
	create := true
	if r.version >= 4 {
		create = r.bool()
	}
	if r.version >= 8 {
		if r.version <= 10 {
			r.bool() // cluster authorized operations
		}
		r.bool() // topic authorized operations
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	if all {
		for t := range r.s.b.Cluster().Topics() {
			asked = append(asked, topicMeta{topicKey: topicKey{t.Name, t.ID}, t: t})
		}
	} else {
		for i := range asked {
			r.resolve(&asked[i], create && r.s.cfg.AutoCreateTopics)
		}
	}
	r.finish(r.encodeMetadata(asked))
	return nil
}

// resolve finds a topic that was asked for, or creates it.
func (r *request) resolve(m *topicMeta, create bool) {
	c := r.s.b.Cluster()
	ok := false
	if m.name == "" && r.version >= 12 {
		if m.t, ok = c.TopicByID(m.id); ok {
			m.name = m.t.Name
		} else {
			m.code = codeUnknownTopicID
		}
		return
	}
	if m.t, ok = c.Topic(m.name); ok {
		m.id = m.t.ID
		return
	}
	m.code = codeUnknownTopicOrPartition
	if err := checkTopicName(m.name); err != nil {
		m.code = codeInvalidTopic
		return
	}
	if create {
		m.code = r.autoCreate(m)
	}
}

// autoCreate makes a topic that a client asked for. A client that is told LEADER_NOT_AVAILABLE asks again.
func (r *request) autoCreate(m *topicMeta) int16 {
	ctx, cancel := r.timeout(5 * time.Second)
	defer cancel()
	t, err := r.s.createTopic(ctx, raftmeta.TopicSpec{Name: m.name, Partitions: r.s.cfg.NumPartitions, ReplicationFactor: -1})
	switch {
	case err == nil:
		m.t, m.id = t, t.ID
		return codeNone
	case errors.Is(err, raftmeta.ErrTopicExists), errors.Is(err, raftmeta.ErrTimeout), errors.Is(err, raftmeta.ErrNotLeader):
		return codeLeaderNotAvailable
	}
	return codeOf(err)
}

func (r *request) encodeMetadata(topics []topicMeta) *writer {
	c := r.s.b.Cluster()
	size := 256
	for i := range topics {
		size += 16 + len(topics[i].name)
		if r.version >= 10 {
			size += 16
		}
		if t := topics[i].t; t != nil {
			size += 48 * len(t.Partitions)
		}
	}
	w := r.respond(size)
	if r.version >= 3 {
		w.i32(0)
	}
	nodes := slices.DeleteFunc(c.Nodes(), func(n state.Node) bool { return r.s.b.Down(n.ID) })
	w.array(len(nodes))
	for _, n := range nodes {
		w.i32(n.ID)
		w.str(n.Host)
		w.i32(n.Port)
		if r.version >= 1 {
			w.text(n.Rack)
		}
		w.tags()
	}
	if r.version >= 2 {
		w.text(c.ID)
	}
	if r.version >= 1 {
		w.i32(r.s.b.NodeID())
	}
	w.array(len(topics))
	shards := map[record.ShardID]raftmeta.Replicas{} // there are few, and many partitions
	for i := range topics {
		r.encodeTopic(w, &topics[i], shards)
	}
	if r.version >= 8 && r.version <= 10 {
		w.i32(noOperations)
	}
	w.tags()
	return w
}

func (r *request) encodeTopic(w *writer, m *topicMeta, shards map[record.ShardID]raftmeta.Replicas) {
	w.i16(m.code)
	if r.version >= 12 {
		w.text(m.name)
	} else {
		w.str(m.name)
	}
	if r.version >= 10 {
		w.uuid(m.id)
	}
	if r.version >= 1 {
		w.bool(false) // internal
	}
	if m.t == nil {
		w.array(0)
	} else {
		w.array(len(m.t.Partitions))
		for p := range m.t.Partitions {
			r.encodePartition(w, m.t, int32(p), shards)
		}
	}
	if r.version >= 8 {
		w.i32(noOperations)
	}
	w.tags()
}

// partitionMeta is what clients are told of a partition.
type partitionMeta struct {
	code                   int16
	leader, epoch          int32 // -1 = not known
	replicas, isr, offline []int32
}

// partition describes a partition; what is known of its shard is kept in shards.
func (r *request) partition(t *state.Topic, p int32, shards map[record.ShardID]raftmeta.Replicas) partitionMeta {
	shard := t.Partitions[p].Shard
	d := partitionMeta{code: codeNone, leader: -1, epoch: -1}
	if node, ok := r.s.b.Leader(shard); ok {
		d.leader = node
		info, err := r.s.b.Partition(record.TopicPartition{Topic: t.ID, Partition: p})
		if err == nil || errors.Is(err, raftmeta.ErrNotLeader) { // the epoch is known here too
			d.epoch = int32(info.LeaderEpoch)
		}
	} else {
		d.code = codeLeaderNotAvailable
	}
	have, ok := shards[shard]
	if !ok {
		have = r.s.b.Replicas(shard)
		shards[shard] = have
	}
	d.replicas, d.isr = replicasOf(have, t.ReplicationFactor, d.leader)
	d.offline = r.s.offline(d.replicas)
	d.isr = slices.DeleteFunc(d.isr, func(id int32) bool { return slices.Contains(d.offline, id) })
	return d
}

func (r *request) encodePartition(w *writer, t *state.Topic, p int32, shards map[record.ShardID]raftmeta.Replicas) {
	d := r.partition(t, p, shards)
	w.i16(d.code)
	w.i32(p)
	w.i32(d.leader)
	if r.version >= 7 {
		w.i32(d.epoch)
	}
	w.i32s(d.replicas)
	w.i32s(d.isr)
	if r.version >= 5 {
		w.i32s(d.offline)
	}
	w.tags()
}

// offline are those of the replicas that do not answer.
func (s *Server) offline(replicas []int32) (out []int32) {
	for _, id := range replicas {
		if s.b.Down(id) {
			out = append(out, id)
		}
	}
	return out
}

// replicasOf are the nodes that a partition is shown on: as many of its shard's voters as the topic's replication factor, the leader among them; and those of them that are in
// contact with the leader. Every voter has the data.
func replicasOf(have raftmeta.Replicas, factor int16, leader int32) (replicas, isr []int32) {
	n := min(int(max(factor, 1)), len(have.Voters))
	replicas = slices.Clone(have.Voters[:n])
	if n > 0 && slices.Contains(have.Voters, leader) && !slices.Contains(replicas, leader) {
		replicas[n-1] = leader
	}
	for _, v := range replicas {
		if slices.Contains(have.InSync, v) {
			isr = append(isr, v)
		}
	}
	return replicas, isr
}
