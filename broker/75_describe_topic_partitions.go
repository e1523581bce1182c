package broker

import (
	"slices"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// DescribeTopicPartitions (75), version 0 (KIP-966): what Metadata says of partitions, so many at once, from a cursor on, topics in the order of their names. Nothing is made. Java's admin
// client asks for it instead of Metadata as soon as it is advertised. There are no eligible leader replicas: the lists are empty, not null, of which that client makes an exception.

const (
	// describedMost is Kafka's max.request.partition.size.limit: the most partitions in an answer.
	describedMost = 2000
	// topicOperations are all that Kafka knows of a topic, each a bit: read, write, create, delete, alter, describe, describe configs, alter configs. Nobody is refused any.
	topicOperations int32 = 1<<3 | 1<<4 | 1<<5 | 1<<6 | 1<<7 | 1<<8 | 1<<10 | 1<<11
)

// topicCursor is the partition that an answer begins with, or the next one.
type topicCursor struct {
	topic     string
	partition int32
}

// cursor reads a cursor, which may be null.
func (r *reader) cursor() *topicCursor {
	if r.i8() < 0 {
		return nil
	}
	c := &topicCursor{r.str(), r.i32()}
	r.tags()
	return c
}

func (w *writer) cursor(c *topicCursor) {
	if c == nil {
		w.i8(-1)
		return
	}
	w.i8(1)
	w.str(c.topic)
	w.i32(c.partition)
	w.tags()
}

// topicSlice is a topic of an answer and those of its partitions that are in it.
type topicSlice struct {
	t        *state.Topic // nil if it is not there, for which code says why
	named    int32        // which of the names
	from, to int32
	code     int16
}

func handleDescribeTopicPartitions(r *request) error {
	n := max(r.array(2), 0)
	names := make([]string, 0, r.room(n, 2))
	for range n {
		names = append(names, r.str())
		r.tags()
	}
	limit := int(r.i32())
	from := r.cursor()
	r.tags()
	if r.err != nil {
		return r.err
	}
	slices.Sort(names)
	names = slices.Compact(names) // what is named twice is answered once
	all := len(names) == 0
	if from != nil && (from.partition < 0 || !all && !slices.Contains(names, from.topic)) {
		refused := make([]topicSlice, 0, len(names))
		for i := range names {
			refused = append(refused, topicSlice{named: int32(i), code: codeInvalidRequest})
		}
		r.finish(r.encodeDescribed(names, refused, nil))
		return nil
	}
	if all {
		for t := range r.s.b.Cluster().Topics() {
			names = append(names, t.Name)
		}
	}
	if from == nil {
		from = &topicCursor{}
	}
	i, _ := slices.BinarySearch(names, from.topic)
	names = names[i:]
	parts, next := r.sliceTopics(names, from, min(max(limit, 1), describedMost), all)
	r.finish(r.encodeDescribed(names, parts, next))
	return nil
}

// sliceTopics takes partitions of topics, up to a limit, and says what comes next. Topics that are not there are left out if nobody asked for them by name.
func (r *request) sliceTopics(names []string, from *topicCursor, limit int, all bool) (out []topicSlice, next *topicCursor) {
	most := len(names)
	if all {
		most = min(most, limit)
	}
	out = make([]topicSlice, 0, most)
	for i, name := range names {
		if limit == 0 {
			return out, &topicCursor{topic: name}
		}
		m := topicMeta{topicKey: topicKey{name: name}}
		r.resolve(&m, false)
		x := topicSlice{t: m.t, named: int32(i), code: m.code}
		if x.t == nil {
			if !all {
				out = append(out, x)
			}
			continue
		}
		n := int32(len(x.t.Partitions))
		if name == from.topic {
			x.from = min(from.partition, n)
		}
		x.to = min(n, x.from+int32(limit))
		out = append(out, x)
		if limit -= int(x.to - x.from); x.to < n {
			return out, &topicCursor{name, x.to}
		}
	}
	return out, nil
}

func (r *request) encodeDescribed(names []string, topics []topicSlice, next *topicCursor) *writer {
	w := r.respond(256 + 32*len(topics))
	w.i32(0)
	w.array(len(topics))
	shards := map[record.ShardID]raftmeta.Replicas{}
	for i := range topics {
		x := &topics[i]
		w.i16(x.code)
		w.str(names[x.named])
		if x.t != nil {
			w.uuid(x.t.ID)
		} else {
			w.uuid(record.TopicID{})
		}
		w.bool(false) // internal
		w.array(int(x.to - x.from))
		for p := x.from; p < x.to; p++ {
			r.encodeDescribedPartition(w, x.t, p, shards)
		}
		w.i32(topicOperations)
		w.tags()
	}
	w.cursor(next)
	w.tags()
	return w
}

func (r *request) encodeDescribedPartition(w *writer, t *state.Topic, p int32, shards map[record.ShardID]raftmeta.Replicas) {
	d := r.partition(t, p, shards)
	w.i16(d.code)
	w.i32(p)
	w.i32(d.leader)
	w.i32(d.epoch)
	w.i32s(d.replicas)
	w.i32s(d.isr)
	w.i32s(nil) // eligible leader replicas
	w.i32s(nil) // the last known ones
	w.i32s(d.offline)
	w.tags()
}
