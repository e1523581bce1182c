package state

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
	"github.com/google/go-cmp/cmp"
)

// tester is what a test and a run of rapid have in common.
type tester interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// machine drives a shard with entries and keeps them for replay.
type machine struct {
	t     tester
	s     *Shard
	index RaftIndex
	term  Term
	clock record.Timestamp
	log   [][]byte
	terms []Term
}

// newest is a shard that begins with the newest feature level.
func newest(id record.ShardID) *Shard {
	s := NewShard(id)
	s.level = LevelNewest
	return s
}

func newMachine(t tester, partitions int) *machine {
	m := &machine{t: t, s: newest(1), term: 1, clock: 1000}
	m.do(LeaderStart{Term: 1, Node: 1})
	var effects []Effect
	for p := range partitions {
		effects = append(effects, Effect{EnsurePartition: &EnsurePartition{TP: tp(p), Config: PartitionConfig{RetentionMs: -1, RetentionBytes: -1}}})
	}
	if r := m.do(MetaEffects{From: 1, To: uint64(partitions), Effects: effects}); r.Code != OK {
		t.Fatalf("effects: %v", r)
	}
	return m
}

func tp(p int) record.TopicPartition {
	return record.TopicPartition{Topic: record.TopicID{byte(1 + p/4)}, Partition: int32(p % 4)}
}

func (m *machine) entry(e *Entry, payload int) Applied {
	m.t.Helper()
	data, _ := e.Cut(m.term, make([]byte, payload), m.clock, nil)
	m.index++
	m.log, m.terms = append(m.log, data), append(m.terms, m.term)
	return m.s.Apply(m.index, m.term, data)
}

func (m *machine) do(c Command) Result {
	m.t.Helper()
	var e Entry
	if _, err := e.Add(c); err != nil {
		m.t.Fatal(err)
	}
	return m.entry(&e, 0).Results[0]
}

// batch is a slot of n records; a negative producer is none.
func (m *machine) batch(p int, n int32, producer record.ProducerID, epoch record.ProducerEpoch, seq record.Sequence) Slot {
	return Slot{Handle: m.s.Handle(tp(p)), Len: 100, LastOffsetDelta: n - 1, Count: n, ProducerID: producer, ProducerEpoch: epoch, BaseSequence: seq, MaxTimestamp: 5}
}

func (m *machine) append(slots ...Slot) []AppendResult {
	m.t.Helper()
	var e Entry
	for _, s := range slots {
		e.AddSlot(s)
	}
	a := m.entry(&e, 100*len(slots))
	return append([]AppendResult(nil), a.Appends...)
}

func (m *machine) info(p int) PartitionInfo {
	m.t.Helper()
	i, ok := m.s.Partition(tp(p))
	if !ok {
		m.t.Fatalf("no partition %d", p)
	}
	return i
}

// Items 23 to 27: the window of five, gaps, unknown producers, epochs, the wrap.
func TestSequences(t *testing.T) {
	const max = 1<<31 - 1
	m := newMachine(t, 1)
	for i, c := range []struct {
		epoch record.ProducerEpoch
		seq   record.Sequence
		n     int32
		code  Code
		base  record.Offset
	}{
		{0, 7, 3, OK, 0},                     // unknown producer: any sequence
		{0, 10, 2, OK, 3},                    //
		{0, 10, 2, Duplicate, 3},             // the last batch again
		{0, 7, 3, Duplicate, 0},              // an older one of the window
		{0, 13, 1, OutOfOrderSequence, -1},   // a gap
		{0, 11, 1, OutOfOrderSequence, -1},   // part of a batch
		{0, 12, 1, OK, 5},                    //
		{1, 5, 1, OutOfOrderSequence, -1},    // a new epoch begins at 0
		{1, 0, 1, OK, 6},                     //
		{0, 13, 1, InvalidProducerEpoch, -1}, // the old epoch
		{1, 1, 1, OK, 7}, {1, 2, 1, OK, 8}, {1, 3, 1, OK, 9}, {1, 4, 1, OK, 10}, {1, 5, 1, OK, 11},
		{1, 0, 1, OutOfOrderSequence, -1}, // out of the window of five
		{1, 1, 1, Duplicate, 7},           // its oldest
		{2, 0, 1, OK, 12},
	} {
		if got := m.append(m.batch(0, c.n, 9, c.epoch, c.seq))[0]; got.Code != c.code || got.Base != c.base {
			t.Errorf("case %d: %+v, want code %d base %d", i, got, c.code, c.base)
		}
	}
	m = newMachine(t, 1)
	m.append(m.batch(0, 3, 4, 0, max-1)) // max-1, max, 0
	if got := m.append(m.batch(0, 1, 4, 0, 1))[0]; got.Code != OK || got.Base != 3 {
		t.Errorf("after the wrap: %+v", got)
	}
	if got := m.append(m.batch(0, 3, 4, 0, max-1))[0]; got.Code != Duplicate || got.Base != 0 {
		t.Errorf("duplicate of the batch that wraps: %+v", got)
	}
}

func TestOneEntryManyBatches(t *testing.T) {
	m := newMachine(t, 3)
	res := m.append(m.batch(2, 2, -1, -1, -1), m.batch(0, 1, 5, 0, 0), m.batch(2, 3, -1, -1, -1), m.batch(0, 1, 5, 0, 2), m.batch(0, 1, 5, 0, 1))
	// ordered by handle: partition 0 first, each partition in order of arrival
	want := []AppendResult{{OK, 0, 0}, {OutOfOrderSequence, -1, 0}, {OK, 1, 0}, {OK, 0, 0}, {OK, 2, 0}}
	if d := cmp.Diff(want, res); d != "" {
		t.Error(d)
	}
	if refs := m.s.HotRefs(tp(0), 0, 10, nil); len(refs) != 2 || refs[0].First != 0 || refs[1].First != 2 || refs[1].Base != 1 {
		t.Errorf("refs around a refused batch: %+v", refs)
	}
	if refs := m.s.HotRefs(tp(2), 0, 10, nil); len(refs) != 1 || refs[0].Count != 2 || refs[0].End != 5 {
		t.Errorf("refs: %+v", refs)
	}
}

func (m *machine) seal(runs ...segment.PartitionRun) ([]Verdict, segment.Object) {
	m.t.Helper()
	o := m.do(Prepare{Plan: segment.Plan{UUID: segment.UUID{byte(m.index), byte(m.index >> 8)}}, TTLMs: 100}).Value.(segment.Object)
	r := m.do(Commit{Number: o.Number, Size: 10, Runs: runs})
	o, _ = m.s.Object(o.Number)
	return r.Value.([]Verdict), o
}

func run(p int, from, to record.Offset) segment.PartitionRun {
	return segment.PartitionRun{TP: tp(p), Run: segment.Run{StartOffset: from, EndOffset: to, SizeBytes: 100}}
}

func TestCommitJudgesEachRun(t *testing.T) {
	m := newMachine(t, 2)
	for range 10 {
		m.append(m.batch(0, 10, -1, -1, -1), m.batch(1, 1, -1, -1, -1))
	}
	v, o := m.seal(run(0, 0, 29), run(1, 0, 4))
	if d := cmp.Diff([]Verdict{Accepted, Accepted}, v); d != "" || o.State != segment.Committed || o.LiveRuns != 2 {
		t.Fatal(d, o)
	}
	if i := m.info(0); i.SealedEnd != 30 || m.s.HotStart(tp(0)) != 30 || i.HotBytes != 700 {
		t.Errorf("after commit: %+v", i)
	}
	v, o = m.seal(run(0, 40, 49), run(1, 7, 8)) // both leave a gap
	if d := cmp.Diff([]Verdict{Rejected, Rejected}, v); d != "" || o.State != segment.Tombstoned {
		t.Error(d, o)
	}
	v, _ = m.seal(run(0, 10, 49), run(1, 2, 3)) // overlaps; wholly sealed already
	if d := cmp.Diff([]Verdict{Trimmed, Rejected}, v); d != "" {
		t.Error(d)
	}
	v, _ = m.seal(run(0, 50, 100)) // beyond the high watermark
	if v[0] != Rejected {
		t.Error("a run beyond the high watermark was accepted")
	}
	runs := m.s.Runs(tp(0), 0, 10, nil)
	if len(runs) != 2 || runs[1].StartOffset != 30 || runs[1].EndOffset != 49 {
		t.Errorf("manifest: %+v", runs)
	}
	if r := m.do(AdvanceLogStart{TP: tp(0), To: 75}); r.Value != record.Offset(75) { // past the sealed end, into a batch
		t.Error(r)
	}
	if i := m.info(0); i.SealedEnd != 75 || len(m.s.Runs(tp(0), 0, 10, nil)) != 0 || m.s.HotStart(tp(0)) != 70 {
		t.Errorf("after moving the log start: %+v", i)
	}
	if r := m.do(AdvanceLogStart{TP: tp(0), To: 101}); r.Code != OffsetOutOfRange {
		t.Error(r)
	}
	if v, _ = m.seal(run(0, 70, 99)); v[0] != Trimmed {
		t.Error("sealing waits for bytes that are gone")
	}
}

func TestObjectsLife(t *testing.T) {
	m := newMachine(t, 1)
	m.append(m.batch(0, 10, -1, -1, -1))
	plan := Prepare{Plan: segment.Plan{UUID: segment.UUID{1}}, TTLMs: 100}
	o := m.do(plan).Value.(segment.Object)
	if again := m.do(plan).Value.(segment.Object); again.Number != o.Number {
		t.Error("prepare is not idempotent per UUID")
	}
	m.do(Sweep{})
	if len(m.s.Doomed()) != 0 {
		t.Fatal("swept before its time")
	}
	m.clock += 100
	m.do(Sweep{})
	if d := m.s.Doomed(); len(d) != 1 || d[0].Since != m.clock {
		t.Fatalf("doomed: %+v", d)
	}
	if r := m.do(Commit{Number: o.Number, Runs: []segment.PartitionRun{run(0, 0, 9)}}); r.Code != Stale {
		t.Errorf("commit after the sweep: %+v", r)
	}
	v, live := m.seal(run(0, 0, 9))
	if v[0] != Accepted {
		t.Fatal(v)
	}
	m.do(Forget{Numbers: []segment.Number{o.Number, live.Number}})
	if _, ok := m.s.Object(o.Number); ok {
		t.Error("not forgotten")
	}
	if _, ok := m.s.Object(live.Number); !ok {
		t.Error("a live object was forgotten")
	}
	m.do(MetaEffects{From: 2, To: 2, Effects: []Effect{{DropTopic: &DropTopic{tp(0).Topic}}}})
	if d := m.s.Doomed(); len(d) != 1 || d[0].Number != live.Number {
		t.Errorf("after dropping the topic: %+v", d)
	}
}

// While no clock is trusted entries have no time, and the replicated clock stands, perhaps for days. What happens then does not count as days old when it goes on.
func TestTheClockStood(t *testing.T) {
	m := newMachine(t, 2)
	m.append(m.batch(0, 10, 1, 0, 0), m.batch(1, 1, -1, -1, -1))
	_, gone := m.seal(run(0, 0, 4))
	m.do(PutGroup{ID: "g", ProtocolType: "consumer"})
	m.clock += 50
	m.do(Sweep{})
	stopped := m.clock
	m.clock = 0
	m.append(m.batch(0, 1, 1, 0, 10))
	m.do(AdvanceLogStart{TP: tp(0), To: 5})
	m.do(PutGroup{ID: "g", ProtocolType: "consumer", Empty: true})
	m.do(CommitOffsets{Group: "h"})
	prepared := m.do(Prepare{Plan: segment.Plan{UUID: segment.UUID{9}}, TTLMs: 100}).Value.(segment.Object)
	before := m.s.Freeze()
	taken := snapshotOf(t, before)
	back, err := RestoreShard(bytes.NewReader(taken))
	if err != nil {
		t.Fatal(err)
	}
	// The leader's time is right again, the replicated clock has not gone on: nobody may go by the time at which it stopped, and somebody must make it go on.
	for name, s := range map[string]*Shard{"lived through": m.s, "restored": back} {
		if d := s.Doomed(); len(d) != 0 || !s.SweepDue(stopped, math.MaxInt64, 0) {
			t.Errorf("%s: while the clock stands %+v may be deleted, and a sweep is due: %v", name, d, s.SweepDue(stopped, math.MaxInt64, 0))
		}
	}
	m.clock = stopped + 1_000_000
	m.do(Sweep{ProducerMs: 1000, OffsetsMs: 1000})
	back.Apply(m.index, m.term, m.log[len(m.log)-1])
	for name, s := range map[string]*Shard{"lived through": m.s, "restored": back} {
		if d := s.Doomed(); len(d) != 1 || d[0].Number != gone.Number || d[0].Since != m.clock {
			t.Errorf("%s: the object's grace begins at its last reference: %+v at %d", name, d, m.clock)
		}
		if o, ok := s.Object(prepared.Number); !ok || o.ExpiresAt != m.clock+100 {
			t.Errorf("%s: a prepared object: %+v", name, o)
		}
		if _, ok := s.LastSequence(tp(0), 1, 0); !ok {
			t.Errorf("%s: a producer that has just written was forgotten", name)
		}
		if s.Group("g") == nil || s.Group("h") == nil {
			t.Errorf("%s: a group that has just become empty has expired", name)
		}
	}
	if !bytes.Equal(snapshotOf(t, before), taken) {
		t.Error("a snapshot changed after it was taken")
	}
	if m.s.SweepDue(m.clock, math.MaxInt64, 0) {
		t.Error("a sweep is due after the clock went on")
	}
	m.clock += 1001 // and now it does
	m.do(Sweep{ProducerMs: 1000, OffsetsMs: 1000})
	if _, ok := m.s.LastSequence(tp(0), 1, 0); ok || m.s.Group("g") != nil || m.s.Group("h") != nil || len(m.s.Doomed()) != 2 {
		t.Errorf("nothing expires any more: %+v", m.s.Doomed())
	}
}

func TestVoidEntry(t *testing.T) {
	m := newMachine(t, 1)
	var e Entry
	e.AddSlot(m.batch(0, 1, -1, -1, -1))
	data, _ := e.Cut(1, make([]byte, 100), 0, nil)
	m.index++
	if a := m.s.Apply(m.index, 2, data); !a.Void || m.info(0).HighWatermark != 0 || m.s.Voids() != 1 {
		t.Error("an entry of another term was applied")
	}
}

func TestEffectsInOrderOnly(t *testing.T) {
	m := newMachine(t, 2)
	if r := m.do(MetaEffects{From: 2, To: 3, Effects: make([]Effect, 2)}); r.Code != Stale || r.Value != uint64(2) {
		t.Errorf("repeated effects: %+v", r)
	}
	if r := m.do(MetaEffects{From: 4, To: 4, Effects: make([]Effect, 1)}); r.Code != Stale {
		t.Errorf("effects with a gap: %+v", r)
	}
}

func TestRehome(t *testing.T) {
	m := newMachine(t, 1)
	for range 3 {
		m.append(m.batch(0, 2, -1, -1, -1), m.batch(0, 3, -1, -1, -1))
	}
	old := m.s.HotRefs(tp(0), 5, 1, nil)[0]
	var e Entry
	e.AddRehomed(m.batch(0, 2, -1, -1, -1), 5)
	e.AddRehomed(m.batch(0, 3, -1, -1, -1), 7)
	m.entry(&e, 200)
	now := m.s.HotRefs(tp(0), 5, 1, nil)[0]
	if now.Index != m.index || now.Base != old.Base || now.End != old.End || now.Count != 2 {
		t.Errorf("was %+v, is %+v", old, now)
	}
	var bad Entry // not the ref's batches
	bad.AddRehomed(m.batch(0, 1, -1, -1, -1), 10)
	before := m.s.HotRefs(tp(0), 10, 1, nil)[0]
	m.entry(&bad, 100)
	if after := m.s.HotRefs(tp(0), 10, 1, nil)[0]; after != before {
		t.Errorf("moved by other batches: %+v", after)
	}
	if m.info(0).HighWatermark != 15 {
		t.Error("rehoming changed offsets")
	}
}

// Item 48: as Kafka answers.
func TestEpochs(t *testing.T) {
	m := newMachine(t, 1)
	m.append(m.batch(0, 5, -1, -1, -1))
	m.term = 4
	m.do(LeaderStart{Term: 4, Node: 1})
	m.append(m.batch(0, 5, -1, -1, -1))
	for _, c := range []struct {
		asked, epoch record.LeaderEpoch
		end          record.Offset
	}{{-1, -1, -1}, {0, 0, 0}, {1, 1, 5}, {2, 1, 5}, {3, 1, 5}, {4, 4, 10}, {9, -1, -1}} {
		if e, end := m.s.EpochEnd(tp(0), c.asked); e != c.epoch || end != c.end {
			t.Errorf("epoch %d: %d ends at %d, want %d at %d", c.asked, e, end, c.epoch, c.end)
		}
	}
	if m.s.EpochAt(tp(0), 4) != 1 || m.s.EpochAt(tp(0), 5) != 4 {
		t.Error("epoch of a record")
	}
}

func TestGroups(t *testing.T) {
	m := newMachine(t, 4)
	m.do(CommitOffsets{Group: "g", Offsets: []OffsetCommit{{TP: tp(0), Offset: 5, Epoch: -1, Metadata: "m"}}})
	kept := m.s.Group("g")
	m.do(CommitOffsets{Group: "g", Offsets: []OffsetCommit{{TP: tp(0), Offset: 6}, {TP: tp(1), Offset: 1}}})
	if kept.Offsets[tp(0)].Offset != 5 || m.s.Group("g").Offsets[tp(0)].Offset != 6 {
		t.Error("a reader's group changed")
	}
	m.do(PutGroup{ID: "g", ProtocolType: "consumer", Record: []byte("r")})
	m.clock += 1000
	m.do(Sweep{OffsetsMs: 10})
	if m.s.Group("g") == nil {
		t.Fatal("offsets of a group with members expired")
	}
	m.do(PutGroup{ID: "g", Empty: true})
	m.do(Sweep{OffsetsMs: 10})
	if m.s.Group("g") == nil {
		t.Fatal("expired at once")
	}
	m.do(DeleteOffsets{Group: "g", TPs: []record.TopicPartition{tp(1)}})
	if len(m.s.Group("g").Offsets) != 1 {
		t.Error("offset not deleted")
	}
	m.do(MetaEffects{From: 5, To: 5, Effects: []Effect{{DropTopic: &DropTopic{tp(0).Topic}}}})
	if len(m.s.Group("g").Offsets) != 0 {
		t.Error("offsets of a dropped topic stay")
	}
	m.clock += 11
	m.do(Sweep{OffsetsMs: 10})
	if m.s.Group("g") != nil {
		t.Error("not expired")
	}
}

// step does one random command. The machine's clock and term move too.
func (m *machine) step(rng *rand.Rand, parts int, seqs map[[2]int]record.Sequence) {
	p := rng.IntN(parts)
	m.clock += record.Timestamp(rng.IntN(50))
	switch k := rng.IntN(20); {
	case k < 11:
		var slots []Slot
		for range 1 + rng.IntN(6) {
			p, n := rng.IntN(parts), int32(1+rng.IntN(5))
			if m.s.Handle(tp(p)) == 0 || rng.IntN(3) == 0 {
				slots = append(slots, m.batch(p, n, -1, -1, -1))
				continue
			}
			key := [2]int{p, rng.IntN(3)}
			slots = append(slots, m.batch(p, n, record.ProducerID(key[1]), 0, seqs[key]))
			if rng.IntN(6) > 0 {
				seqs[key] = seqs[key].Add(n)
			}
		}
		m.append(slots...)
	case k < 15:
		var runs []segment.PartitionRun
		for q := range parts {
			if i, ok := m.s.Partition(tp(q)); ok && i.HighWatermark > 0 && rng.IntN(2) == 0 {
				end := i.SealedEnd + record.Offset(rng.IntN(int(i.HighWatermark-i.SealedEnd)+3))
				runs = append(runs, run(q, max(0, i.SealedEnd-record.Offset(rng.IntN(3))), end))
			}
		}
		m.seal(runs...)
	case k == 15:
		if i, ok := m.s.Partition(tp(p)); ok {
			m.do(AdvanceLogStart{TP: tp(p), To: record.Offset(rng.IntN(int(i.HighWatermark) + 2))})
		}
	case k == 16:
		m.do(Sweep{ProducerMs: 2000, OffsetsMs: 3000})
		var doomed []segment.Number
		for _, o := range m.s.Doomed() {
			doomed = append(doomed, o.Number)
		}
		m.do(Forget{Numbers: doomed})
	case k == 17:
		m.term += Term(rng.IntN(3))
		m.do(LeaderStart{Term: m.term, Node: 1})
	case k == 18:
		m.do(CommitOffsets{Group: fmt.Sprint("g", rng.IntN(3)), Offsets: []OffsetCommit{{TP: tp(p), Offset: record.Offset(rng.IntN(100))}}})
	default:
		c := m.s.Cursor() + 1
		e := Effect{EnsurePartition: &EnsurePartition{TP: tp(p)}}
		if rng.IntN(4) == 0 {
			e = Effect{DropTopic: &DropTopic{tp(p).Topic}}
		}
		m.do(MetaEffects{From: c, To: c, Effects: []Effect{e}})
	}
}

// verify asserts what must hold after every entry.
func (m *machine) verify() {
	m.t.Helper()
	refs := map[uint32]int32{}
	var hot int64
	live := map[segment.Number]uint32{}
	for _, p := range m.s.parts {
		if p == nil {
			continue
		}
		p.check()
		end := record.Offset(-1)
		for i, r := range p.Hot {
			refs[r.Entry]++
			hot += int64(r.Bytes)
			if i > 0 && r.Base != end {
				m.t.Fatalf("%s: ref at %d, the one before ends at %d", p.TP, r.Base, end)
			}
			end = p.refEnd(i)
		}
		if len(p.Hot) > 0 && (end != p.High || p.Hot[0].Base > p.SealedEnd) || len(p.Hot) == 0 && p.SealedEnd != p.High {
			m.t.Fatalf("%s: hot to %d from %+v, sealed end %d, high watermark %d", p.TP, end, p.Hot, p.SealedEnd, p.High)
		}
		for i, r := range p.Runs {
			live[r.Object]++
			if i > 0 && r.StartOffset != p.Runs[i-1].EndOffset+1 {
				m.t.Fatalf("%s: runs %+v", p.TP, p.Runs)
			}
		}
	}
	for i, n := range m.s.live {
		if n != refs[m.s.entBase+uint32(i)] {
			m.t.Fatalf("entry %d has %d refs, counted %d", m.s.entBase+uint32(i), refs[m.s.entBase+uint32(i)], n)
		}
	}
	if hot != m.s.hotBytes || len(m.s.live) > 0 && m.s.live[0] == 0 {
		m.t.Fatalf("hot bytes %d, counted %d; first entry has %d refs", hot, m.s.hotBytes, m.s.live[0])
	}
	for n, o := range m.s.objects {
		if o.LiveRuns != live[n] || o.State == segment.Tombstoned && live[n] > 0 {
			m.t.Fatalf("object %d: %+v, %d runs refer to it", n, o, live[n])
		}
	}
}

func snapshotOf(t tester, f Frozen) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := f.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Random commands: the invariants hold, a snapshot taken in the middle is not changed by what follows, and replay from the start, and from a
// restored snapshot, gives the same bytes.
func TestRandomCommands(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 1))
		m := newMachine(t, 6)
		seqs := map[[2]int]record.Sequence{}
		var frozen Frozen
		var early []byte
		cut := 100 + rng.IntN(200)
		for i := range 400 {
			m.step(rng, 8, seqs)
			m.verify()
			if i == cut {
				frozen = m.s.Freeze()
				early = snapshotOf(t, m.s.Freeze())
			}
		}
		if !bytes.Equal(snapshotOf(t, frozen), early) {
			t.Fatalf("seed %d: a snapshot changed after it was taken", seed)
		}
		want := snapshotOf(t, m.s.Freeze())
		replayed := newest(1)
		restored, err := RestoreShard(bytes.NewReader(early))
		if err != nil {
			t.Fatal(err)
		}
		for i, data := range m.log {
			replayed.Apply(RaftIndex(i+1), m.terms[i], data)
			if RaftIndex(i+1) > frozen.Index() {
				restored.Apply(RaftIndex(i+1), m.terms[i], data)
			}
		}
		if !bytes.Equal(snapshotOf(t, replayed.Freeze()), want) {
			t.Fatalf("seed %d: replay differs", seed)
		}
		if got := snapshotOf(t, restored.Freeze()); !bytes.Equal(got, want) {
			t.Fatalf("seed %d: replay from a snapshot differs:\n%s\n%s", seed, got, want)
		}
	}
}

func TestMeta(t *testing.T) {
	m := NewMeta()
	index := RaftIndex(0)
	do := func(c Command) Result {
		var e Entry
		if _, err := e.Add(c); err != nil {
			t.Fatal(err)
		}
		data, _ := e.Cut(1, nil, 0, nil)
		index++
		return m.Apply(index, 1, data)[0]
	}
	do(InitCluster{ClusterID: "c", Shards: 3})
	do(InitCluster{ClusterID: "other", Shards: 9})
	do(RegisterNode{Node{ID: 1, Host: "h", Port: 9092}})
	id := record.TopicID{1}
	if r := do(CreateTopic{ID: id, Name: "t", Partitions: 7, ReplicationFactor: 1}); r.Code != OK {
		t.Fatal(r)
	}
	if r := do(CreateTopic{ID: record.TopicID{2}, Name: "t", Partitions: 1}); r.Code != Exists {
		t.Error(r)
	}
	view := m.View()
	if view.ID != "c" || view.Shards != 3 {
		t.Errorf("cluster: %+v", view)
	}
	count := map[record.ShardID]int{}
	topic, _ := view.Topic("t")
	for _, p := range topic.Partitions {
		count[p.Shard]++
	}
	if count[1] != 3 || count[2] != 2 || count[3] != 2 {
		t.Errorf("partitions per shard: %v", count)
	}
	if first, effects := m.Outbox(1, 1); first != 2 || len(effects) != 2 {
		t.Errorf("outbox: %d %v", first, effects)
	}
	do(TrimOutbox{Shard: 1, To: 3})
	if first, effects := m.Outbox(1, 0); first != 4 || len(effects) != 0 || m.OutboxEnd(1) != 3 {
		t.Errorf("outbox after trimming: %d %v", first, effects)
	}
	if a, b := do(AllocateProducerIDs{1000}).Value, do(AllocateProducerIDs{1000}).Value; a != record.ProducerID(0) || b != record.ProducerID(1000) {
		t.Errorf("producer IDs: %v %v", a, b)
	}
	do(CreatePartitions{ID: id, Total: 9})
	do(AlterConfigs{Topic: id, Set: map[string]string{"retention.ms": "5"}, Config: PartitionConfig{RetentionMs: 5}})
	if now, _ := m.View().TopicByID(id); len(now.Partitions) != 9 || now.Configs["retention.ms"] != "5" || len(topic.Partitions) != 7 || topic.Configs["retention.ms"] != "" {
		t.Error("the old view changed, or the new one did not")
	}
	f := m.Freeze()
	var b1, b2 bytes.Buffer
	if _, err := f.WriteTo(&b1); err != nil {
		t.Fatal(err)
	}
	back, err := RestoreMeta(bytes.NewReader(b1.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	f = back.Freeze()
	if _, err := f.WriteTo(&b2); err != nil || !bytes.Equal(b1.Bytes(), b2.Bytes()) {
		t.Errorf("restored meta differs:\n%s\n%s", b1.Bytes(), b2.Bytes())
	}
	do(DeleteTopic{ID: id})
	if _, ok := m.View().Topic("t"); ok || m.OutboxEnd(2) == 0 {
		t.Error("topic not deleted")
	}
	if r := do(DeleteTopic{ID: id}); r.Code != NotFound {
		t.Error(r)
	}
}

// FuzzEntry finds the directory of any entry: what is read is what was written, whether the batches are new or have their offsets already.
func FuzzEntry(f *testing.F) {
	var e, again Entry
	e.AddSlot(Slot{Handle: 1, Len: 5})
	data, _ := e.Cut(1, []byte("hello"), 5, nil)
	f.Add(data)
	again.AddRehomed(Slot{Handle: 1, Len: 5, Count: 2}, 7)
	data, _ = again.Cut(1, []byte("hello"), 5, nil)
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		slots, err := DecodeSlots(data)
		if err != nil {
			return
		}
		for i := range slots.Len() {
			s := slots.At(i)
			if got := s.append(nil); !bytes.Equal(got, slots.raw[i*slotBytes:(i+1)*slotBytes]) {
				t.Errorf("slot %d: %+v", i, s)
			}
			if len(slots.bases) > 0 {
				slots.base(i)
			}
		}
	})
}

// FuzzSnapshot restores any bytes: what can be restored is written and restored again to the same bytes.
func FuzzSnapshot(f *testing.F) {
	m := newMachine(f, 2)
	m.append(m.batch(0, 3, 1, 0, 0), m.batch(1, 2, -1, -1, -1))
	m.seal(run(0, 0, 1))
	m.do(CommitOffsets{Group: "g", Offsets: []OffsetCommit{{TP: tp(0), Offset: 1}}})
	f.Add(snapshotOf(f, m.s.Freeze()))
	meta := NewMeta()
	var e Entry
	for _, c := range []Command{InitCluster{ClusterID: "c", Shards: 2, Members: []int32{1}}, RegisterNode{Node{ID: 1, Host: "h"}}, CreateTopic{ID: record.TopicID{1}, Name: "t", Partitions: 2}} {
		if _, err := e.Add(c); err != nil {
			f.Fatal(err)
		}
	}
	data, _ := e.Cut(1, nil, 0, nil)
	meta.Apply(1, 1, data)
	frozen := meta.Freeze()
	var b bytes.Buffer
	if _, err := frozen.WriteTo(&b); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		var h struct{ Handles uint64 }
		if i := bytes.IndexByte(data, '{'); i > 0 && json.Unmarshal(data[i:], &h) == nil && h.Handles > 1000 {
			return // memory for as many partitions as there ever were, which are not in the bytes
		}
		if s, err := RestoreShard(bytes.NewReader(data)); err == nil {
			want := snapshotOf(t, s.Freeze())
			if s, err = RestoreShard(bytes.NewReader(want)); err != nil || !bytes.Equal(snapshotOf(t, s.Freeze()), want) {
				t.Errorf("a shard is another when it is restored again: %v", err)
			}
		}
		if m, err := RestoreMeta(bytes.NewReader(data)); err == nil {
			write := func(m *Meta) []byte {
				var b bytes.Buffer
				f := m.Freeze()
				if _, err := f.WriteTo(&b); err != nil {
					t.Fatal(err)
				}
				return b.Bytes()
			}
			want := write(m)
			if m, err = RestoreMeta(bytes.NewReader(want)); err != nil || !bytes.Equal(write(m), want) {
				t.Errorf("meta is another when it is restored again: %v", err)
			}
		}
	})
}

// tape is a source of choices, two bytes each; one that has begun when the bytes end goes on by chance.
type tape struct {
	b    []byte
	rest *rand.PCG
}

func (t *tape) Uint64() uint64 {
	if len(t.b) < 2 {
		t.b = nil
		return t.rest.Uint64()
	}
	v := uint64(binary.BigEndian.Uint16(t.b)) * 0x0001000100010001
	t.b = t.b[2:]
	return v
}

// FuzzManifest chooses what happens to a shard: batches, objects, log starts, terms, groups, topics. The invariants hold after every entry, and replay, from the start and from a
// snapshot, gives the same bytes.
func FuzzManifest(f *testing.F) {
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, 2))
		b := make([]byte, 160)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		choices := &tape{data[:min(len(data), 160)], rand.NewPCG(1, 2)}
		half := len(choices.b) / 2
		rng := rand.New(choices)
		m := newMachine(t, 2)
		seqs := map[[2]int]record.Sequence{}
		var early []byte
		for len(choices.b) > 0 {
			m.step(rng, 3, seqs)
			m.verify()
			if early == nil && len(choices.b) <= half {
				early = snapshotOf(t, m.s.Freeze())
			}
		}
		if early == nil {
			return
		}
		want := snapshotOf(t, m.s.Freeze())
		restored, err := RestoreShard(bytes.NewReader(early))
		if err != nil {
			t.Fatal(err)
		}
		replayed, from := newest(1), restored.Applied()
		for i, data := range m.log {
			replayed.Apply(RaftIndex(i+1), m.terms[i], data)
			if RaftIndex(i+1) > from {
				restored.Apply(RaftIndex(i+1), m.terms[i], data)
			}
		}
		for _, s := range []*Shard{replayed, restored} {
			if got := snapshotOf(t, s.Freeze()); !bytes.Equal(got, want) {
				t.Fatalf("replay differs:\n%s\n%s", got, want)
			}
		}
	})
}

// readable reports whether a body is a command's, and asks for no more than a test has memory for.
func readable[C Command](body []byte, small func(C) bool) bool {
	var c C
	return json.Unmarshal(body, &c) == nil && (small == nil || small(c))
}

// metaCommands are the commands of meta that nodes send one another, with an example each.
var metaCommands = []struct {
	example  Command
	readable func([]byte) bool
}{
	{RegisterNode{Node{ID: 2, Incarnation: "a", Host: "h", Port: 1}}, func(b []byte) bool { return readable[RegisterNode](b, nil) }},
	{CreateTopic{ID: record.TopicID{1}, Name: "t", Partitions: 3, Configs: map[string]string{"a": "b"}}, func(b []byte) bool { return readable(b, func(c CreateTopic) bool { return c.Partitions < 100 }) }},
	{DeleteTopic{ID: record.TopicID{1}}, func(b []byte) bool { return readable[DeleteTopic](b, nil) }},
	{CreatePartitions{ID: record.TopicID{1}, Total: 5}, func(b []byte) bool { return readable(b, func(c CreatePartitions) bool { return c.Total < 100 }) }},
	{AlterConfigs{Topic: record.TopicID{1}, Set: map[string]string{"c": "d"}, Delete: []string{"a"}}, func(b []byte) bool { return readable[AlterConfigs](b, nil) }},
	{AllocateProducerIDs{Count: 10}, func(b []byte) bool { return readable[AllocateProducerIDs](b, nil) }},
	{AlterMembers{Add: []int32{2}}, func(b []byte) bool { return readable[AlterMembers](b, nil) }},
	{Drain{Node: 1, On: true}, func(b []byte) bool { return readable[Drain](b, nil) }},
	{PreferLeader{Group: 1, Node: 2}, func(b []byte) bool { return readable[PreferLeader](b, nil) }},
	{ForgetNode{Node: 2}, func(b []byte) bool { return readable[ForgetNode](b, nil) }},
	{SettleSlots{}, func(b []byte) bool { return readable[SettleSlots](b, nil) }},
	{AddShards{Total: 4, Founders: []string{"1.a"}}, func(b []byte) bool { return readable(b, func(c AddShards) bool { return c.Total < 100 }) }},
	{TrimOutbox{Shard: 1, To: 2}, func(b []byte) bool { return readable[TrimOutbox](b, nil) }},
	{RaiseFeatureLevel{To: LevelNewest}, func(b []byte) bool { return readable(b, func(c RaiseFeatureLevel) bool { return c.To <= LevelNewest }) }},
}

// FuzzMeta applies commands of meta with any contents. None panics, and the same commands give the same bytes, from the start and from a snapshot in the middle.
func FuzzMeta(f *testing.F) {
	var all []byte
	for i, c := range metaCommands {
		body, err := json.Marshal(c.example)
		if err != nil {
			f.Fatal(err)
		}
		one := append([]byte{byte(i), byte(len(body))}, body...)
		f.Add(one)
		all = append(all, one...)
	}
	f.Add(append(all, all...))
	one := func(kind int, body string) string { return string([]byte{byte(kind), byte(len(body))}) + body }
	id := `"ID":"01000000000000000000000000000000"`
	f.Add([]byte(one(1, `{`+id+`,"Name":"b","Partitions":1}`) + one(1, `{`+id+`,"Name":"a","Partitions":1}`) + one(2, `{`+id+`}`)))
	write := func(t *testing.T, m *Meta) []byte {
		var b bytes.Buffer
		f := m.Freeze()
		if _, err := f.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var e Entry
		if _, err := e.Add(InitCluster{ClusterID: "c", Shards: 2, Members: []int32{1}}); err != nil {
			t.Fatal(err)
		}
		first, _ := e.Cut(1, nil, 5, nil)
		entries := [][]byte{first}
		for len(data) > 2 && len(entries) < 40 {
			c, n := metaCommands[int(data[0])%len(metaCommands)], min(int(data[1]), len(data)-2)
			body := data[2 : 2+n]
			data = data[2+n:]
			if !c.readable(body) {
				continue
			}
			e = Entry{other: append(binary.BigEndian.AppendUint32([]byte{byte(KindOf(c.example)), 0, 0, 0}, uint32(n)), body...), count: 1}
			entry, _ := e.Cut(1, nil, record.Timestamp(10*len(entries)), nil)
			entries = append(entries, entry)
		}
		m, again := NewMeta(), NewMeta()
		var early []byte
		for i, entry := range entries {
			m.Apply(RaftIndex(i+1), 1, entry)
			again.Apply(RaftIndex(i+1), 1, entry)
			if i == len(entries)/2 {
				early = write(t, m)
			}
		}
		restored, err := RestoreMeta(bytes.NewReader(early))
		if err != nil {
			t.Fatal(err)
		}
		for i := len(entries)/2 + 1; i < len(entries); i++ {
			restored.Apply(RaftIndex(i+1), 1, entries[i])
		}
		want := write(t, m)
		if got := write(t, again); !bytes.Equal(got, want) {
			t.Errorf("the same commands:\n%s\n%s", got, want)
		}
		if got := write(t, restored); !bytes.Equal(got, want) {
			t.Errorf("from a snapshot:\n%s\n%s", got, want)
		}
	})
}

func BenchmarkApply1000Slots12Partitions(b *testing.B) {
	m := newMachine(b, 12)
	var e Entry
	for i := range 1000 {
		e.AddSlot(m.batch(i%12, 10, -1, -1, -1))
	}
	data, _ := e.Cut(1, make([]byte, 100_000), 5, nil)
	b.ReportAllocs()
	for b.Loop() {
		m.index++
		m.s.Apply(m.index, 1, data)
		if m.index%512 == 0 { // as sealing would
			for _, p := range m.s.parts {
				p.SealedEnd = p.High
				m.s.dropHot(p, len(p.Hot), nil)
			}
			m.s.trimEntries()
		}
	}
}

func BenchmarkFreeze10000(b *testing.B) {
	m := newMachine(b, 10_000)
	for b.Loop() {
		m.s.Freeze()
	}
}

// Who votes and leads: only registered nodes are added, one member always stays, racks take turns, who drains leads nothing, and a snapshot has it all.
func TestMembers(t *testing.T) {
	m := NewMeta()
	index := RaftIndex(0)
	do := func(c Command) Code {
		t.Helper()
		var e Entry
		if _, err := e.Add(c); err != nil {
			t.Fatal(err)
		}
		data, _ := e.Cut(1, nil, 0, nil)
		index++
		return m.Apply(index, 1, data)[0].Code
	}
	check := func(what string, got, want any) {
		t.Helper()
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	do(InitCluster{ClusterID: "c", Shards: 1, Members: []int32{1}})
	for id, rack := range []string{"a", "a", "a", "b", "c"} {
		do(RegisterNode{Node{ID: int32(id + 1), Rack: rack, Peer: "p"}})
	}
	check("before any is added", m.View().Members(), []int32{1})
	check("brokers", len(m.View().Nodes()), 1)
	check("adding an unknown node", do(AlterMembers{Add: []int32{9}}), NotFound)
	check("removing the last", do(AlterMembers{Remove: []int32{1}}), Invalid)
	check("adding", do(AlterMembers{Add: []int32{5, 2, 3, 4}}), OK)
	check("members", m.View().Members(), []int32{1, 2, 3, 4, 5})
	check("shard 1", m.View().Leaders(1), []int32{1, 4, 5, 2, 3})
	check("shard 2", m.View().Leaders(2), []int32{4, 5, 2, 3, 1})
	check("meta", m.View().Leaders(0), []int32{3, 1, 4, 5, 2})
	check("draining", do(Drain{Node: 4, On: true}), OK)
	check("shard 2 without node 4", m.View().Leaders(2), []int32{5, 2, 3, 1})
	check("shards without founders", do(AddShards{Total: 3}), Invalid)
	check("more shards", do(AddShards{Total: 3, Founders: []string{"1.x", "2.y"}}), OK)
	check("fewer shards", do(AddShards{Total: 2, Founders: []string{"1.x"}}), Invalid)
	check("founders", m.View().ShardFounders(3), []string{"1.x", "2.y"})
	check("a leader for no group", do(PreferLeader{Group: 4, Node: 2}), NotFound)
	check("a leader", do(PreferLeader{Group: 2, Node: 2}), OK)
	check("shard 2 with a chosen leader", m.View().Leaders(2), []int32{2, 5, 3, 1})
	old := m.View()

	f := m.Freeze()
	var b bytes.Buffer
	if _, err := f.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	back, err := RestoreMeta(&b)
	if err != nil {
		t.Fatal(err)
	}
	check("restored", back.View().place, m.View().place)
	check("restored nodes", back.View().Registered(), m.View().Registered())

	check("removing", do(AlterMembers{Remove: []int32{2, 4}}), OK)
	check("shard 2 when its leader has gone", m.View().Leaders(2)[0] == 2, false)
	check("an old view", old.Leaders(2), []int32{2, 5, 3, 1})
	check("adding what has left", do(AlterMembers{Add: []int32{2}}), NotFound)
	do(RegisterNode{Node{ID: 2, Rack: "a"}})
	check("adding it when it is back", do(AlterMembers{Add: []int32{2}}), OK)
	check("forgetting a member", do(ForgetNode{Node: 2}), Invalid)
	check("forgetting", do(ForgetNode{Node: 4}), OK)
	if _, ok := m.View().Node(4); ok {
		t.Error("node 4 is still there")
	}
	do(Drain{Node: 5, On: true})
	do(RegisterNode{Node{ID: 5}})
	check("draining after a restart", m.View().Draining(5), false)
	for _, id := range []int32{1, 2, 3, 5} {
		do(Drain{Node: id, On: true})
	}
	check("somebody leads if all drain", len(m.View().Leaders(1)), 4)
}

// Slots without a group go to shards that are added, as they were asked for; a slot with a group stays, and no group is ever in a slot that its shard has let go.
func TestSlotsMove(t *testing.T) {
	m := NewMeta()
	shards := map[record.ShardID]*Shard{1: NewShard(1), 2: NewShard(2), 3: NewShard(3)}
	index := RaftIndex(0)
	entry := func(c Command) []byte {
		var e Entry
		if _, err := e.Add(c); err != nil {
			t.Fatal(err)
		}
		data, _ := e.Cut(1, nil, 0, nil)
		index++
		return data
	}
	meta := func(c Command) Code { d := entry(c); return m.Apply(index, 1, d)[0].Code }
	shard := func(s record.ShardID, c Command) Code {
		d := entry(c)
		return shards[s].Apply(index, 1, d).Results[0].Code
	}
	deliver := func(s record.ShardID) {
		if first, effects := m.Outbox(s, shards[s].Cursor()); len(effects) > 0 {
			shard(s, MetaEffects{From: first, To: first + uint64(len(effects)) - 1, Effects: effects})
		}
	}
	count := func() map[record.ShardID]int {
		out := map[record.ShardID]int{}
		for slot := range GroupSlots {
			out[m.View().SlotShard(uint8(slot))]++
		}
		return out
	}
	meta(InitCluster{ClusterID: "c", Shards: 1, Members: []int32{1}})
	var names []string
	for i := range 40 { // before any shard is added
		names = append(names, fmt.Sprint("group-", i))
		shard(1, PutGroup{ID: names[i]})
	}
	if c := meta(AddShards{Total: 3, Founders: []string{"1.a"}}); c != OK {
		t.Fatal(c)
	}
	if got := count(); got[1] != GroupSlots {
		t.Errorf("moved before the shard was asked: %v", got)
	}
	if n := len(m.View().Moving(1)); n != 2*(GroupSlots/3) {
		t.Errorf("asked for %d slots", n)
	}
	deliver(1)
	kept, released := SettleSlots{Shard: 1}, SettleSlots{Shard: 1}
	for slot := range m.View().Moving(1) {
		if shards[1].Released(slot) {
			released.Released = append(released.Released, int(slot))
		} else {
			kept.Kept = append(kept.Kept, int(slot))
		}
	}
	// between the two, and after: a group of a slot that was let go is refused, one that stays is not
	for i := range 1000 {
		id := fmt.Sprint("late-", i)
		want := OK
		if shards[1].Released(GroupSlot(id)) {
			want = Moved
		}
		if a, b := shard(1, PutGroup{ID: id}), shard(1, CommitOffsets{Group: id}); a != want || b != want {
			t.Fatalf("group %s: %v, %v, want %v", id, a, b, want)
		}
	}
	meta(SettleSlots{Shard: 2, Released: released.Released}) // not its slots
	if got := count(); got[1] != GroupSlots {
		t.Errorf("another shard gave them away: %v", got)
	}
	for range 2 { // also told twice
		meta(released)
		meta(kept)
	}
	if n := len(m.View().Moving(1)); n != 0 {
		t.Errorf("%d slots are still on their way", n)
	}
	for _, id := range names {
		if s := m.View().SlotShard(GroupSlot(id)); s != 1 {
			t.Errorf("group %s is in shard 1, its slot in shard %d", id, s)
		}
	}
	got := count()
	if got[2] == 0 || got[3] == 0 || got[1] != GroupSlots-len(released.Released) || got[2]-got[3] > 20 || got[3]-got[2] > 20 {
		t.Errorf("slots per shard: %v, %d let go", got, len(released.Released))
	}
	f := shards[1].Freeze()
	var b bytes.Buffer
	if _, err := f.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	back, err := RestoreShard(&b)
	if err != nil || back.released != shards[1].released {
		t.Errorf("a snapshot does not know what was let go: %v", err)
	}
	mf := m.Freeze()
	b.Reset()
	if _, err := mf.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	if mb, err := RestoreMeta(&b); err != nil || mb.c.slots != m.c.slots {
		t.Errorf("meta's snapshot: %v", err)
	}
}
