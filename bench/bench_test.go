package main

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/estran/estran/localstack"
	"github.com/google/go-cmp/cmp"
	"github.com/twmb/franz-go/pkg/kgo"
)

func TestLines(t *testing.T) {
	var l line
	l.set("work", "a b")
	l.set("MB/s", 1234.56)
	l.set("share", 0.00001234)
	l.set("n", 3)
	l.set("MB/s", 12.345678)
	const want = "work=a_b MB/s=12.35 share=0.000012 n=3"
	if got := l.String(); got != want {
		t.Errorf("a line is %q, not %q", got, want)
	}
	all, err := parseLines(want + "\n\n" + want)
	if err != nil || len(all) != 2 || all[0].String() != want {
		t.Errorf("read back: %v, %v", all, err)
	}
	if v, ok := all[1].num("MB/s"); !ok || v != 12.35 {
		t.Errorf("MB/s is %v, %v", v, ok)
	}
	if _, ok := all[1].num("work"); ok {
		t.Error("a text is a number")
	}
	for _, bad := range []string{"MB/s", "=3", "a=1 b"} {
		if _, err := parseLine(bad); err == nil {
			t.Errorf("%q is a line", bad)
		}
	}
}

func TestFigures(t *testing.T) {
	for _, c := range []struct {
		v      []float64
		median float64
		cell   string
	}{
		{nil, 0, ""}, {[]float64{2}, 2, "2"}, {[]float64{3, 1}, 2, "2 [1-3]"}, {[]float64{900, 1, 20.04}, 20.04, "20.0 [1-900]"}, {[]float64{4, 1, 3, 2}, 2.5, "2.5 [1-4]"},
	} {
		if got := median(slices.Clone(c.v)); got != c.median {
			t.Errorf("the median of %v is %v, not %v", c.v, got, c.median)
		}
		if got := cell(slices.Clone(c.v)); got != c.cell {
			t.Errorf("the cell of %v is %q, not %q", c.v, got, c.cell)
		}
	}
	ms := func(n ...int) (out []time.Duration) {
		for _, x := range n {
			out = append(out, time.Duration(x)*time.Millisecond)
		}
		return out
	}
	hundred := make([]int, 100)
	for i := range hundred {
		hundred[i] = i + 1
	}
	if a, b, c := quantile(ms(hundred...), .5), quantile(ms(hundred...), .99), quantile(nil, .5); a != 51 || b != 100 || c != 0 {
		t.Errorf("quantiles of 1 to 100 are %v and %v, of nothing %v", a, b, c)
	}
	for got, want := range map[string]string{share(50, 200, "MB/s"): "25 %", share(2, 1, "p50_ms"): "50 %", share(0, 1, "MB/s"): "", share(1, 0, "MB/s"): ""} {
		if got != want {
			t.Errorf("a share is %q, not %q", got, want)
		}
	}
}

// A run that leaves more than 4 segments of a shard to be sealed does not count.
func TestBorrowed(t *testing.T) {
	if borrowed(4*64<<20) || !borrowed(4*64<<20+1) {
		t.Error("borrowed begins elsewhere than behind 4 segments")
	}
	lines, err := parseLines("work=w system=estran nodes=1 MB/s=1\nwork=w system=estran nodes=1 MB/s=9 counts=borrowed\nwork=w system=estran nodes=1 error=x_y\nwork=w system=kafka nodes=3 MB/s=5")
	if err != nil {
		t.Fatal(err)
	}
	count, not := counted(lines, "w", estran, 1)
	if got := values(count, "MB/s"); !slices.Equal(got, []float64{1}) {
		t.Errorf("%v count", got)
	}
	if want := []string{"estran: borrowed", "estran failed: x y"}; !slices.Equal(not, want) {
		t.Errorf("the others do not because of %q, not %q", not, want)
	}
}

func TestPerformance(t *testing.T) {
	const out = "3 records sent, 1.0 records/sec (0.01 MB/sec), 1.0 ms avg latency, 2.0 ms max latency.\n" +
		"50000 records sent, 28248.587571 records/sec (27.59 MB/sec), 123.40 ms avg latency, 500.50 ms max latency, 100 ms 50th, 200 ms 95th, 300 ms 99th, 400 ms 99.9th.\n"
	var l line
	if err := parsePerformance(out, &l); err != nil {
		t.Fatal(err)
	}
	if want := "MB/s=28.93 max_ms=500.5 p50_ms=100 p99_ms=300 p999_ms=400"; l.String() != want {
		t.Errorf("%s, not %s", l, want)
	}
	if parsePerformance("Exception in thread main", &l) == nil {
		t.Error("an exception is a result")
	}
}

func TestSamples(t *testing.T) {
	got := map[string]float64{}
	err := parseSamples(strings.NewReader("# HELP a b\na{x=\"1 2\",y=\"}\"} 3\na{x=\"2\"} 4e1\nb 5\n\n"), func(name, labels string, v float64) { got[name+" "+labels] = v })
	if err != nil {
		t.Fatal(err)
	}
	if want := map[string]float64{`a x="1 2",y="}"}`: 3, `a x="2"}`: 40, "b ": 5}; !cmp.Equal(got, want) {
		t.Error(cmp.Diff(want, got))
	}
	if parseSamples(strings.NewReader("a x\n"), func(string, string, float64) {}) == nil {
		t.Error("x is a number")
	}
}

func TestCheck(t *testing.T) {
	p := newPool(64, 256)
	rec := func(offset int64, who int, number int64) *kgo.Record {
		return &kgo.Record{Offset: offset, Key: binary.BigEndian.AppendUint64(nil, id(who, number)), Value: p.values[p.at(number)]}
	}
	changed := rec(11, 0, 2)
	changed.Value = slices.Clone(changed.Value)
	changed.Value[5] ^= 1
	for _, c := range []struct {
		name string
		in   []*kgo.Record
		want string // a part of the error
	}{
		{"as it was sent", []*kgo.Record{rec(10, 0, 1), rec(11, 1, 3), rec(12, 0, 2)}, ""},
		{"one is missing", []*kgo.Record{rec(10, 0, 1), rec(11, 0, 2)}, "2 records were read, 3 acknowledged"},
		{"a gap", []*kgo.Record{rec(10, 0, 1), rec(12, 0, 2), rec(13, 0, 3)}, "offset 12 comes where 11 should"},
		{"twice", []*kgo.Record{rec(10, 0, 1), rec(11, 0, 2), rec(12, 0, 2)}, "record 2 is there twice"},
		{"out of order", []*kgo.Record{rec(10, 0, 2), rec(11, 0, 1), rec(12, 0, 3)}, "record 1 of producer 0 comes behind 2"},
		{"changed", []*kgo.Record{rec(10, 0, 1), changed, rec(12, 0, 3)}, "the value of record 2 was changed"},
		{"never sent", []*kgo.Record{rec(10, 0, 1), rec(11, 0, 2), rec(12, 0, 1000)}, "record 1000 was never sent"},
		{"no number", []*kgo.Record{{Offset: 10, Key: []byte("k")}}, "a key of 1 bytes"},
	} {
		k := newCheck(p, 3, 1, map[int32]int64{0: 10})
		for _, r := range c.in {
			k.record(r)
		}
		if err := k.end(3); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	k := newCheck(p, 3, 0, map[int32]int64{0: 10}) // another program's records
	k.record(&kgo.Record{Offset: 10, Value: []byte("v")})
	if err := k.end(1); err != nil {
		t.Error(err)
	}
}

func TestOptions(t *testing.T) {
	o, err := parseOptions(strings.Fields("--nodes 1,3 --rounds 1 --mb 50 --warm 5s --during 1s --retention 60000000 --failovers 4 --partitions 10,1000 --works partitions-1000,one --systems estran"))
	if err != nil {
		t.Fatal(err)
	}
	chosen, err := o.chosen()
	if err != nil || len(chosen) != 2 || chosen[0].name != "one" || chosen[1].name != "partitions-1000" { // in the order of the matrix
		t.Errorf("chosen is %v, %v", chosen, err)
	}
	for _, bad := range []string{"--nodes 2", "--nodes x", "--works no-such", "--works partitions-7", "--systems kafka,redpanda", "--rounds 0", "--during 0s", "more"} {
		if _, err := parseOptions(strings.Fields(bad)); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestWorks(t *testing.T) {
	o, err := parseOptions(nil)
	if err != nil {
		t.Fatal(err)
	}
	var measured []line
	for _, name := range []string{"fdatasync_1024KiB_MB/s", "fdatasync_4KiB_p50_ms", "tcp_MB/s", "tcp_round_trip_p50_ms", "ranged_get_4MiB_MB/s"} {
		l, err := parseLine("value=1 limit=" + name)
		if err != nil {
			t.Fatal(err)
		}
		measured = append(measured, l)
	}
	names := map[string]bool{}
	for _, w := range works(o) {
		if names[w.name] || w.run == nil || len(w.show) == 0 {
			t.Errorf("%s is there twice or not complete", w.name)
		}
		names[w.name] = true
		if w.limit != "" && limitOf(w.limit, 3, measured) == 0 {
			t.Errorf("%s: there is no limit %q", w.name, w.limit)
		}
		if w.setup.store != "" && w.only != estran {
			t.Errorf("%s: Kafka has no store", w.name)
		}
	}
}

func TestKafkaProperties(t *testing.T) {
	shipped, fsync := properties(1, "d", []int{1, 2, 3}, []int{4, 5, 6}, false), properties(1, "d", []int{1, 2, 3}, []int{4, 5, 6}, true)
	if fsync != shipped+"log.flush.interval.messages=1\n" {
		t.Errorf("with fsync Kafka has other settings than that:\n%s", fsync)
	}
	for _, want := range []string{"node.id=2\n", "controller.quorum.voters=1@127.0.0.1:4,2@127.0.0.1:5,3@127.0.0.1:6\n", "listeners=PLAINTEXT://127.0.0.1:2,CONTROLLER://127.0.0.1:5\n", "min.insync.replicas=2\n"} {
		if !strings.Contains(shipped, want) {
			t.Errorf("%q is not among\n%s", want, shipped)
		}
	}
}

func TestReport(t *testing.T) {
	in, err := os.ReadFile(filepath.Join("testdata", "lines.txt"))
	if err != nil {
		t.Fatal(err)
	}
	lines, err := parseLines(string(in))
	if err != nil {
		t.Fatal(err)
	}
	o, err := parseOptions([]string{"--partitions", "1000"})
	if err != nil {
		t.Fatal(err)
	}
	got, golden := report(o, lines), filepath.Join("testdata", "report.golden")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(golden, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Error(cmp.Diff(string(want), got))
	}
}

func TestCurves(t *testing.T) {
	o, err := parseOptions(nil)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := parseLines("work=consume-1 system=estran nodes=1 MB/s=100\nwork=consume-1 system=estran nodes=1 MB/s=300\nwork=consume-12 system=estran nodes=1 MB/s=50\n" +
		"work=consume-1 system=kafka nodes=1 MB/s=150\nwork=consume-1 system=estran nodes=3 MB/s=1")
	if err != nil {
		t.Fatal(err)
	}
	all := works(o)
	if got, want := curves(all), []string{"producers", "consumers", "record bytes", "partitions"}; !slices.Equal(got, want) {
		t.Errorf("curves against %q, not %q", got, want)
	}
	svg := drawCurve(all, lines, "consumers", 1)
	for _, want := range []string{ // the highest is on top, a quarter of it at a quarter of the height; Kafka has one point
		`<polyline points="45.0,45.0 295.0,195.0"`, `<polyline points="45.0,95.0"`, `>200</text>`, `>12</text>`} {
		if !strings.Contains(svg, want) {
			t.Errorf("%s is not in\n%s", want, svg)
		}
	}
	if strings.Contains(svg, kafkaFsync) {
		t.Error("a system without a point is in the curve")
	}
	if svg := drawCurve(all, lines, "consumers", 3); svg != "" {
		t.Errorf("one point is a curve:\n%s", svg)
	}
}

// A slice of the bench: Estran alone, with records that are few.
func TestSlice(t *testing.T) {
	if testing.Short() || !localstack.Supported() {
		t.Skip("processes of Estran")
	}
	if _, err := os.Stat("/proc/self/io"); err != nil {
		t.Skip("what processes use is not in /proc here")
	}
	dir := t.TempDir()
	program, err := localstack.Build(t.Context(), "..", dir)
	if err != nil {
		t.Fatal(err)
	}
	works := []string{"produce-1", "consume-12", "open-1", "one"}
	out, doc := filepath.Join(dir, "out"), filepath.Join(dir, "B.md")
	o, err := parseOptions([]string{"--program", program, "--out", out, "--doc", doc, "--systems", estran, "--nodes", "1", "--rounds", "2", "--mb", "1", "--during", "100ms", "--retention", "1000000",
		"--works", strings.Join(works, ",")})
	if err != nil {
		t.Fatal(err)
	}
	var printed strings.Builder
	if err := bench(t.Context(), o, &printed); err != nil {
		t.Fatalf("%v\n%s", err, printed.String())
	}
	raw, err := os.ReadFile(filepath.Join(out, "raw.txt"))
	if err != nil || string(raw) != printed.String() {
		t.Errorf("raw.txt holds %q, printed was %q: %v", raw, printed.String(), err)
	}
	lines, err := parseLines(printed.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range works {
		count, not := counted(lines, w, estran, 1)
		if len(count) != 2 || len(not) != 0 {
			t.Errorf("%s: %d runs count; %q", w, len(count), not)
		}
		for _, l := range count {
			for _, key := range []string{"MB", "MB/s", "rss_MiB", "lo_B/B", "wire_B/B"} {
				if v, ok := l.num(key); !ok || v <= 0 {
					t.Errorf("%s has %s=%v", l, key, v)
				}
			}
		}
	}
	page, err := os.ReadFile(doc)
	if err != nil || !strings.Contains(string(page), "### `produce-1`: ") || !strings.Contains(string(page), "- `produce-4` (three nodes, one node): ") {
		t.Errorf("%v; the report is\n%s", err, page)
	}
	left, err := filepath.Glob(filepath.Join(out, "data", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("%q were left, %v", left, err)
	}
}
