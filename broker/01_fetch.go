package broker

import (
	"context"
	"encoding/binary"
	"net"
	"time"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
)

// Fetch (1), versions 4-16: sessions from 7 (KIP-227), leader epoch from 9 (KIP-320), rack from 11 (KIP-392; this version names no replica), last fetched epoch
// from 12, topic IDs from 13 (KIP-516), node endpoints from 16 (KIP-951). The first batch of the first partition that has any is returned whole whatever the
// limits are; answers are at once when there is an error or min_bytes is reached, else when something changes or max_wait is over.

// fetchPart is one partition of a fetch.
type fetchPart struct {
	name      string
	id        record.TopicID
	partition int32
	epoch     int32
	offset    record.Offset
	lastEpoch int32
	maxBytes  int32

	code      int16
	high      record.Offset
	logStart  record.Offset
	res       tiering.Result
	diverging *divergence
	sealedEnd record.Offset
}

type divergence struct {
	epoch record.LeaderEpoch
	end   record.Offset
}

// fetchRequest is a decoded request.
type fetchRequest struct {
	maxWait, minBytes, maxBytes int32
	session, epoch              int32
	committed                   bool
	parts                       []fetchPart
	forgotten                   []fetchPart
}

func decodeFetch(r *request) *fetchRequest {
	f := &fetchRequest{maxBytes: 1<<31 - 1, epoch: -1}
	if r.version <= 14 {
		r.i32() // replica ID: a consumer's is -1, and no other is served on a client's listener
	}
	f.maxWait, f.minBytes = r.i32(), r.i32()
	f.maxBytes = r.i32()
	f.committed = r.i8() == 1
	if r.version >= 7 {
		f.session, f.epoch = r.i32(), r.i32()
	}
	topic := func() (name string, id record.TopicID) {
		if r.version >= 13 {
			return "", r.uuid()
		}
		return r.str(), id
	}
	least := 16 // bytes of a partition
	switch {
	case r.version >= 12:
		least = 32
	case r.version >= 9:
		least = 28
	case r.version >= 5:
		least = 24
	}
	topics := max(r.array(3), 0)
	if topics > 0 {
		f.parts = make([]fetchPart, 0, len(r.b)/least) // nearly exact: most of a request are its partitions
	}
	for range topics {
		name, id := topic()
		for range max(r.array(least), 0) {
			p := fetchPart{name: name, id: id, partition: r.i32(), epoch: -1, lastEpoch: -1}
			if r.version >= 9 {
				p.epoch = r.i32()
			}
			p.offset = record.Offset(r.i64())
			if r.version >= 12 {
				p.lastEpoch = r.i32()
			}
			if r.version >= 5 {
				r.i64() // log start of a follower
			}
			p.maxBytes = r.i32()
			r.tags()
			f.parts = append(f.parts, p)
		}
		r.tags()
		if r.err != nil {
			return nil
		}
	}
	if r.version >= 7 {
		for range max(r.array(3), 0) {
			name, id := topic()
			for _, p := range r.i32s() {
				f.forgotten = append(f.forgotten, fetchPart{name: name, id: id, partition: p})
			}
			r.tags()
			if r.err != nil {
				return nil
			}
		}
	}
	if r.version >= 11 {
		r.str() // rack
	}
	r.tags()
	return f
}

func handleFetch(r *request) error {
	f := decodeFetch(r)
	if r.err != nil {
		return r.err
	}
	began := time.Now()
	r.drop() // nothing aliases the frame, and the request may wait
	ses, parts, code := r.s.session.begin(f, r.version >= 13, r.c)
	if code != codeNone {
		r.finish(encodeFetchError(r, code))
		return nil
	}
	wait := min(time.Duration(max(f.maxWait, 0))*time.Millisecond, r.s.cfg.FetchWait)
	bytes := r.fetchOnce(f, parts, wait)
	if bytes < int(f.minBytes) && wait > 0 && len(parts) > 0 && !anyError(parts) {
		r.fetchLater(f, parts, began.Add(wait))
	}
	if leaderless := r.leaderlessOf(parts); len(leaderless) > 0 {
		r.awaitLeaders(leaderless, time.Until(began.Add(wait)))
	}
	r.sendFetch(f, ses, parts)
	return nil
}

// leaderlessOf returns the shards that nobody leads of partitions that cannot be read for that, if the answer can name leaders.
func (r *request) leaderlessOf(parts []*fetchPart) (out map[record.ShardID]bool) {
	if !r.flex {
		return nil
	}
	for _, p := range parts {
		if p.code == codeNotLeaderOrFollower {
			t, _ := r.s.b.Cluster().TopicByID(p.id)
			out = r.leaderless(out, p.code, t, p.partition)
		}
	}
	return out
}

// answerShare is the part of the answers' budget that one answer may take, busyShare that while others wait for it: a few clients that do not read must not stop the others, and one
// that reads slowly must come to its end with what it gets.
const (
	answerShare = 8
	busyShare   = 64
)

// reserve takes what an answer may need from the budget, before anything is read into memory. The first batch of an answer may be larger than that.
func (r *request) reserve(f *fetchRequest, parts []*fetchPart) (limit int) {
	share := answerShare
	if r.s.answers.waiting.Load() > 0 {
		share = busyShare
	}
	limit = min(max(int(f.maxBytes), 0), int(r.s.cfg.ResponseBudget)/share)
	asked := 0
	for _, p := range parts {
		asked = min(asked+max(int(p.maxBytes), 0), limit)
	}
	r.hold(int64(asked))
	return limit
}

// hold changes how much of the budget of answers the request has to n bytes.
func (r *request) hold(n int64) {
	n = min(n, r.s.cfg.ResponseBudget)
	switch more := n - r.answer; {
	case more < 0:
		r.s.answers.Release(-more)
	case more > 0:
		if r.s.answers.acquire(r.s.ctx, more) != nil {
			return // the server closes; the writer drops the answer
		}
	}
	r.answer = n
}

func anyError(parts []*fetchPart) bool {
	for _, p := range parts {
		if p.code != codeNone || p.diverging != nil {
			return true
		}
	}
	return false
}

// fetchLater waits until enough has arrived or the time is over.
func (r *request) fetchLater(f *fetchRequest, parts []*fetchPart, until time.Time) {
	woken := make(chan struct{}, 1)
	tps := make([]record.TopicPartition, len(parts))
	for i, p := range parts {
		tps[i] = record.TopicPartition{Topic: p.id, Partition: p.partition}
	}
	stop := r.s.b.Watch(tps, func() {
		select {
		case woken <- struct{}{}:
		default:
		}
	})
	defer stop()
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	for last := false; ; {
		bytes := r.fetchOnce(f, parts, time.Until(until)) // again: what came before the watch began, too
		if last || bytes >= int(f.minBytes) || anyError(parts) || r.s.drain.Load() {
			return
		}
		select {
		case <-woken:
		case <-timer.C:
			last = true
		case <-r.s.ctx.Done():
			last = true
		}
	}
}

func (p *fetchPart) reset() {
	if p.res.Release != nil {
		p.res.Release()
	}
	p.res, p.diverging, p.code = tiering.Result{}, nil, codeNone
}

// ended is a context whose time is over: a read with it returns what is here and begins to fetch the rest.
var ended = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// coldWait is how long a fetch waits at least for bytes from the object store, when nothing else is there.
const coldWait = 500 * time.Millisecond

// fetchOnce reads every partition once, anew. Partitions whose bytes must come from the object store do not hold up those that have theirs here; only if there is
// nothing else are they waited for.
func (r *request) fetchOnce(f *fetchRequest, parts []*fetchPart, wait time.Duration) (bytes int) {
	for _, p := range parts {
		p.reset()
	}
	limit := r.reserve(f, parts)
	cold := false
	for _, p := range parts {
		r.readPart(ended, limit, p, &bytes)
		cold = cold || p.code == codeNone && p.res.Bytes == 0 && p.offset < p.sealedEnd && p.offset < p.high
	}
	r.hold(int64(bytes))
	if bytes > 0 || !cold {
		return bytes
	}
	ctx, cancel := r.timeout(max(wait, coldWait))
	defer cancel()
	for _, p := range parts { // what is waited for lies in the cache, whose bytes are bounded by themselves
		if p.code == codeNone && p.offset < p.sealedEnd {
			if bytes > 0 {
				r.readPart(ended, limit, p, &bytes)
			} else {
				r.readPart(ctx, limit, p, &bytes)
			}
		}
	}
	r.hold(int64(bytes))
	return bytes
}

func (r *request) readPart(ctx context.Context, most int, p *fetchPart, bytes *int) {
	p.reset()
	p.high, p.logStart = -1, -1
	t, ok := r.topicOf(p)
	if !ok {
		return
	}
	tp := record.TopicPartition{Topic: t.ID, Partition: p.partition}
	info, err := r.s.b.Partition(tp)
	if p.code = codeOf(err); p.code != codeNone {
		return
	}
	p.high, p.logStart, p.sealedEnd = info.HighWatermark, info.LogStart, info.SealedEnd
	if p.code = checkEpoch(p.epoch, info.LeaderEpoch); p.code != codeNone {
		return
	}
	if r.diverges(p, tp, &info) != nil { // never a guess either: the end of what is applied here is not the end of an epoch
		if info, p.code = r.proven(tp, t.Partitions[p.partition].Shard); p.code != codeNone {
			return
		}
		if p.diverging = r.diverges(p, tp, &info); p.diverging != nil {
			return
		}
		p.high, p.logStart, p.sealedEnd = info.HighWatermark, info.LogStart, info.SealedEnd
	}
	if planted.On(planted.GuessedOutOfRange) && p.offset > info.HighWatermark {
		p.code = codeOffsetOutOfRange
		return
	}
	if p.offset > info.HighWatermark { // never a guess: what was acknowledged before this request must be applied here first
		var code int16
		if info, code = r.proven(tp, t.Partitions[p.partition].Shard); code == codeOffsetNotAvailable {
			p.code = code
			return
		}
		if code != codeNone || p.offset > info.HighWatermark {
			p.code = codeOffsetOutOfRange
			return
		}
	}
	limit := min(int(p.maxBytes), most-*bytes)
	if limit <= 0 && *bytes > 0 {
		return
	}
	res, err := r.s.read.Read(ctx, tp, p.offset, tiering.Limits{MaxBytes: limit, AtLeastOne: *bytes == 0, UpTo: info.LastStableOffset})
	if p.code = codeOf(err); p.code == codeNone {
		p.res = res
		*bytes += res.Bytes
	}
}

// proven returns a partition's state as it is once all is applied here that was acknowledged before the call.
func (r *request) proven(tp record.TopicPartition, s record.ShardID) (state.PartitionInfo, int16) {
	ctx, cancel := r.timeout(time.Second)
	err := r.s.b.Prove(ctx, s)
	cancel()
	if err != nil {
		return state.PartitionInfo{}, codeOffsetNotAvailable
	}
	info, err := r.s.b.Partition(tp)
	return info, codeOf(err)
}

// diverges compares what a client last fetched with what is applied here; nil if it is of this history.
func (r *request) diverges(p *fetchPart, tp record.TopicPartition, info *state.PartitionInfo) *divergence {
	if p.lastEpoch < 0 {
		return nil
	}
	last := min(record.LeaderEpoch(p.lastEpoch), info.LeaderEpoch) // one that has not been here diverges at the end of what has
	if e, end, err := r.s.b.EpochEnd(tp, last); err == nil && end >= 0 && (int32(e) < p.lastEpoch || end < p.offset) {
		return &divergence{e, end}
	}
	return nil
}

// topicOf finds a partition's topic, by ID or by name, and completes the other of the two.
func (r *request) topicOf(p *fetchPart) (*state.Topic, bool) {
	var t *state.Topic
	ok := false
	unknown := codeUnknownTopicOrPartition
	if p.name == "" {
		unknown = codeUnknownTopicID
		t, ok = r.s.b.Cluster().TopicByID(p.id)
	} else if t, ok = r.s.b.Cluster().Topic(p.name); ok {
		p.id = t.ID
	}
	switch {
	case !ok:
		p.code = unknown
	case p.partition < 0 || int(p.partition) >= len(t.Partitions):
		p.code = codeUnknownTopicOrPartition
		ok = false
	}
	return t, ok
}

func encodeFetchError(r *request, code int16) *writer {
	w := r.respond(32)
	w.i32(0)
	if r.version >= 7 {
		w.i16(code)
		w.i32(0)
	}
	w.array(0)
	w.tags()
	return w
}

// sendFetch writes the answer. Batches are not copied: they go out as they lie in the log or the cache, and are released when they have been written.
func (r *request) sendFetch(f *fetchRequest, ses *session, parts []*fetchPart) {
	send := ses.changed(parts)
	r.rotate(ses)
	bufs := r.encodeFetch(f, ses, send)
	var release []func()
	for _, p := range parts { // the session's next request may begin before this answer has been written
		if p.res.Release != nil {
			release = append(release, p.res.Release)
			p.res.Release = nil
		}
	}
	r.answerWith(bufs, func() {
		for _, f := range release {
			f()
		}
		r.hold(0)
	})
}

func (r *request) rotate(ses *session) {
	if ses != nil {
		ses.rotate()
	}
}

func (r *request) encodeFetch(f *fetchRequest, ses *session, parts []*fetchPart) net.Buffers {
	w := r.respond(128 + 64*len(parts))
	w.i32(0)
	if r.version >= 7 {
		w.i16(codeNone)
		w.i32(ses.idOf())
	}
	groups := byTopic(parts)
	w.array(len(groups))
	h := hints{r: r}
	var bufs net.Buffers
	start, total := 0, 0
	for _, g := range groups {
		if r.version >= 13 {
			w.uuid(g[0].id)
		} else {
			w.str(g[0].name)
		}
		w.array(len(g))
		for _, p := range g {
			r.encodeFetchPart(w, p, f.committed)
			if p.res.Bytes > 0 {
				r.s.m.byTier[p.res.Tier].Add(float64(p.res.Bytes))
				bufs = append(bufs, w.b[start:len(w.b):len(w.b)])
				bufs = append(bufs, p.res.Buffers...)
				start, total = len(w.b), total+p.res.Bytes
			}
			r.endFetchPart(w, p, &h)
		}
		w.tags()
	}
	if r.version >= 16 {
		w.tagged(h.endpoints(0)...)
	} else {
		w.tags()
	}
	bufs = append(bufs, w.b[start:])
	size := total + len(w.b) - 4
	first := bufs[0] // the length stands in the first piece, wherever the writer has moved since
	first[0], first[1], first[2], first[3] = byte(size>>24), byte(size>>16), byte(size>>8), byte(size)
	return bufs
}

func (r *request) encodeFetchPart(w *writer, p *fetchPart, committed bool) {
	if p.code != codeNone {
		r.s.m.failedFetch.WithLabelValues("all").Inc()
	}
	w.i32(p.partition)
	w.i16(p.code)
	w.i64(int64(p.high))
	w.i64(int64(p.high)) // last stable offset: without transactions the high watermark
	if r.version >= 5 {
		w.i64(int64(p.logStart))
	}
	if committed { // no aborted transactions: empty, or null where they were not asked for
		w.array(0)
	} else {
		w.array(-1)
	}
	if r.version >= 11 {
		w.i32(-1)
	}
	if w.flex { // record bytes, whose length is known and whose bytes follow as they are
		w.uvarint(uint32(p.res.Bytes) + 1)
	} else {
		w.i32(int32(p.res.Bytes))
	}
}

// endFetchPart writes a partition's tagged fields: tag 0 is the diverging epoch, tag 1 the leader.
func (r *request) endFetchPart(w *writer, p *fetchPart, h *hints) {
	var fields []taggedField
	if w.flex && p.diverging != nil {
		b := binary.BigEndian.AppendUint32(nil, uint32(p.diverging.epoch))
		fields = append(fields, taggedField{0, append(binary.BigEndian.AppendUint64(b, uint64(p.diverging.end)), 0)})
	}
	if w.flex && p.code != codeNone {
		t, _ := r.s.b.Cluster().TopicByID(p.id)
		fields = append(fields, h.leader(1, p.code, t, p.partition)...)
	}
	w.tagged(fields...)
}

// byTopic groups consecutive partitions of a topic.
func byTopic(parts []*fetchPart) (out [][]*fetchPart) {
	for i := 0; i < len(parts); {
		j := i + 1
		for j < len(parts) && parts[j].name == parts[i].name && parts[j].id == parts[i].id {
			j++
		}
		out = append(out, parts[i:j])
		i = j
	}
	return out
}
