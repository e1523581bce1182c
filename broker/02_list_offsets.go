package broker

import (
	"context"
	"time"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// ListOffsets (2), versions 1-10: isolation level from 2, leader epoch from 4, the record with the largest timestamp from 7 (KIP-734), earliest local offset from
// 8 and latest tiered from 9 (KIP-405, KIP-1005), timeout from 10 (KIP-1075). Look-ups by time are record-exact.

// Special timestamps.
const (
	timeLatest        = -1
	timeEarliest      = -2
	timeMax           = -3
	timeEarliestLocal = -4
	timeLatestTiered  = -5
)

// listOffset is what is asked for one partition, and the answer.
type listOffset struct {
	partition, epoch int32
	ts               int64
	code             int16
	offset           record.Offset
	at               record.Timestamp
	outEpoch         record.LeaderEpoch
}

func handleListOffsets(r *request) error {
	r.i32() // replica ID
	if r.version >= 2 {
		r.i8() // isolation level: without transactions the last stable offset is the high watermark
	}
	type topic struct {
		name  string
		parts []listOffset
	}
	topics := make([]topic, max(r.array(3), 0))
	for i := range topics {
		t := &topics[i]
		t.name = r.str()
		t.parts = make([]listOffset, max(r.array(12), 0))
		for j := range t.parts {
			p := &t.parts[j]
			p.partition, p.epoch = r.i32(), -1
			if r.version >= 4 {
				p.epoch = r.i32()
			}
			p.ts = r.i64()
			r.tags()
		}
		r.tags()
		if r.err != nil {
			return r.err
		}
	}
	wait := 30 * time.Second
	if r.version >= 10 {
		if ms := r.i32(); ms > 0 {
			wait = time.Duration(ms) * time.Millisecond
		}
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	ctx, cancel := r.timeout(wait)
	defer cancel()
	for i := range topics {
		for j := range topics[i].parts {
			r.listOffset(ctx, topics[i].name, &topics[i].parts[j])
		}
	}
	w := r.respond(64 * len(topics))
	if r.version >= 2 {
		w.i32(0)
	}
	w.array(len(topics))
	for _, t := range topics {
		w.str(t.name)
		w.array(len(t.parts))
		for _, p := range t.parts {
			w.i32(p.partition)
			w.i16(p.code)
			w.i64(int64(p.at))
			w.i64(int64(p.offset))
			if r.version >= 4 {
				w.i32(int32(p.outEpoch))
			}
			w.tags()
		}
		w.tags()
	}
	w.tags()
	r.finish(w)
	return nil
}

func (r *request) listOffset(ctx context.Context, name string, p *listOffset) {
	p.offset, p.at, p.outEpoch = -1, -1, -1
	t, ok := r.s.b.Cluster().Topic(name)
	if !ok || p.partition < 0 || int(p.partition) >= len(t.Partitions) {
		p.code = codeUnknownTopicOrPartition
		return
	}
	tp := record.TopicPartition{Topic: t.ID, Partition: p.partition}
	if p.ts == timeLatest { // never a guess: it must contain all that was acknowledged before the request came
		if err := r.s.b.Prove(ctx, t.Partitions[p.partition].Shard); err != nil {
			p.code = codeOf(err)
			return
		}
	}
	info, err := r.s.b.Partition(tp)
	if p.code = codeOf(err); p.code != codeNone {
		return
	}
	if p.code = checkEpoch(p.epoch, info.LeaderEpoch); p.code != codeNone {
		return
	}
	r.lookUp(ctx, &info, p)
}

func (r *request) lookUp(ctx context.Context, info *state.PartitionInfo, p *listOffset) {
	var found bool
	var err error
	switch {
	case p.ts == timeLatest:
		p.offset, p.outEpoch = info.LastStableOffset, info.LeaderEpoch
	case p.ts == timeEarliest:
		p.offset = info.LogStart
	case p.ts == timeEarliestLocal && r.version >= 8:
		p.offset = max(info.LogStart, info.SealedEnd)
	case p.ts == timeLatestTiered && r.version >= 9:
		if info.SealedBytes > 0 {
			p.offset = info.SealedEnd - 1
		}
	case p.ts == timeMax && r.version >= 7:
		p.offset, p.at, found, err = r.s.read.MaxTimestamp(ctx, info.TP, info.HighWatermark)
	case p.ts >= 0:
		p.offset, p.at, found, err = r.s.read.OffsetForTimestamp(ctx, info.TP, record.Timestamp(p.ts), info.LastStableOffset)
	default:
		p.code = codeUnsupportedForFormat
		return
	}
	if p.code = codeOf(err); p.code != codeNone || (p.ts >= 0 || p.ts == timeMax) && !found {
		p.offset, p.at = -1, -1
	}
	if p.offset >= 0 && p.outEpoch < 0 && p.offset < info.HighWatermark {
		p.outEpoch = r.s.epochOf(info, p.offset)
	}
}

// epochOf returns the leader epoch of the record at offset; -1 if it is not known.
func (s *Server) epochOf(info *state.PartitionInfo, offset record.Offset) record.LeaderEpoch {
	lo, hi := record.LeaderEpoch(0), info.LeaderEpoch
	for lo < hi { // the lowest epoch that ends behind offset
		mid := lo + (hi-lo)/2
		if _, end, err := s.b.EpochEnd(info.TP, mid); err != nil {
			return -1
		} else if end > offset {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	e, _, err := s.b.EpochEnd(info.TP, hi)
	if err != nil {
		return -1
	}
	return e
}
