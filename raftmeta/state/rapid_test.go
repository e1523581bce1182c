package state

import (
	"bytes"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"

	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
	"pgregory.net/rapid"
)

// A shard beside a model that says what it should answer, and beside shards that were restored from its snapshots at any moment and have been given the same entries since. rapid draws
// the commands, shrinks what fails and prints it; -rapid.seed repeats it.

type modelBatch struct {
	first, last record.Sequence
	base        record.Offset
}

type modelProducer struct {
	epoch record.ProducerEpoch
	at    record.Timestamp
	seen  []modelBatch
}

type modelRun struct {
	first, last record.Offset
	object      segment.Number
}

type modelPart struct {
	start, sealed, high record.Offset
	runs                []modelRun
	producers           map[record.ProducerID]*modelProducer
}

type modelObject struct {
	crc  uint32
	runs []segment.PartitionRun
}

type shardRun struct {
	m       *machine
	clock   record.Timestamp // the largest that was told
	untimed bool             // the last entry had no time
	stood   bool             // a producer was stamped by such an entry
	parts   map[int]*modelPart
	groups  map[string]map[record.TopicPartition]record.Offset
	objects map[segment.Number]modelObject // committed
	twins   []*Shard
	kept    []Frozen
	bytes   [][]byte // of kept, when they were taken
}

const (
	modelParts  = 5
	modelWindow = 5 // Kafka's: repeats of the last five batches are recognised
)

func newShardRun(t *rapid.T) *shardRun {
	r := &shardRun{parts: map[int]*modelPart{}, groups: map[string]map[record.TopicPartition]record.Offset{}, objects: map[segment.Number]modelObject{}}
	n := rapid.IntRange(1, modelParts).Draw(t, "partitions")
	r.m = newMachine(t, n)
	r.clock = r.m.clock
	for p := range n {
		r.parts[p] = &modelPart{producers: map[record.ProducerID]*modelProducer{}}
	}
	return r
}

// entry applies an entry to the shard and its twins, which must answer the same.
func (r *shardRun) entry(t *rapid.T, e *Entry, payload int, trusted bool) Applied {
	r.m.t = t
	now := r.m.clock
	if !trusted {
		r.m.clock = 0
	}
	if r.stood && !r.m.s.stood {
		t.Fatal("a producer was given the time at which the clock stopped, and it is not known")
	}
	if was := r.clock; trusted {
		if r.clock = max(was, r.m.clock); r.m.s.stood && r.clock > was { // what was stamped while the clock stood is as old as that
			for _, p := range r.parts {
				for _, pr := range p.producers {
					if pr.at == was {
						pr.at = r.clock
					}
				}
			}
		}
		r.stood = false
	}
	r.untimed = !trusted
	a := r.m.entry(e, payload)
	r.m.clock = now
	for i, twin := range r.twins {
		b := twin.Apply(r.m.index, r.m.term, r.m.log[len(r.m.log)-1])
		if !same(a, b) {
			t.Fatalf("restored shard %d answers %+v, the one that it was taken from %+v", i, b, a)
		}
	}
	return a
}

// same compares answers; none and an empty list are the same.
func same(a, b Applied) bool {
	return slices.Equal(a.Appends, b.Appends) && slices.EqualFunc(a.Results, b.Results, func(x, y Result) bool { return reflect.DeepEqual(x, y) }) &&
		slices.Equal(sortedTPs(a.Dirty), sortedTPs(b.Dirty)) && slices.Equal(a.Dropped, b.Dropped) && a.Void == b.Void
}

// sortedTPs: of a dropped topic they are told in no order.
func sortedTPs(tps []record.TopicPartition) []record.TopicPartition {
	out := slices.Clone(tps)
	slices.SortFunc(out, compareTP)
	return out
}

func (r *shardRun) do(t *rapid.T, c Command) Result {
	var e Entry
	if _, err := e.Add(c); err != nil {
		t.Fatal(err)
	}
	return r.entry(t, &e, 0, rapid.IntRange(0, 5).Draw(t, "trusted") > 0).Results[0]
}

func drawPart(t *rapid.T) int { return rapid.IntRange(0, modelParts-1).Draw(t, "partition") }

// append draws batches: of no producer, in sequence, repeated, with a gap, of an older or newer epoch.
func (r *shardRun) append(t *rapid.T) {
	type asked struct {
		p    int
		slot Slot
	}
	var all []asked
	for range rapid.IntRange(1, 6).Draw(t, "batches") {
		p, n := rapid.SampledFrom([]int{0, 0, 0, 1, 2, 3, 4}).Draw(t, "partition"), rapid.Int32Range(1, 4).Draw(t, "records") // often the same: a window must fill
		id := record.ProducerID(rapid.SampledFrom([]int{-1, 0, 0, 1}).Draw(t, "producer"))
		if id < 0 {
			all = append(all, asked{p, r.m.batch(p, n, -1, -1, -1)})
			continue
		}
		epoch, seq := record.ProducerEpoch(rapid.IntRange(0, 2).Draw(t, "epoch")), record.Sequence(rapid.IntRange(0, 3).Draw(t, "sequence"))
		if pr := r.producer(p, id); pr != nil {
			switch how := rapid.IntRange(0, 9).Draw(t, "how"); {
			case how < 6:
				epoch, seq = pr.epoch, pr.seen[len(pr.seen)-1].last.Add(1)
			case how < 9:
				b := pr.seen[len(pr.seen)-rapid.IntRange(1, min(len(pr.seen), modelWindow+1)).Draw(t, "back")]
				epoch, seq, n = pr.epoch, b.first, int32(b.last-b.first)+1
			}
		}
		all = append(all, asked{p, r.m.batch(p, n, id, epoch, seq)})
	}
	var e Entry
	for _, a := range all {
		e.AddSlot(a.slot)
	}
	trusted := rapid.Bool().Draw(t, "trusted")
	got := slices.Clone(r.entry(t, &e, 100*len(all), trusted).Appends)
	slices.SortStableFunc(all, func(a, b asked) int { return int(a.slot.Handle) - int(b.slot.Handle) }) // as the directory has them
	for i, a := range all {
		want := AppendResult{Code: UnknownPartition, Base: -1, LogStart: -1}
		if part := r.parts[a.p]; part != nil {
			want = part.append(&a.slot, r.clock)
			r.stood = r.stood || r.untimed && want.Code == OK && a.slot.ProducerID >= 0
		}
		if got[i] != want {
			t.Fatalf("batch %d of partition %d: %+v, want %+v", i, a.p, got[i], want)
		}
	}
}

func (r *shardRun) producer(p int, id record.ProducerID) *modelProducer {
	if part := r.parts[p]; part != nil {
		return part.producers[id]
	}
	return nil
}

// append is what Kafka would answer.
func (p *modelPart) append(s *Slot, now record.Timestamp) AppendResult {
	refused := func(c Code) AppendResult { return AppendResult{c, -1, p.start} }
	last := s.BaseSequence.Add(s.Count - 1)
	pr := p.producers[s.ProducerID]
	switch {
	case s.ProducerID < 0:
	case pr == nil:
		pr = &modelProducer{epoch: s.ProducerEpoch}
	case s.ProducerEpoch < pr.epoch:
		return refused(InvalidProducerEpoch)
	case s.ProducerEpoch > pr.epoch:
		if s.BaseSequence != 0 {
			return refused(OutOfOrderSequence)
		}
		pr = &modelProducer{epoch: s.ProducerEpoch}
	default:
		for _, b := range pr.seen[max(0, len(pr.seen)-modelWindow):] {
			if b.first == s.BaseSequence && b.last == last {
				return AppendResult{Duplicate, b.base, p.start}
			}
		}
		if s.BaseSequence != pr.seen[len(pr.seen)-1].last.Add(1) {
			return refused(OutOfOrderSequence)
		}
	}
	base := p.high
	p.high += record.Offset(s.Count)
	if pr != nil {
		pr.at, pr.seen = now, append(pr.seen, modelBatch{s.BaseSequence, last, base})
		p.producers[s.ProducerID] = pr
	}
	return AppendResult{OK, base, p.start}
}

// seal prepares and commits an object with runs that fit, overlap, leave gaps or reach too far.
func (r *shardRun) seal(t *rapid.T) {
	c := Commit{CRC32C: rapid.Uint32().Draw(t, "crc"), Size: 10}
	plan := Prepare{Plan: segment.Plan{UUID: segment.UUID{byte(r.m.index), byte(r.m.index >> 8)}}, TTLMs: rapid.Int64Range(1, 300).Draw(t, "ttl")}
	o := r.do(t, plan).Value.(segment.Object)
	if rapid.IntRange(0, 4).Draw(t, "abandoned") == 0 {
		return
	}
	c.Number = o.Number
	for p := range modelParts {
		part := r.parts[p]
		if part == nil {
			part = &modelPart{}
		}
		if rapid.Bool().Draw(t, "sealed") {
			first := max(0, part.sealed+record.Offset(rapid.IntRange(-3, 2).Draw(t, "first")))
			last := first + record.Offset(rapid.IntRange(0, int(part.high-part.sealed)+3).Draw(t, "last"))
			c.Runs = append(c.Runs, run(p, first, last))
		}
	}
	got := r.do(t, c).Value.([]Verdict)
	for i, x := range c.Runs {
		if want := r.verdict(x, c.Number); got[i] != want {
			t.Fatalf("run %+v of %+v: verdict %d, want %d", x, r.parts[partOf(x.TP)], got[i], want)
		}
	}
	r.objects[c.Number] = modelObject{c.CRC32C, c.Runs}
}

func partOf(tp record.TopicPartition) int { return int(tp.Topic[0]-1)*4 + int(tp.Partition) }

func (r *shardRun) verdict(x segment.PartitionRun, number segment.Number) Verdict {
	p, first, last := r.parts[partOf(x.TP)], x.Run.StartOffset, x.Run.EndOffset
	if p == nil || first > p.sealed || last < p.sealed || last >= p.high {
		return Rejected
	}
	v := Accepted
	if first < p.sealed {
		first, v = p.sealed, Trimmed
	}
	p.runs, p.sealed = append(p.runs, modelRun{first, last, number}), last+1
	return v
}

// commitAgain repeats a commit whose answer was lost: what was taken is still taken, and nothing else changes.
func (r *shardRun) commitAgain(t *rapid.T) {
	if len(r.objects) == 0 {
		t.Skip("nothing was committed")
	}
	n := rapid.SampledFrom(slices.Sorted(maps.Keys(r.objects))).Draw(t, "object")
	o, ok := r.m.s.Object(n)
	res := r.do(t, Commit{Number: n, CRC32C: r.objects[n].crc, Size: 10, Runs: r.objects[n].runs})
	if !ok || o.State != segment.Committed {
		if res.Code != Stale {
			t.Fatalf("a commit of object %d, which is gone: %+v", n, res)
		}
		return
	}
	for i, x := range r.objects[n].runs {
		want := Rejected
		if p := r.parts[partOf(x.TP)]; p != nil && slices.ContainsFunc(p.runs, func(m modelRun) bool { return m.object == n }) {
			want = Accepted
		}
		if got := res.Value.([]Verdict)[i]; got != want {
			t.Fatalf("run %+v committed again: verdict %d, want %d", x, got, want)
		}
	}
}

func (r *shardRun) advance(t *rapid.T) {
	p := drawPart(t)
	part := r.parts[p]
	to := record.Offset(-1)
	if part != nil {
		to = record.Offset(rapid.IntRange(-1, int(part.high)+1).Draw(t, "to"))
	}
	got := r.do(t, AdvanceLogStart{TP: tp(p), To: to})
	switch {
	case part == nil:
		if got.Code != UnknownPartition {
			t.Fatalf("no partition: %+v", got)
		}
	case to > part.high:
		if got.Code != OffsetOutOfRange {
			t.Fatalf("%d of %d: %+v", to, part.high, got)
		}
	default:
		if to < 0 {
			to = part.high
		}
		part.start, part.sealed = max(part.start, to), max(part.sealed, to)
		part.runs = slices.DeleteFunc(part.runs, func(x modelRun) bool { return x.last < part.start })
		if got.Value != part.start {
			t.Fatalf("log start %v, want %d", got.Value, part.start)
		}
	}
}

// sweep expires producers and prepared objects, and forgets what is doomed.
func (r *shardRun) sweep(t *rapid.T) {
	ms := record.Timestamp(rapid.IntRange(0, 400).Draw(t, "producers"))
	prepared := map[segment.Number]bool{}
	for _, o := range r.m.s.sortedObjects() {
		if o.State == segment.Prepared {
			prepared[o.Number] = o.ExpiresAt > r.clock // as seen before the sweep, whose entry may move the clock
		}
	}
	r.do(t, Sweep{ProducerMs: int64(ms)})
	for _, part := range r.parts {
		maps.DeleteFunc(part.producers, func(_ record.ProducerID, pr *modelProducer) bool { return ms > 0 && pr.at < r.clock-ms })
	}
	for n := range prepared {
		if o, _ := r.m.s.Object(n); (o.State == segment.Prepared) != (o.ExpiresAt > r.clock) {
			t.Fatalf("swept at %d: %+v", r.clock, o)
		}
	}
	var some []segment.Number // whatever they are: only what is doomed may go
	doomed := map[segment.Number]bool{}
	for _, o := range r.m.s.sortedObjects() {
		if rapid.Bool().Draw(t, "forgotten") {
			some, doomed[o.Number] = append(some, o.Number), o.State == segment.Tombstoned
		}
	}
	r.do(t, Forget{Numbers: some})
	for _, n := range some {
		if _, ok := r.m.s.Object(n); ok == doomed[n] {
			t.Fatalf("object %d is there: %v, it was doomed: %v", n, ok, doomed[n])
		}
	}
}

// prepareAgain repeats a Prepare whose answer was lost.
func (r *shardRun) prepareAgain(t *rapid.T) {
	var prepared []segment.Object
	for _, o := range r.m.s.sortedObjects() {
		if o.State == segment.Prepared {
			prepared = append(prepared, *o)
		}
	}
	if len(prepared) == 0 {
		t.Skip("nothing is prepared")
	}
	o := rapid.SampledFrom(prepared).Draw(t, "object")
	got := r.do(t, Prepare{Plan: o.Plan, TTLMs: 9}).Value.(segment.Object)
	if now, _ := r.m.s.Object(o.Number); got != now || now.ExpiresAt < o.ExpiresAt {
		t.Fatalf("prepared again: %+v, it was %+v", got, o)
	}
}

// void proposes in one term and stores under another: nothing happens.
func (r *shardRun) void(t *rapid.T) {
	var e Entry
	e.AddSlot(r.m.batch(drawPart(t), 1, -1, -1, -1))
	data, _ := e.Cut(r.m.term, make([]byte, 100), r.m.clock+1000, nil)
	r.m.index++
	r.m.term++
	r.m.log, r.m.terms = append(r.m.log, data), append(r.m.terms, r.m.term)
	if !r.m.s.Apply(r.m.index, r.m.term, data).Void {
		t.Fatal("an entry of another term was applied")
	}
	for _, twin := range r.twins {
		twin.Apply(r.m.index, r.m.term, data)
	}
}

// effects makes, drops and configures partitions; what was carried out before is refused.
func (r *shardRun) effects(t *rapid.T) {
	from := r.m.s.Cursor() + 1
	stale := rapid.IntRange(0, 3).Draw(t, "stale") == 0
	if stale {
		from = uint64(rapid.IntRange(0, int(from)+2).Draw(t, "from"))
	}
	var all []Effect
	for range rapid.IntRange(1, 3).Draw(t, "effects") {
		p := drawPart(t)
		switch rapid.IntRange(0, 4).Draw(t, "effect") {
		case 0:
			all = append(all, Effect{DropTopic: &DropTopic{tp(p).Topic}})
		case 1:
			all = append(all, Effect{SetConfig: &SetConfig{tp(p).Topic, PartitionConfig{RetentionMs: rapid.Int64Range(0, 9).Draw(t, "retention")}}})
		default:
			all = append(all, Effect{EnsurePartition: &EnsurePartition{TP: tp(p)}})
		}
	}
	ordered := from == r.m.s.Cursor()+1
	if got := r.do(t, MetaEffects{From: from, To: from + uint64(len(all)) - 1, Effects: all}); (got.Code == OK) != ordered {
		t.Fatalf("effects from %d: %+v", from, got)
	}
	if !ordered {
		return
	}
	for _, e := range all {
		for p := range modelParts {
			switch {
			case e.EnsurePartition != nil && e.EnsurePartition.TP == tp(p) && r.parts[p] == nil:
				r.parts[p] = &modelPart{producers: map[record.ProducerID]*modelProducer{}}
			case e.DropTopic != nil && e.DropTopic.Topic == tp(p).Topic:
				delete(r.parts, p)
				for _, g := range r.groups {
					delete(g, tp(p))
				}
			}
		}
	}
}

func (r *shardRun) offsets(t *rapid.T) {
	id := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "group")
	switch at := tp(drawPart(t)); rapid.IntRange(0, 4).Draw(t, "what") {
	case 0:
		r.do(t, DeleteGroup{ID: id})
		delete(r.groups, id)
	case 1:
		r.do(t, DeleteOffsets{Group: id, TPs: []record.TopicPartition{at}})
		delete(r.groups[id], at)
	case 2:
		r.do(t, PutGroup{ID: id, ProtocolType: "consumer", Record: []byte{byte(r.m.index)}, Empty: rapid.Bool().Draw(t, "empty")})
		if r.groups[id] == nil {
			r.groups[id] = map[record.TopicPartition]record.Offset{}
		}
	default:
		o := record.Offset(rapid.IntRange(0, 9).Draw(t, "offset"))
		r.do(t, CommitOffsets{Group: id, Offsets: []OffsetCommit{{TP: at, Offset: o}}})
		if r.groups[id] == nil {
			r.groups[id] = map[record.TopicPartition]record.Offset{}
		}
		r.groups[id][at] = o
	}
}

// snapshot restores a twin from this moment's snapshot, and keeps the frozen state.
func (r *shardRun) snapshot(t *rapid.T) {
	frozen := r.m.s.Freeze()
	taken := snapshotOf(t, frozen)
	twin, err := RestoreShard(bytes.NewReader(taken))
	if err != nil {
		t.Fatal(err)
	}
	if again := snapshotOf(t, twin.Freeze()); !bytes.Equal(taken, again) {
		t.Fatalf("restored:\n%s\ntaken:\n%s", again, taken)
	}
	r.kept, r.bytes = append(r.kept, frozen), append(r.bytes, taken)
	if r.twins = append(r.twins, twin); len(r.twins) > 3 {
		r.twins = r.twins[1:]
	}
}

func (r *shardRun) check(t *rapid.T) {
	r.m.t = t
	r.m.verify()
	if got := r.m.s.Clock(); got != r.clock {
		t.Fatalf("the clock is %d, %d was told", got, r.clock)
	}
	for p := range modelParts {
		got, ok := r.m.s.Partition(tp(p))
		want := r.parts[p]
		if ok != (want != nil) {
			t.Fatalf("partition %d is there: %v", p, ok)
		}
		if !ok {
			continue
		}
		if got.LogStart != want.start || got.SealedEnd != want.sealed || got.HighWatermark != want.high {
			t.Fatalf("partition %d: %+v, want %+v", p, got, want)
		}
		var runs []modelRun
		for _, x := range r.m.s.Runs(tp(p), 0, 1000, nil) {
			runs = append(runs, modelRun{x.StartOffset, x.EndOffset, x.Object})
			if o, ok := r.m.s.Object(x.Object); !ok || o.State != segment.Committed {
				t.Fatalf("partition %d refers to object %d: %+v", p, x.Object, o)
			}
		}
		if !slices.Equal(runs, want.runs) {
			t.Fatalf("partition %d has runs %v, want %v", p, runs, want.runs)
		}
	}
	for _, id := range []string{"a", "b"} {
		got := map[record.TopicPartition]record.Offset{}
		if g := r.m.s.Group(id); g != nil {
			for at, o := range g.Offsets {
				got[at] = o.Offset
			}
		}
		if want := r.groups[id]; !maps.Equal(got, want) {
			t.Fatalf("group %s has offsets %v, want %v", id, got, want)
		}
	}
	if len(r.twins) == 0 {
		return
	}
	want := snapshotOf(t, r.m.s.Freeze())
	for i, twin := range r.twins {
		if got := snapshotOf(t, twin.Freeze()); !bytes.Equal(got, want) {
			t.Fatalf("restored shard %d:\n%s\nwant:\n%s", i, got, want)
		}
	}
}

// end replays everything from the beginning, and looks at what was frozen on the way.
func (r *shardRun) end(t *rapid.T) {
	fresh := newest(1)
	for i, data := range r.m.log {
		fresh.Apply(RaftIndex(i+1), r.m.terms[i], data)
	}
	if got, want := snapshotOf(t, fresh.Freeze()), snapshotOf(t, r.m.s.Freeze()); !bytes.Equal(got, want) {
		t.Fatalf("replayed:\n%s\nwant:\n%s", got, want)
	}
	for i := range r.kept {
		if got := snapshotOf(t, r.kept[i]); !bytes.Equal(got, r.bytes[i]) {
			t.Fatalf("a frozen state has changed:\n%s\nwas:\n%s", got, r.bytes[i])
		}
	}
}

func TestShardAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newShardRun(t)
		t.Repeat(map[string]func(*rapid.T){
			"append": r.append, "append more": r.append, "seal": r.seal, "prepare again": r.prepareAgain, "commit again": r.commitAgain, "advance": r.advance, "sweep": r.sweep, "void": r.void, "effects": r.effects,
			"offsets": r.offsets, "snapshot": r.snapshot,
			"time": func(t *rapid.T) { r.m.clock += record.Timestamp(rapid.IntRange(1, 200).Draw(t, "ms")) },
			"term": func(t *rapid.T) {
				r.m.term += Term(rapid.IntRange(1, 3).Draw(t, "terms"))
				r.do(t, LeaderStart{Term: r.m.term, Node: 1})
			},
			"": r.check,
		})
		r.m.t = t
		r.end(t)
	})
}

// metaRun is meta with its shards, to which what it decides is told, and metas restored from its snapshots.
type metaRun struct {
	m      *Meta
	index  RaftIndex
	shards map[record.ShardID]*Shard
	twins  []*Meta
	topics map[record.TopicID]*modelTopic
	next   record.ProducerID
	made   byte
	views  []*Cluster
	texts  []string // of views, when they were taken
}

type modelTopic struct {
	name       string
	partitions int32
	config     PartitionConfig
	configs    map[string]string
}

func (r *metaRun) do(t *rapid.T, c Command) Result {
	var e Entry
	if _, err := e.Add(c); err != nil {
		t.Fatal(err)
	}
	data, _ := e.Cut(1, nil, record.Timestamp(r.index)*10, nil)
	r.index++
	out := r.m.Apply(r.index, 1, data)[0]
	for i, twin := range r.twins {
		if got := twin.Apply(r.index, 1, data)[0]; !reflect.DeepEqual(got, out) {
			t.Fatalf("restored meta %d answers %T with %+v, the one that it was taken from with %+v", i, c, got, out)
		}
	}
	return out
}

func (r *metaRun) bytes(t *rapid.T, m *Meta) []byte {
	var b bytes.Buffer
	f := m.Freeze()
	if _, err := f.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (r *metaRun) drawTopic(t *rapid.T) (id record.TopicID) {
	return record.TopicID{byte(rapid.IntRange(1, max(1, int(r.made))).Draw(t, "topic"))}
}

// deliver tells a shard what meta has for it; often again, and from any place.
func (r *metaRun) deliver(t *rapid.T) {
	s := record.ShardID(rapid.IntRange(1, len(r.shards)).Draw(t, "shard"))
	after := r.shards[s].Cursor()
	if rapid.IntRange(0, 3).Draw(t, "again") == 0 {
		after = uint64(rapid.IntRange(0, int(after)).Draw(t, "after"))
	}
	first, effects := r.m.Outbox(s, after)
	if len(effects) == 0 {
		return
	}
	effects = effects[:rapid.IntRange(1, len(effects)).Draw(t, "effects")]
	var e Entry
	if _, err := e.Add(MetaEffects{From: first, To: first + uint64(len(effects)) - 1, Effects: effects}); err != nil {
		t.Fatal(err)
	}
	data, _ := e.Cut(1, nil, 0, nil)
	r.shards[s].Apply(r.shards[s].Applied()+1, 1, data)
}

func (r *metaRun) trim(t *rapid.T) {
	s := record.ShardID(rapid.IntRange(1, len(r.shards)).Draw(t, "shard"))
	if c := r.shards[s].Cursor(); c > 0 {
		r.do(t, TrimOutbox{Shard: s, To: uint64(rapid.IntRange(1, int(c)).Draw(t, "to"))})
	}
}

func (r *metaRun) create(t *rapid.T) {
	name := rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "name")
	n := rapid.Int32Range(0, 5).Draw(t, "partitions")
	taken := false
	for _, x := range r.topics {
		taken = taken || x.name == name
	}
	r.made++
	id := record.TopicID{r.made}
	got := r.do(t, CreateTopic{ID: id, Name: name, Partitions: n, ReplicationFactor: 3, Config: PartitionConfig{RetentionMs: 5}})
	want := OK
	switch {
	case taken:
		want = Exists
	case n < 1:
		want = Invalid
	default:
		r.topics[id] = &modelTopic{name, n, PartitionConfig{RetentionMs: 5}, map[string]string{}}
	}
	if got.Code != want {
		t.Fatalf("creating topic %s with %d partitions: %d, want %d", name, n, got.Code, want)
	}
}

// change deletes, grows or configures a topic.
func (r *metaRun) change(t *rapid.T) {
	id := r.drawTopic(t)
	x, want := r.topics[id], OK
	var c Command
	switch rapid.IntRange(0, 2).Draw(t, "change") {
	case 0:
		c = DeleteTopic{ID: id}
		delete(r.topics, id)
	case 1:
		total := rapid.Int32Range(1, 9).Draw(t, "total")
		c = CreatePartitions{ID: id, Total: total}
		if x != nil && total <= x.partitions {
			want = Invalid
		} else if x != nil {
			x.partitions = total
		}
	case 2:
		cfg := PartitionConfig{RetentionMs: rapid.Int64Range(1, 3).Draw(t, "retention")}
		c = AlterConfigs{Topic: id, Set: map[string]string{"k": fmt.Sprint(cfg.RetentionMs)}, Config: cfg}
		if x != nil {
			x.config, x.configs = cfg, map[string]string{"k": fmt.Sprint(cfg.RetentionMs)}
		}
	}
	if x == nil {
		want = NotFound
	}
	if got := r.do(t, c); got.Code != want {
		t.Fatalf("%+v: %d, want %d", c, got.Code, want)
	}
}

func (r *metaRun) allocate(t *rapid.T) {
	n := rapid.Int64Range(1, 1000).Draw(t, "count")
	if got := r.do(t, AllocateProducerIDs{n}).Value; got != r.next {
		t.Fatalf("producer IDs from %v, want %d", got, r.next)
	}
	r.next += record.ProducerID(n)
}

// members does what operators do; the answers are those of a restored twin, and one member stays.
func (r *metaRun) members(t *rapid.T) {
	id := rapid.Int32Range(1, 5).Draw(t, "node")
	c := rapid.SampledFrom([]Command{RegisterNode{Node{ID: id, Rack: fmt.Sprint(id % 2), Peer: "p"}}, RegisterNode{Node{ID: id, Peer: "p", Level: LevelNewest}}, AlterMembers{Add: []int32{id}}, AlterMembers{Remove: []int32{id}}, Drain{id, true}, Drain{id, false},
		PreferLeader{record.ShardID(id % 3), id}, ForgetNode{id}, AlterConfigs{Set: map[string]string{"x": fmt.Sprint(id)}}}).Draw(t, "command")
	r.do(t, c)
	if v := r.m.View(); len(v.Behind(v.FeatureLevel())) > 0 {
		t.Fatalf("%v is a member of a cluster of level %d after %+v", v.Behind(v.FeatureLevel()), v.FeatureLevel(), c)
	} else if len(v.Members()) == 0 || len(v.Leaders(1)) == 0 {
		t.Fatalf("no member is left after %+v", c)
	}
}

func (r *metaRun) addShards(t *rapid.T) {
	total := rapid.IntRange(1, 5).Draw(t, "total")
	got := r.do(t, AddShards{Total: uint32(total), Founders: []string{"1.a"}})
	if (got.Code == OK) != (total > len(r.shards)) {
		t.Fatalf("%d shards instead of %d: %d", total, len(r.shards), got.Code)
	}
	for s := len(r.shards) + 1; s <= total; s++ {
		r.shards[record.ShardID(s)] = NewShard(record.ShardID(s))
	}
}

// raise asks for a level, which nodes that have registered with an older program keep the cluster from.
func (r *metaRun) raise(t *rapid.T) {
	to := rapid.Uint32Range(0, LevelNewest).Draw(t, "level")
	before := r.m.View()
	got, want := r.do(t, RaiseFeatureLevel{to}), OK
	if len(before.Behind(to)) > 0 {
		want = Invalid
	}
	if after := r.m.View().FeatureLevel(); got.Code != want || want == OK && after != max(to, before.FeatureLevel()) || want != OK && after != before.FeatureLevel() {
		t.Fatalf("raised from %d to %d: level %d, %+v", before.FeatureLevel(), to, after, got)
	}
}

func (r *metaRun) snapshot(t *rapid.T) {
	taken := r.bytes(t, r.m)
	twin, err := RestoreMeta(bytes.NewReader(taken))
	if err != nil {
		t.Fatal(err)
	}
	if r.twins = append(r.twins, twin); len(r.twins) > 3 {
		r.twins = r.twins[1:]
	}
	v := r.m.View()
	r.views, r.texts = append(r.views, v), append(r.texts, describe(v))
}

// describe is everything that readers see of a view.
func describe(c *Cluster) string {
	out := fmt.Sprintln(c.ID, c.Shards, c.level, c.Version, c.Registered(), c.Members(), c.place, c.configs, c.slots)
	for x := range c.Topics() {
		out += fmt.Sprintln(*x)
	}
	return out
}

func (r *metaRun) check(t *rapid.T) {
	v := r.m.View()
	if v.TopicCount() != len(r.topics) {
		t.Fatalf("%d topics, want %d", v.TopicCount(), len(r.topics))
	}
	for id, want := range r.topics {
		got, ok := v.TopicByID(id)
		if !ok || got.Name != want.name || len(got.Partitions) != int(want.partitions) || got.Config != want.config || !maps.Equal(got.Configs, want.configs) {
			t.Fatalf("topic %s: %+v, want %+v", id, got, want)
		}
	}
	want := r.bytes(t, r.m)
	for i, twin := range r.twins {
		if got := r.bytes(t, twin); !bytes.Equal(got, want) {
			t.Fatalf("restored meta %d:\n%s\nwant:\n%s", i, got, want)
		}
	}
}

// end delivers everything: each shard then has the partitions that meta says, with the topics' configuration, and no others.
func (r *metaRun) end(t *rapid.T) {
	for s, shard := range r.shards {
		first, effects := r.m.Outbox(s, shard.Cursor())
		if len(effects) > 0 {
			var e Entry
			if _, err := e.Add(MetaEffects{From: first, To: first + uint64(len(effects)) - 1, Effects: effects}); err != nil {
				t.Fatal(err)
			}
			data, _ := e.Cut(1, nil, 0, nil)
			if res := shard.Apply(shard.Applied()+1, 1, data).Results[0]; res.Code != OK {
				t.Fatalf("shard %d does not take effects %d to %d: %+v", s, first, first+uint64(len(effects))-1, res)
			}
		}
		if got, want := shard.FeatureLevel(), r.m.View().FeatureLevel(); got != want {
			t.Fatalf("shard %d is at level %d, meta at %d", s, got, want)
		}
		want := map[record.TopicPartition]PartitionConfig{}
		for x := range r.m.View().Topics() {
			for i, p := range x.Partitions {
				if p.Shard == s {
					want[record.TopicPartition{Topic: x.ID, Partition: int32(i)}] = x.Config
				}
			}
		}
		got := map[record.TopicPartition]PartitionConfig{}
		for p := range shard.Partitions() {
			got[p.TP] = p.Config
		}
		if !maps.Equal(got, want) {
			t.Fatalf("shard %d has %v, meta says %v", s, got, want)
		}
	}
	for i, v := range r.views {
		if got := describe(v); got != r.texts[i] {
			t.Fatalf("a view has changed:\n%s\nwas:\n%s", got, r.texts[i])
		}
	}
}

func TestMetaAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := &metaRun{m: NewMeta(), shards: map[record.ShardID]*Shard{}, topics: map[record.TopicID]*modelTopic{}}
		n := rapid.IntRange(1, 3).Draw(t, "shards")
		for s := range n {
			r.shards[record.ShardID(s+1)] = NewShard(record.ShardID(s + 1))
		}
		r.do(t, InitCluster{ClusterID: "c", Shards: uint32(n), Members: []int32{1}})
		r.do(t, RegisterNode{Node{ID: 1}})
		t.Repeat(map[string]func(*rapid.T){"create": r.create, "change": r.change, "change more": r.change, "allocate": r.allocate, "members": r.members, "shards": r.addShards, "raise": r.raise, "deliver": r.deliver,
			"trim": r.trim, "snapshot": r.snapshot, "": r.check})
		r.end(t)
	})
}
