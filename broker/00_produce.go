package broker

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/tiering/record"
)

// Produce (0), versions 3-11 (advertised from 0): zstd from 7, record errors from 8 (KIP-467), hints at the new leader from 10 (KIP-951). acks 1 and -1 both
// mean durable on a majority; acks 0 gets no answer, and an error closes the connection.

// producePart is one partition of a request.
type producePart struct {
	topic     string
	partition int32
	batch     record.Batch
	err       error
	message   string
	record    int32 // index of the record that is at fault; -1 = none
	base      record.Offset
	logStart  record.Offset
	time      record.Timestamp // LogAppendTime, else -1
	count     int32
	at        int // in the AppendRequest; -1 = not proposed
}

func handleProduce(r *request) error {
	txn := r.nstr()
	acks := r.i16()
	timeout := r.i32()
	parts, topics := decodeProduce(r)
	if r.err != nil {
		return r.err
	}
	if acks < -1 || acks > 1 {
		failAll(parts, codedError{codeInvalidRequiredAcks, fmt.Sprintf("acks=%d is not -1, 0 or 1", acks)})
	}
	if txn != nil {
		failAll(parts, codedError{codeTransactionalIDAuth, "transactions are not served by this version"})
	}
	batches := make([]raftmeta.AppendBatch, 0, len(parts))
	for i := range parts {
		p := &parts[i]
		p.at, p.time, p.base, p.logStart, p.record = -1, -1, -1, -1, -1
		if p.err == nil {
			p.check(r, acks)
		}
		if p.err == nil {
			p.at = len(batches)
			t, _ := r.s.b.Cluster().Topic(p.topic)
			batches = append(batches, raftmeta.AppendBatch{TP: record.TopicPartition{Topic: t.ID, Partition: p.partition}, Batch: p.batch})
		}
	}
	if len(batches) == 0 {
		r.produced(acks, parts, topics, nil)
		return nil
	}
	wait := max(time.Duration(timeout)*time.Millisecond, leastProduceWait)
	deadline := time.Now().Add(wait)
	var answered atomic.Bool
	late := time.AfterFunc(wait, func() {
		if answered.CompareAndSwap(false, true) {
			res := make([]raftmeta.AppendResult, len(batches))
			for i := range res {
				res[i] = raftmeta.AppendResult{Err: fmt.Errorf("%w: not durable after %s, it may still become so", raftmeta.ErrTimeout, wait), Base: -1, LogStart: -1}
			}
			r.produced(acks, parts, topics, res)
		}
	})
	r.s.b.Append(r.s.ctx, raftmeta.AppendRequest{Batches: batches, Deadline: deadline}, func(res []raftmeta.AppendResult) {
		late.Stop()
		if answered.CompareAndSwap(false, true) {
			r.produced(acks, parts, topics, res)
		}
	})
	return nil
}

// leastProduceWait: a client whose timeout is shorter, or none, means that it does not want to wait for replicas. Here every record is made durable first.
const leastProduceWait = time.Second

// decodeProduce reads the partitions; topics has the number of partitions of each topic.
func decodeProduce(r *request) (parts []producePart, topics []int) {
	least := 6 // name length, array length
	if r.flex {
		least = 3
	}
	for range max(r.array(least), 0) {
		name := r.str()
		n := max(r.array(least+2), 0)
		topics = append(topics, n)
		for range n {
			p := producePart{topic: name, partition: r.i32(), batch: r.bytes()}
			r.tags()
			parts = append(parts, p)
		}
		r.tags()
		if r.err != nil {
			return nil, nil
		}
	}
	r.tags()
	return parts, topics
}

// codedError is an error with the code that a client gets.
type codedError struct {
	code int16
	msg  string
}

func (e codedError) Error() string { return e.msg }

func failAll(parts []producePart, err error) {
	for i := range parts {
		parts[i].err = err
	}
}

// check validates one partition's batch in the order that Kafka does, and changes what the topic's configuration asks for. The work is bounded by the number
// of cores; the order of a connection is kept because its reader does it.
func (p *producePart) check(r *request, acks int16) {
	t, ok := r.s.b.Cluster().Topic(p.topic)
	if !ok || p.partition < 0 || int(p.partition) >= len(t.Partitions) {
		p.err = raftmeta.ErrUnknownPartition
		return
	}
	if _, ok := r.s.b.Leader(t.Partitions[p.partition].Shard); !ok {
		p.err = raftmeta.ErrNotLeader
		return
	}
	if n := len(t.Configs); n > 0 && acks == -1 { // the quorum may have shrunk since the setting was checked
		if need := minInsync(t.Configs); need > 1 && need > r.s.b.Voters()/2+1 {
			p.err = codedError{codeNotEnoughReplicas, fmt.Sprintf("%s is %d, and there are %d voters", minInsyncReplicas, need, r.s.b.Voters())}
			return
		}
	}
	r.s.check <- struct{}{}
	defer func() { <-r.s.check }()
	c := topicConfig{r.s, t}
	if p.err = p.validate(r, c); p.err == nil {
		p.err = p.rewrite(r, c)
	}
	var re *record.RecordError
	if errors.As(p.err, &re) {
		p.record = re.Index
	}
	if p.err != nil {
		p.message = p.err.Error()
		r.s.m.topic(r.s.b.Cluster(), p.topic).bytesRejected.Add(float64(len(p.batch)))
	}
}

func (p *producePart) validate(r *request, c topicConfig) error {
	if len(p.batch) > 16 && p.batch[16] < 2 { // an old message set: its own length field is elsewhere
		return fmt.Errorf("%w: %d", record.ErrMagic, p.batch[16])
	}
	b, rest, err := record.Next(p.batch)
	if err != nil {
		return err
	}
	if len(rest) > 0 {
		return codedError{codeInvalidRecord, "a partition takes exactly one batch"}
	}
	p.batch, p.count = b, b.Count()
	if err := record.Validate(b, record.Limits{BatchBytes: c.int("max.message.bytes"), Walk: true}); err != nil {
		return err
	}
	switch {
	case b.Codec() == record.CodecZstd && r.version < 7:
		return codedError{codeUnsupportedCompression, "zstd needs Produce version 7"}
	case b.IsTransactional():
		return codedError{codeInvalidTransactionState, "transactions are not served by this version"}
	}
	return p.checkTimestamps(r, c)
}

func (p *producePart) checkTimestamps(r *request, c topicConfig) error {
	if c.string("message.timestamp.type") == "LogAppendTime" {
		return nil
	}
	now := r.s.cfg.Now().UnixMilli()
	before, after := c.int64("message.timestamp.before.max.ms"), c.int64("message.timestamp.after.max.ms")
	if ts := int64(p.batch.MaxTimestamp()); ts > now && ts-now > after {
		return codedError{codeInvalidTimestamp, fmt.Sprintf("timestamp %d is more than %d ms after the broker's %d", ts, after, now)}
	}
	if ts := int64(p.batch.BaseTimestamp()); ts >= 0 && ts < now && now-ts > before {
		return codedError{codeInvalidTimestamp, fmt.Sprintf("timestamp %d is more than %d ms before the broker's %d", ts, before, now)}
	}
	return nil
}

// rewrite does what changes bytes: the broker's time and the topic's compression.
func (p *producePart) rewrite(r *request, c topicConfig) error {
	if codec := c.string("compression.type"); codec != "producer" {
		want, err := record.ParseCodec(codec)
		if err != nil {
			return err
		}
		if want != p.batch.Codec() {
			if p.batch, err = record.Recompress(p.batch, want, 0); err != nil {
				return err
			}
		}
	}
	if c.string("message.timestamp.type") == "LogAppendTime" {
		p.time = record.Timestamp(r.s.cfg.Now().UnixMilli())
		p.batch.SetLogAppendTime(p.time)
	}
	return nil
}

// produced answers. It is called by a shard's batcher and must not block.
func (r *request) produced(acks int16, parts []producePart, topics []int, res []raftmeta.AppendResult) {
	failed := false
	cluster := r.s.b.Cluster()
	var leaderless map[record.ShardID]bool
	for i := range parts {
		p := &parts[i]
		if p.at >= 0 {
			x := res[p.at]
			p.err, p.base, p.logStart = x.Err, x.Base, x.LogStart
		}
		m := r.s.m.topic(cluster, p.topic)
		m.produces.Inc()
		if p.err != nil {
			failed = true
			m.failedProduce.Inc()
			if r.version >= leaderHints {
				t, _ := cluster.Topic(p.topic)
				leaderless = r.leaderless(leaderless, codeOf(p.err), t, p.partition)
			}
			continue
		}
		m.bytesIn.Add(float64(p.size()))
		m.messagesIn.Add(float64(p.count))
		r.s.m.batch.Observe(float64(p.size()))
	}
	if acks == 0 {
		r.silence(failed)
		return
	}
	if len(leaderless) == 0 {
		r.finish(r.encodeProduce(parts, topics))
		return
	}
	go func() { // ends with the server, and is one of those that may be in flight on the connection
		r.awaitLeaders(leaderless, leaderWait)
		r.finish(r.encodeProduce(parts, topics))
	}()
}

// leaderHints is the first version whose answers name leaders.
const leaderHints = 10

// size is the batch's length; its bytes must not be read any more, the frame is back in its pool.
func (p *producePart) size() int { return len(p.batch) }

func (r *request) encodeProduce(parts []producePart, topics []int) *writer {
	w := r.respond(64 * (len(parts) + 1))
	w.array(len(topics))
	h := hints{r: r}
	i := 0
	for _, n := range topics {
		if n > 0 {
			w.str(parts[i].topic)
		} else {
			w.str("")
		}
		w.array(n)
		for range n {
			r.encodeProducePart(w, &parts[i], &h)
			i++
		}
		w.tags()
	}
	w.i32(0) // throttle time
	w.tagged(h.endpoints(0)...)
	return w
}

func (r *request) encodeProducePart(w *writer, p *producePart, h *hints) {
	code := codeOf(p.err)
	w.i32(p.partition)
	w.i16(code)
	w.i64(int64(p.base))
	w.i64(int64(p.time))
	if r.version >= 5 {
		w.i64(int64(p.logStart))
	}
	if r.version >= 8 {
		if p.record >= 0 {
			w.array(1)
			w.i32(p.record)
			w.text(p.message)
			w.tags()
		} else {
			w.array(0)
		}
		msg := p.message
		if msg == "" && p.err != nil {
			msg = p.err.Error()
		}
		w.text(msg)
	}
	if r.version < leaderHints || code == codeNone {
		w.tags()
		return
	}
	t, _ := r.s.b.Cluster().Topic(p.topic)
	w.tagged(h.leader(0, code, t, p.partition)...)
}
