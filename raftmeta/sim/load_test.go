package sim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/estran/estran/localstack/check"
	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
)

// part is a partition and all that was acknowledged of it.
type part struct {
	key   int32 // in the history
	tp    record.TopicPartition
	topic *topic

	mu      sync.Mutex
	acked   []batch // by offset
	deleted record.Offset
	start   record.Offset // the highest log start that was seen
}

// batch is an acknowledged one.
type batch struct {
	base record.Offset
	n    int32
	at   record.Timestamp // of its latest record
}

// topic is what a simulation knows of one.
type topic struct {
	name           string
	retention      time.Duration // 0 = for ever
	retentionBytes int64         // 0 = no bound
	mayDelete      bool          // records are deleted by request
}

// value is the number that a record's bytes begin with; the rest follows from it.
func value(b []byte) uint64 {
	if len(b) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

func valueBytes(v uint64, n int) []byte {
	b := binary.BigEndian.AppendUint64(nil, v)
	for i := range n {
		b = append(b, byte(v>>(i%8*8))^byte(i))
	}
	return b
}

// leader is a node that says that it leads the shard; nil if none does. If several do, each may be meant.
func (w *world) leader(s record.ShardID, rng *rand.Rand) *life {
	for _, i := range rng.Perm(len(w.nodes)) {
		if l := w.nodes[i].live.Load(); l != nil {
			if who, ok := l.Leader(s); ok && who == l.NodeID() {
				return l
			}
		}
	}
	return nil
}

// proven is a node that has shown that it leads the shard and has applied all that was acknowledged; nil if none can within a while.
func (w *world) proven(s record.ShardID, rng *rand.Rand) *life {
	l := w.leader(s, rng)
	if l == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if l.Prove(ctx, s) != nil {
		return nil
	}
	return l
}

// retriable are refusals that a client answers by asking again.
func retriable(err error) bool {
	for _, e := range []error{raftmeta.ErrNotLeader, raftmeta.ErrUnknownOutcome, raftmeta.ErrTimeout, raftmeta.ErrBudget, raftmeta.ErrStopped, raftmeta.ErrUnknownPartition} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// produce writes to a partition as an idempotent producer does: one batch after the other, each again and again until it is acknowledged.
func (w *world) produce(p *part) {
	rng := w.rng("produce", uint64(p.key))
	builder := record.NewBuilder(record.CodecNone)
	builder.ProducerID, builder.ProducerEpoch = record.ProducerID(1000+p.key), 0
	next, seq := record.Offset(0), record.Sequence(0)
	for {
		if !w.sleep(w.load, rng, w.o.Pause) {
			return
		}
		op := check.Op{Process: p.key, Kind: check.Send, Outcome: check.OK, Start: w.at()}
		n := 1 + rng.IntN(w.o.Records)
		builder.BaseSequence = seq
		at := record.Timestamp(time.Now().UnixMilli())
		for range n {
			v := w.value.Add(1)
			b := valueBytes(v, rng.IntN(w.o.RecordBytes))
			builder.Add(at, nil, b)
			op.Records = append(op.Records, check.Record{Key: p.key, Offset: -1, Value: v, Hash: crc32.ChecksumIEEE(b)})
		}
		b, err := builder.Batch()
		if err != nil {
			w.failf("building a batch: %v", err)
			return
		}
		base, ok := w.append(p, b, rng)
		if op.End = w.at(); !ok {
			op.Outcome = check.Info
			w.record(op)
			return
		}
		if base != next {
			w.failf("%s: sequence %d was acknowledged at offset %d, want %d", p.tp, seq, base, next)
		}
		for i := range op.Records {
			op.Records[i].Offset = int64(base) + int64(i)
		}
		w.record(op)
		p.mu.Lock()
		p.acked = append(p.acked, batch{base, int32(n), at})
		p.mu.Unlock()
		next, seq = base+record.Offset(n), seq.Add(int32(n))
	}
}

// append is repeated until the batch is acknowledged; ok is false if it was not long after the last fault.
func (w *world) append(p *part, b record.Batch, rng *rand.Rand) (base record.Offset, ok bool) {
	var last error
	for pause := 2 * time.Second; ; pause = min(2*pause, time.Minute) {
		if shard, known := w.shardOf(p.tp); known {
			if l := w.leader(shard, rng); l != nil {
				done := make(chan raftmeta.AppendResult, 1)
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				l.Append(ctx, raftmeta.AppendRequest{Batches: []raftmeta.AppendBatch{{TP: p.tp, Batch: b}}}, func(r []raftmeta.AppendResult) { done <- r[0] })
				r := <-done
				cancel()
				if r.Err == nil {
					return r.Base, true
				}
				if last = r.Err; !retriable(r.Err) {
					w.failf("%s: %v", p.tp, r.Err)
					return 0, false
				}
			}
		}
		select {
		case <-w.over:
			w.failf("%s takes no records any more: %v", p.tp, last)
			return 0, false
		case <-time.After(pause + rand.N(pause)):
		}
	}
}

// shardOf asks any node that knows.
func (w *world) shardOf(tp record.TopicPartition) (record.ShardID, bool) {
	for _, n := range w.nodes {
		if l := n.live.Load(); l != nil {
			if s, ok := l.ShardOf(tp); ok {
				return s, true
			}
		}
	}
	return 0, false
}

// read follows every partition, and commits how far it has come.
func (w *world) read() {
	const process, group = 100, "readers"
	rng := w.rng("read", 0)
	next := map[*part]record.Offset{}
	for w.sleep(w.load, rng, w.o.Poll) {
		for _, p := range w.parts {
			for range 200 {
				at, more := w.poll(process, p, next[p], rng)
				if next[p] = at; !more {
					break
				}
			}
		}
		w.commit(process, group, next, rng)
	}
}

// readAgain reads from somewhere in the middle, where it is from objects.
func (w *world) readAgain() {
	const process = 101
	rng := w.rng("read again", 0)
	for w.sleep(w.load, rng, 10*w.o.Poll) {
		p := w.parts[rng.IntN(len(w.parts))]
		p.mu.Lock()
		at, end := p.start, p.start
		if n := len(p.acked); n > 0 {
			end = p.acked[n-1].base
		}
		p.mu.Unlock()
		at += record.Offset(rng.Int64N(max(1, int64(end-at))))
		w.record(check.Op{Process: process, Kind: check.Assign, Outcome: check.OK, Start: w.at(), End: w.at()})
		for range 20 {
			next, more := w.poll(process, p, at, rng)
			if at = next; !more {
				break
			}
		}
	}
}

// poll reads once from a proven leader. more is false at the end, and if nothing can be read now.
func (w *world) poll(process int32, p *part, from record.Offset, rng *rand.Rand) (next record.Offset, more bool) {
	began := w.at()
	shard, ok := w.shardOf(p.tp)
	if !ok {
		return from, false
	}
	l := w.proven(shard, rng)
	if l == nil {
		return from, false
	}
	next, more, err := w.pollAt(l, process, p, from, began)
	if err != nil && !errors.Is(err, tiering.ErrStorage) && !errors.Is(err, errEnded) {
		w.failf("%s at offset %d: %v", p.tp, from, err)
	}
	return next, more
}

// pollAt reads once from a node, whatever that one is.
func (w *world) pollAt(l *life, process int32, p *part, from record.Offset, began int64) (next record.Offset, more bool, err error) {
	b, ok := l.Bounds(p.tp)
	if !ok {
		return from, false, nil
	}
	w.judgeStart(p, b.LogStart)
	op := check.Op{Process: process, Kind: check.Poll, Outcome: check.OK, Start: began,
		Marks: []check.Mark{{Key: p.key, LogStart: int64(b.LogStart), Stable: int64(b.LastStable), High: int64(b.HighWatermark)}}}
	from = max(from, b.LogStart)
	if from == b.HighWatermark {
		op.End = w.at()
		w.record(op)
		return from, false, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	res, err := l.read(ctx, p.tp, from, tiering.Limits{MaxBytes: 64 << 10, AtLeastOne: true, UpTo: b.HighWatermark})
	if errors.Is(err, tiering.ErrOutOfRange) { // expired meanwhile
		return from, false, nil
	}
	if err != nil {
		return from, false, err
	}
	if op.Records, err = decode(p.key, from, res); err != nil {
		return from, false, err
	}
	op.End = w.at()
	w.record(op)
	return res.Next, res.Next > from && res.Next < b.HighWatermark, nil
}

// decode takes an answer apart as a client does, and gives its memory back.
func decode(key int32, from record.Offset, res tiering.Result) (out []check.Record, err error) {
	if res.Release != nil {
		defer res.Release()
	}
	var data []byte
	for _, b := range res.Buffers {
		data = append(data, b...)
	}
	epoch := record.LeaderEpoch(-1)
	for len(data) > 0 {
		b, rest, err := record.Next(data)
		if err != nil {
			return nil, err
		}
		if err := b.CheckCRC(); err != nil {
			return nil, err
		}
		if b.LeaderEpoch() < epoch {
			return nil, fmt.Errorf("offset %d is of epoch %d, the batch before it of %d", b.BaseOffset(), b.LeaderEpoch(), epoch)
		}
		epoch = b.LeaderEpoch()
		if err := record.Each(b, 0, func(o record.Offset, r *record.Record) bool {
			if o >= from {
				out = append(out, check.Record{Key: key, Offset: int64(o), Value: value(r.Value), Hash: crc32.ChecksumIEEE(r.Value)})
			}
			return true
		}); err != nil {
			return nil, err
		}
		data = rest
	}
	return out, nil
}

// commit commits what was read, and asks what is committed.
func (w *world) commit(process int32, group string, next map[*part]record.Offset, rng *rand.Rand) {
	began := w.at()
	var shard record.ShardID
	for _, n := range w.nodes {
		if l := n.live.Load(); l != nil {
			shard = max(shard, l.GroupShard(group))
		}
	}
	if shard == 0 {
		return
	}
	l := w.proven(shard, rng)
	if l == nil {
		return
	}
	if g := l.Group(group); g != nil {
		op := check.Op{Process: process, Kind: check.Committed, Outcome: check.OK, Group: 1, Start: began, End: w.at()}
		for _, p := range w.parts {
			if o, ok := g.Offsets[p.tp]; ok {
				op.Records = append(op.Records, check.Record{Key: p.key, Offset: int64(o.Offset)})
			}
		}
		w.record(op)
	}
	op := check.Op{Process: process, Kind: check.Commit, Outcome: check.OK, Group: 1, Start: w.at()}
	cmd := state.CommitOffsets{Group: group}
	for _, p := range w.parts {
		op.Records = append(op.Records, check.Record{Key: p.key, Offset: int64(next[p])})
		cmd.Offsets = append(cmd.Offsets, state.OffsetCommit{TP: p.tp, Offset: next[p], Epoch: -1})
	}
	done := make(chan error, 1)
	l.ProposeGroup(shard, []state.Command{cmd}, func(err error) { done <- err })
	if err := <-done; err != nil {
		if op.Outcome = check.Info; !retriable(err) {
			w.failf("committing offsets: %v", err)
		}
	}
	op.End = w.at()
	w.record(op)
}

// deleteRecords asks for a log start now and then.
func (w *world) deleteRecords() {
	rng := w.rng("delete", 0)
	for w.sleep(w.load, rng, 20*time.Minute) {
		p := w.parts[rng.IntN(len(w.parts))]
		shard, ok := w.shardOf(p.tp)
		if !p.topic.mayDelete || !ok {
			continue
		}
		l := w.leader(shard, rng)
		if l == nil {
			continue
		}
		p.mu.Lock()
		to := p.start
		if n := len(p.acked); n > 0 {
			to = p.acked[rng.IntN(n)].base
		}
		p.deleted = max(p.deleted, to) // before it is asked for: it may be seen at any time
		p.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		if _, err := l.DeleteRecords(ctx, p.tp, to); err != nil && !retriable(err) {
			w.failf("deleting records of %s: %v", p.tp, err)
		}
		cancel()
	}
}
