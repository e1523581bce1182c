package check

import (
	"bytes"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func send(process int32, out Outcome, start, end int64, key int32, offset int64, value uint64) Op {
	return Op{Process: process, Kind: Send, Outcome: out, Start: start, End: end, Records: []Record{{Key: key, Offset: offset, Value: value, Hash: uint32(value)}}}
}

// poll reads pairs of offset and value of key 0.
func poll(process int32, start int64, pairs ...int64) Op {
	o := Op{Process: process, Kind: Poll, Outcome: OK, Start: start, End: start + 1}
	for i := 0; i < len(pairs); i += 2 {
		o.Records = append(o.Records, Record{Offset: pairs[i], Value: uint64(pairs[i+1])})
	}
	return o
}

func of(kind Kind, process int32, start int64, records ...Record) Op {
	return Op{Process: process, Kind: kind, Outcome: OK, Group: 1, Start: start, End: start + 1, Records: records}
}

func generation(n int32, o Op) Op { o.Generation = n; return o }
func marked(o Op, m ...Mark) Op   { o.Marks = m; return o }

// three are sends of the values 1 to 3 to the offsets 0 to 2, each after the one before.
func three() []Op {
	return []Op{send(1, OK, 0, 5, 0, 0, 1), send(1, OK, 10, 15, 0, 1, 2), send(1, OK, 20, 25, 0, 2, 3)}
}

// Every rule flags the history that breaks it, and not the one beside it that does not.
func TestRules(t *testing.T) {
	w := func(key int32, offset int64, value uint64) Record { return Record{key, true, offset, value, 0} }
	r := func(key int32, offset int64, value uint64) Record { return Record{key, false, offset, value, 0} }
	final := Options{Final: true}
	all := poll(9, 90, 0, 1, 1, 2, 2, 3)
	for _, c := range []struct {
		rule       string
		opt        Options
		bad, clean []Op
	}{
		{"inconsistent-offsets", Options{}, []Op{poll(2, 30, 0, 1), poll(3, 40, 0, 2)}, []Op{poll(2, 30, 0, 1), poll(3, 40, 0, 1)}},
		{"duplicate", Options{}, []Op{poll(2, 30, 0, 1, 1, 2, 2, 3, 3, 1)}, []Op{all}},
		{"lost-write", Options{}, []Op{poll(2, 30, 0, 1, 2, 3)}, []Op{poll(2, 30, 0, 1, 1, 2)}},
		{"unseen", final, []Op{poll(2, 30, 0, 1, 1, 2)}, []Op{all}},
		{"unsent", Options{}, []Op{poll(2, 30, 0, 1, 1, 2, 2, 3, 3, 0)}, []Op{all}},
		{"wrong-key", Options{}, []Op{of(Poll, 2, 30, r(1, 0, 1))}, []Op{of(Poll, 2, 30, r(0, 0, 1))}},
		{"G1a", Options{}, []Op{send(2, Fail, 30, 31, 0, -1, 4), poll(3, 40, 0, 1, 1, 2, 2, 3, 3, 4)}, []Op{send(2, Info, 30, 31, 0, -1, 4), poll(3, 40, 0, 1, 1, 2, 2, 3, 3, 4)}},
		{"content", Options{}, []Op{of(Poll, 2, 30, Record{0, false, 0, 1, 77})}, []Op{of(Poll, 2, 30, Record{0, false, 0, 1, 1})}},
		{"offset-gap", final, []Op{send(2, OK, 30, 31, 0, 4, 4), poll(3, 90, 0, 1, 1, 2, 2, 3, 4, 4)}, []Op{send(2, OK, 30, 31, 0, 3, 4), poll(3, 90, 0, 1, 1, 2, 2, 3, 3, 4)}},
		{"poll-skip", Options{}, []Op{poll(2, 30, 0, 1), poll(2, 40, 2, 3)}, []Op{poll(2, 30, 0, 1), of(Assign, 2, 35), poll(2, 40, 2, 3), all}},
		{"nonmonotonic-poll", Options{}, []Op{poll(2, 30, 0, 1, 1, 2), poll(2, 40, 1, 2)}, []Op{of(Subscribe, 2, 25), poll(2, 30, 0, 1, 1, 2), poll(2, 40, 1, 2)}},
		{"poll-skip", Options{}, []Op{of(Assign, 2, 25, r(0, 1, 0)), poll(2, 30, 2, 3)}, []Op{of(Assign, 2, 25, r(0, 1, 0)), poll(2, 30, 1, 2, 2, 3), all}},
		{"nonmonotonic-poll", Options{}, []Op{of(Assign, 2, 25, r(0, 1, 0)), poll(2, 30, 0, 1)}, []Op{of(Assign, 2, 25, r(0, 0, 0)), poll(2, 30, 0, 1)}},
		{"int-poll-skip", Options{}, []Op{poll(2, 30, 0, 1, 2, 3)}, []Op{poll(2, 30, 1, 2, 2, 3), all}},
		{"int-nonmonotonic-poll", Options{}, []Op{poll(2, 30, 1, 2, 0, 1)}, []Op{poll(2, 30, 0, 1, 1, 2)}},
		{"nonmonotonic-send", Options{}, []Op{send(2, OK, 30, 50, 0, 5, 4), send(2, OK, 31, 50, 0, 4, 5)}, []Op{send(2, OK, 30, 50, 0, 5, 4), send(3, OK, 31, 50, 0, 4, 5)}},
		{"int-nonmonotonic-send", Options{}, []Op{of(Txn, 2, 30, w(0, 5, 4), w(0, 4, 5))}, []Op{of(Txn, 2, 30, w(0, 4, 4), w(0, 6, 5))}},
		{"precommitted-read", Options{}, []Op{of(Txn, 2, 30, w(0, 3, 4), r(0, 3, 4))}, []Op{of(Txn, 2, 30, w(0, 3, 4), r(0, 2, 3)), all}},
		{"G1c", Options{}, []Op{of(Txn, 2, 30, w(0, 3, 4), r(1, 0, 5)), of(Txn, 3, 30, w(1, 0, 5), r(0, 3, 4))}, []Op{of(Txn, 2, 30, w(0, 3, 4), r(1, 0, 5)), of(Txn, 3, 30, w(1, 0, 5))}},
		{"realtime-send-order", Options{}, []Op{send(2, OK, 30, 31, 0, 5, 4), send(3, OK, 32, 33, 0, 4, 5)}, []Op{send(2, OK, 30, 32, 0, 5, 4), send(3, OK, 31, 33, 0, 4, 5)}},
		{"watermark-falls", Options{}, []Op{marked(poll(2, 30), Mark{0, 0, 3, 3}), marked(poll(2, 40), Mark{0, 0, 2, 3})}, []Op{marked(poll(2, 30), Mark{0, 0, 3, 3}), marked(poll(3, 40), Mark{0, 0, 2, 3})}},
		{"early-delete", Options{Kept: 1}, []Op{marked(poll(2, 30), Mark{0, 1, 3, 3})}, []Op{marked(poll(2, 30), Mark{0, 0, 3, 3}, Mark{1, 5, 6, 6})}},
		{"commit-beyond-end", Options{}, []Op{of(Commit, 2, 30, r(0, 4, 0))}, []Op{of(Commit, 2, 30, r(0, 3, 0))}},
		{"commit-falls", Options{}, []Op{of(Commit, 2, 30, r(0, 3, 0)), of(Committed, 3, 40, r(0, 2, 0))}, []Op{of(Commit, 2, 30, r(0, 3, 0)), of(Committed, 3, 30, r(0, 2, 0))}},
		{"generation-falls", Options{}, []Op{generation(3, of(Subscribe, 2, 30)), generation(2, of(Subscribe, 3, 40))}, []Op{generation(2, of(Subscribe, 2, 30)), generation(3, of(Subscribe, 3, 40))}},
		{"epoch-falls", Options{}, []Op{generation(3, of(Served, 2, 30, r(0, 3, 0))), generation(2, of(Served, 3, 40, r(0, 3, 0)))}, []Op{generation(3, of(Served, 2, 30, r(0, 3, 0))), generation(2, of(Served, 3, 31, r(0, 3, 0))), generation(2, of(Served, 3, 40, r(1, 3, 0))), generation(-1, of(Served, 3, 50, r(0, 3, 0)))}},
		{"out-of-range", Options{}, []Op{of(OutOfRange, 2, 30, r(0, 3, 0))}, []Op{of(OutOfRange, 2, 30, r(0, 4, 0)), of(OutOfRange, 2, 25, r(0, 3, 0))}},
		{"list-offsets", Options{}, []Op{of(Lookup, 2, 30, r(0, 2, 1000)), of(Lookup, 2, 40, r(0, 1, 1000))}, []Op{of(Lookup, 2, 30, r(0, 1, 1000)), of(Lookup, 2, 40, r(0, 2, 2000))}},
	} {
		for _, h := range []struct {
			ops []Op
			bad bool
		}{{c.bad, true}, {c.clean, false}} {
			got := Check(append(three(), h.ops...), c.opt)
			if h.bad && got.Counts[c.rule] == 0 || !h.bad && len(got.Counts) != 0 {
				t.Errorf("%s, bad %v: %v %v", c.rule, h.bad, got.Counts, got.Anomalies)
			}
		}
	}
}

// What Kafka allows is told and is no anomaly.
func TestNotes(t *testing.T) {
	w := func(key int32, offset int64, value uint64) Record { return Record{key, true, offset, value, 0} }
	for rule, ops := range map[string][]Op{
		"G0":            {of(Txn, 1, 0, w(0, 0, 1), w(1, 1, 4)), of(Txn, 2, 0, w(0, 1, 2), w(1, 0, 3))},
		"G0-realtime":   {of(Txn, 1, 0, w(0, 0, 1), w(1, 1, 4)), of(Txn, 2, 0, w(0, 1, 2), w(1, 0, 3))},
		"G1c-process":   {of(Txn, 1, 0, Record{0, false, 0, 1, 0}), of(Txn, 1, 10, w(0, 0, 1))},
		"int-send-skip": {of(Txn, 1, 0, w(0, 0, 1), w(0, 4, 2))},
	} {
		if got := Check(ops, Options{Transactional: true}); got.Notes[rule] == 0 || len(got.Counts) != 0 {
			t.Errorf("%s: %v %v", rule, got.Notes, got.Counts)
		}
	}
}

// What retention has removed is neither lost nor skipped.
func TestRetention(t *testing.T) {
	ops := append(three(), marked(poll(2, 30, 2, 3), Mark{0, 2, 3, 3}))
	if got := Check(ops, Options{Final: true}); len(got.Counts) != 0 {
		t.Error(got.Anomalies)
	}
}

func TestScrub(t *testing.T) {
	good := []Run{{0, 0, 9, "a"}, {0, 10, 19, "b"}, {1, 5, 6, "b"}}
	if got := Scrub(good, []string{"a", "b", "new"}, []string{"a"}); len(got) != 0 {
		t.Error(got)
	}
	for rule, got := range map[string][]Anomaly{
		"manifest":       Scrub([]Run{{0, 0, 9, "a"}, {0, 11, 19, "a"}}, []string{"a"}, nil),
		"missing-object": Scrub(good, []string{"a"}, nil),
		"zombie-object":  Scrub(good, []string{"a", "b"}, []string{"c"}),
	} {
		if len(got) != 1 || got[0].Rule != rule {
			t.Errorf("%s: %v", rule, got)
		}
	}
}

func TestLinearizable(t *testing.T) {
	op := func(process int, c Command, v int64, out Outcome, start, end int64) Metadata {
		return Metadata{"t", process, c, v, out, start, end}
	}
	made := op(1, Create, 1, OK, 0, 1)
	for _, c := range []struct {
		name string
		ops  []Metadata
		want bool
	}{
		{"made, read, removed", []Metadata{made, op(2, Get, 1, OK, 2, 3), op(1, Delete, 0, OK, 4, 5), op(2, Get, -1, OK, 6, 7)}, true},
		{"made twice", []Metadata{made, op(2, Create, 2, OK, 2, 3)}, false},
		{"a stale read", []Metadata{made, op(1, Set, 5, OK, 2, 3), op(2, Get, 1, OK, 4, 5)}, false},
		{"unknown and later seen", []Metadata{made, op(1, Set, 5, Info, 2, 3), op(2, Get, 1, OK, 4, 5), op(2, Get, 5, OK, 6, 7)}, true},
		{"unknown and undone", []Metadata{made, op(1, Set, 5, Info, 2, 3), op(2, Get, 5, OK, 4, 5), op(2, Get, 1, OK, 6, 7)}, false},
		{"failed and seen", []Metadata{made, op(1, Set, 5, Fail, 2, 3), op(2, Get, 5, OK, 4, 5)}, false},
		{"another name", []Metadata{made, {"u", 2, Get, -1, OK, 2, 3}}, true},
	} {
		if ok, decided := Linearizable(c.ops, time.Minute); !decided || ok != c.want {
			t.Errorf("%s: %v %v", c.name, ok, decided)
		}
	}
}

// history draws one that a correct broker gives: sends of several producers in flight at once, some unknown, and readers at any place.
func history(t *rapid.T) (ops []Op) {
	keys := rapid.Int32Range(1, 3).Draw(t, "keys")
	logs, at, value := make([][]uint64, keys), map[[2]int32]int{}, uint64(0)
	for now, end := int64(10), int64(rapid.IntRange(20, 400).Draw(t, "steps")); now < end; now++ {
		k, p := rapid.Int32Range(0, keys-1).Draw(t, "key"), rapid.Int32Range(0, 3).Draw(t, "process")
		switch rapid.IntRange(0, 2).Draw(t, "kind") {
		case 0:
			value++
			out := rapid.SampledFrom([]Outcome{OK, OK, Info, Fail}).Draw(t, "outcome")
			o := send(p, out, now-rapid.Int64Range(0, 5).Draw(t, "before"), now, k, -1, value)
			if out == OK {
				o.Records[0].Offset = int64(len(logs[k]))
			}
			if o.Process, o.Start = int32(value)+100, max(o.Start, 0); out == OK || out == Info && rapid.Bool().Draw(t, "happened") {
				logs[k] = append(logs[k], value)
			}
			ops = append(ops, o)
		default:
			o := Op{Process: p, Kind: Poll, Outcome: OK, Start: now, End: now, Marks: []Mark{{k, 0, int64(len(logs[k])), int64(len(logs[k]))}}}
			next := at[[2]int32{p, k}]
			upTo := rapid.IntRange(next, len(logs[k])).Draw(t, "end")
			for i := next; i < upTo; i++ {
				o.Records = append(o.Records, Record{k, false, int64(i), logs[k][i], uint32(logs[k][i])})
			}
			at[[2]int32{p, k}] = upTo
			ops = append(ops, o)
		}
	}
	final := Op{Process: 99, Kind: Poll, Outcome: OK, Start: 1000, End: 1001}
	for k := range keys {
		for i, v := range logs[k] {
			final.Records = append(final.Records, Record{k, false, int64(i), v, uint32(v)})
		}
	}
	return append(ops, final)
}

// Correct histories have no anomaly, and are read from a file as they were written.
func TestCleanHistories(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ops := history(t)
		var file []byte
		for i := range ops {
			file = Append(file, &ops[i])
		}
		read, err := Read(bytes.NewReader(file))
		if err != nil || !reflect.DeepEqual(ops, read) {
			t.Fatalf("read %v, %v; wrote %v", read, err, ops)
		}
		if cut, err := Read(bytes.NewReader(file[:len(file)-1])); err == nil || len(cut) != len(ops)-1 {
			t.Fatalf("%d operations of a cut file, %v", len(cut), err)
		}
		if got := Check(ops, Options{Final: true}); len(got.Counts) != 0 {
			t.Fatal(got.Anomalies)
		}
		last := &ops[len(ops)-1] // of those that the final reader saw one is taken away
		if len(last.Records) > 0 && last.Kind == Poll && last.Process == 99 {
			gone := last.Records[len(last.Records)-1]
			ops = slices.DeleteFunc(ops, func(o Op) bool {
				return o.Kind == Poll && slices.ContainsFunc(o.Records, func(r Record) bool { return r.Value == gone.Value }) && o.Process != 99
			})
			for i := range ops {
				if ops[i].Process == 99 {
					ops[i].Records = ops[i].Records[:len(ops[i].Records)-1]
				}
			}
			acked := slices.ContainsFunc(ops, func(o Op) bool { return o.Kind == Send && o.Outcome == OK && o.Records[0].Value == gone.Value })
			if got := Check(ops, Options{Final: true}); acked && got.Counts["unseen"]+got.Counts["lost-write"] == 0 {
				t.Fatalf("value %d is gone: %v", gone.Value, got.Counts)
			}
		}
	})
}

// Ten million observations: a quarter are sends of one record each, the others were read by three readers.
func BenchmarkCheck10M(b *testing.B) {
	const sends, keys = 2_500_000, 12
	for b.Loop() {
		b.StopTimer()
		ops := make([]Op, 0, sends+3*sends/100)
		for i := range int64(sends) {
			ops = append(ops, send(int32(i%8), OK, i*10, i*10+95, int32(i%keys), i/keys, uint64(i+1)))
		}
		for reader := range int32(3) {
			for k := range int64(keys) {
				for from := k; from < sends; from += 100 * keys {
					o := Op{Process: 100 + reader, Kind: Poll, Outcome: OK, Start: from * 10, End: from*10 + 5}
					for i := from; i < min(sends, from+100*keys); i += keys {
						o.Records = append(o.Records, Record{int32(k), false, i / keys, uint64(i + 1), uint32(i + 1)})
					}
					ops = append(ops, o)
				}
			}
		}
		b.StartTimer()
		if got := Check(ops, Options{Final: true}); got.Observed != 4*sends || len(got.Counts) != 0 {
			b.Fatal(got.Observed, got.Anomalies)
		}
	}
}
