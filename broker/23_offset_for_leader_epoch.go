package broker

import (
	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/tiering/record"
)

// OffsetForLeaderEpoch (23), versions 2-4 (KIP-320): where a leader epoch ended, so that a consumer can see whether its position is still of this log.
func handleOffsetForLeaderEpoch(r *request) error {
	type part struct {
		p              int32
		current, epoch int32
		code           int16
		outEpoch       int32
		end            int64
	}
	if r.version >= 3 {
		r.i32() // replica ID
	}
	w := r.respond(256)
	w.i32(0)
	n := max(r.array(3), 0)
	w.array(n)
	for range n {
		name := r.str()
		t, ok := r.s.b.Cluster().Topic(name)
		w.str(name)
		k := max(r.array(12), 0)
		w.array(k)
		for range k {
			p := part{p: r.i32(), current: r.i32(), epoch: r.i32(), outEpoch: -1, end: -1}
			r.tags()
			if !ok || p.p < 0 || int(p.p) >= len(t.Partitions) {
				p.code = codeUnknownTopicOrPartition
			} else {
				tp := record.TopicPartition{Topic: t.ID, Partition: p.p}
				info, err := r.s.b.Partition(tp)
				p.code = codeOf(err)
				if err == nil {
					p.code = checkEpoch(p.current, info.LeaderEpoch)
				}
				if p.code == codeNone {
					e, end, err := r.s.b.EpochEnd(tp, record.LeaderEpoch(p.epoch))
					if err == nil && (end < 0 || end >= info.HighWatermark) { // it may not be all that the epoch has
						if info, p.code = r.proven(tp, t.Partitions[p.p].Shard); p.code == codeNone {
							e, end, err = r.s.b.EpochEnd(tp, record.LeaderEpoch(p.epoch))
						}
					}
					if p.code == codeNone {
						p.code, p.outEpoch, p.end = codeOf(err), int32(e), int64(end)
					}
				}
			}
			w.i16(p.code)
			w.i32(p.p)
			w.i32(p.outEpoch)
			w.i64(p.end)
			w.tags()
		}
		r.tags()
		w.tags()
	}
	r.tags()
	w.tags()
	if r.err != nil {
		return r.err
	}
	r.finish(w)
	return nil
}

// checkEpoch compares the leader epoch that a client knows (-1 = none) with the partition's.
func checkEpoch(known int32, epoch record.LeaderEpoch) int16 {
	switch {
	case planted.On(planted.EpochUnchecked) || known < 0 || known == int32(epoch):
		return codeNone
	case known < int32(epoch):
		return codeFencedLeaderEpoch
	}
	return codeUnknownLeaderEpoch
}
