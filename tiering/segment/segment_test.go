package segment

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/estran/estran/tiering/record"
)

// sample is an object of two partitions with known contents.
type sample struct {
	runs   []RunInput
	bodies [][][]byte
	flip   func(run, batch int, p []byte)
}

func (s *sample) ReadBody(run, batch int, p []byte) error {
	copy(p, s.bodies[run][batch])
	if s.flip != nil {
		s.flip(run, batch, p)
	}
	return nil
}

func (s *sample) add(t testing.TB, tp record.TopicPartition, base record.Offset, batches, records, size int) {
	t.Helper()
	in := RunInput{TP: tp, Epochs: []EpochStart{{3, base}}, Producers: []ProducerState{{9, 1, 77, base + 5, 1234}}}
	var bodies [][]byte
	for i := range batches {
		w := record.NewBuilder(record.Codec(i % 5))
		for j := range records {
			w.Add(record.Timestamp(1000*i+j), []byte(fmt.Sprint("k", i, j)), bytes.Repeat([]byte{byte('a' + j)}, size))
		}
		b, err := w.Batch()
		if err != nil {
			t.Fatal(err)
		}
		record.PatchHeader(b, base, 3)
		base = b.LastOffset() + 1
		sb := Batch{Size: int32(len(b))}
		copy(sb.Header[:], b)
		in.Batches, bodies = append(in.Batches, sb), append(bodies, b.Records())
	}
	s.runs, s.bodies = append(s.runs, in), append(s.bodies, bodies)
}

var meta = Meta{Cluster: [16]byte{1}, Shard: 2, Number: 42, Term: 7, UUID: UUID{0xab}, Class: 3, Written: 1_700_000_000_000}

func build(t testing.TB, batches, records, size int) (*sample, *Built, []byte) {
	t.Helper()
	s := &sample{}
	s.add(t, record.TopicPartition{Topic: record.TopicID{1}, Partition: 0}, 100, batches, records, size)
	s.add(t, record.TopicPartition{Topic: record.TopicID{1}, Partition: 5}, 0, batches, records, size)
	b, err := Build(meta, s.runs, s)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(io.NewSectionReader(b, 0, b.Size))
	if err != nil || int64(len(data)) != b.Size {
		t.Fatalf("%d of %d bytes: %v", len(data), b.Size, err)
	}
	return s, b, data
}

func TestRoundTrip(t *testing.T) {
	s, b, data := build(t, 40, 20, 300)
	if got := record.CRC(data); got != b.CRC32C {
		t.Fatalf("CRC computed without the bodies %08x, of the bytes %08x", b.CRC32C, got)
	}
	f, err := OpenFooter(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	if f.Meta != meta || len(f.Runs) != 2 {
		t.Fatalf("footer: %+v", f)
	}
	for i := range f.Runs {
		run := &f.Runs[i]
		if run.PartitionRun != b.Runs[i] {
			t.Errorf("run %d: the footer has %+v, the builder said %+v", i, run.PartitionRun, b.Runs[i])
		}
		if pos := b.Size - int64(run.IndexAt); pos != run.IndexPos {
			t.Errorf("index at %d, the run says %d", run.IndexPos, pos)
		}
		n := 0
		err := EachBatch(bytes.NewReader(data), run, func(x record.Batch) error {
			if !bytes.Equal(x.Records(), s.bodies[i][n]) || !bytes.Equal(x[:record.HeaderBytes], s.runs[i].Batches[n].Header[:]) {
				t.Errorf("run %d batch %d differs", i, n)
			}
			n++
			return nil
		})
		if err != nil || n != 40 {
			t.Fatalf("run %d: %d batches, %v", i, n, err)
		}
		d, err := ReadDetails(bytes.NewReader(data), run)
		if err != nil || len(d.Epochs) != 1 || d.Epochs[0].Epoch != 3 || len(d.Producers) != 1 || d.Producers[0] != s.runs[i].Producers[0] {
			t.Errorf("details: %+v %v", d, err)
		}
	}
	p := make([]byte, 1000) // any position, backwards too
	for _, off := range []int64{b.Size - 1000, 0, 5000, 4999, 17} {
		if _, err := b.ReadAt(p, off); err != nil || !bytes.Equal(p, data[off:off+1000]) {
			t.Errorf("ReadAt %d: %v", off, err)
		}
	}
}

func TestEveryFlippedBitIsFound(t *testing.T) {
	_, _, data := build(t, 3, 2, 10)
	for i := range data {
		bad := bytes.Clone(data)
		bad[i] ^= 0x10
		if err := Cat(io.Discard, bytes.NewReader(bad), int64(len(bad)), true); err == nil {
			if err = Dump(io.Discard, bytes.NewReader(bad), int64(len(bad)), true); err == nil {
				t.Fatalf("byte %d of %d flipped and nothing noticed", i, len(data))
			}
		}
	}
	for n := range data {
		if err := Cat(io.Discard, bytes.NewReader(data[:n]), int64(n), true); err == nil {
			t.Fatalf("cut to %d of %d bytes and nothing noticed", n, len(data))
		}
	}
}

func TestUnknownVersion(t *testing.T) {
	_, _, data := build(t, 1, 1, 1)
	newer := bytes.Clone(data)
	tr := newer[len(newer)-trailerBytes:]
	tr[19] = 2
	c := record.CRC(tr[:20])
	copy(tr[20:], []byte{byte(c >> 24), byte(c >> 16), byte(c >> 8), byte(c)})
	if _, err := OpenFooter(bytes.NewReader(newer), int64(len(newer))); !errors.Is(err, ErrVersion) || errors.Is(err, ErrCorrupt) {
		t.Errorf("trailer: %v", err)
	}
	newer = bytes.Clone(data)
	newer[11] = 9
	if err := CheckHeader(newer); !errors.Is(err, ErrVersion) {
		t.Errorf("header: %v", err)
	}
}

func TestCorruptBodyIsNotSealed(t *testing.T) {
	s, b, _ := build(t, 5, 5, 50)
	s.flip = func(run, batch int, p []byte) {
		if run == 1 && batch == 2 {
			p[3] ^= 1
		}
	}
	b.last = -1
	_, err := io.Copy(io.Discard, io.NewSectionReader(b, 0, b.Size))
	var be *BodyError
	if !errors.As(err, &be) || be.TP.Partition != 5 || be.Offset != 10 || !errors.Is(err, ErrBody) {
		t.Errorf("got %v", err)
	}
}

func TestBuildRefuses(t *testing.T) {
	s := &sample{}
	s.add(t, record.TopicPartition{}, 0, 2, 2, 2)
	s.runs[0].Batches[0], s.runs[0].Batches[1] = s.runs[0].Batches[1], s.runs[0].Batches[0]
	if _, err := Build(meta, s.runs, s); err == nil {
		t.Error("batches out of order were sealed")
	}
	if _, err := Build(meta, []RunInput{{}}, s); err == nil {
		t.Error("an empty run was sealed")
	}
}

func TestKeys(t *testing.T) {
	tp := record.TopicPartition{Topic: record.TopicID{0xde, 0xad}, Partition: 12}
	for _, c := range []struct {
		o    Object
		want string
	}{
		{Object{Plan: Plan{Class: 3, Owner: Owner{TP: tp, First: 5, Last: 99}, UUID: UUID{1}}, Term: 4},
			"v1/data/ttl-007d/c3/dead0000000000000000000000000000/12/00000000000000000005-00000000000000000099-00000000000000000004-01000000000000000000000000000000.seg"},
		{Object{Plan: Plan{Owner: Owner{Shared: true}, UUID: UUID{2}}, Shard: 3, Number: 17, Term: 5},
			"v1/data/keep/91/shared/3/00000000000000000017-00000000000000000005-02000000000000000000000000000000.seg"},
	} {
		got := c.o.Key()
		if strings.SplitN(got, "/", 5)[4] != strings.SplitN(c.want, "/", 5)[4] || !strings.HasPrefix(got, c.want[:strings.LastIndex(c.want, "/")][:12]) {
			t.Errorf("got  %s\nwant %s", got, c.want)
		}
		back, err := ParseKey(got)
		if err != nil || back != c.o {
			t.Errorf("ParseKey: %+v %v", back, err)
		}
	}
	for _, bad := range []string{"", "v1/data/ttl-007d/c3/x", "v2/" + strings.Repeat("a/", 6), "v1/meta/format.json"} {
		if _, err := ParseKey(bad); !errors.Is(err, ErrKey) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestClasses(t *testing.T) {
	for _, c := range []struct {
		ms      int64
		compact bool
		want    string
	}{{-1, false, "keep"}, {0, false, "ttl-001d"}, {dayMs, false, "ttl-001d"}, {dayMs + 1, false, "ttl-003d"}, {7 * dayMs, false, "ttl-007d"},
		{7 * dayMs, true, "keep"}, {365 * dayMs, false, "ttl-365d"}, {365*dayMs + 1, false, "keep"}} {
		if got := ClassForRetention(c.ms, c.compact).String(); got != c.want {
			t.Errorf("retention %d compact %v: %s, want %s", c.ms, c.compact, got, c.want)
		}
	}
}

// The bytes of version 1 never change.
func TestGolden(t *testing.T) {
	s := &sample{}
	w := record.NewBuilder(record.CodecNone)
	w.Add(1000, []byte("key"), []byte("value"), record.Header{Key: "h", Value: []byte("x")})
	w.Add(1001, nil, nil)
	b, _ := w.Batch()
	record.PatchHeader(b, 10, 2)
	sb := Batch{Size: int32(len(b))}
	copy(sb.Header[:], b)
	s.runs = []RunInput{{TP: record.TopicPartition{Topic: record.TopicID{7}, Partition: 3}, Batches: []Batch{sb}, Epochs: []EpochStart{{2, 0}},
		Producers: []ProducerState{{5, 0, 1, 11, 1001}}, Aborted: []Aborted{{5, 1, 2, 3}}}}
	s.bodies = [][][]byte{{b.Records()}}
	built, err := Build(meta, s.runs, s)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(io.NewSectionReader(built, 0, built.Size))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", "golden", "v1.seg")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(data, want) {
		t.Fatalf("the bytes of a version 1 object changed (%v):\n%s", err, hex.Dump(data))
	}
	var out strings.Builder
	if err := Cat(&out, bytes.NewReader(want), int64(len(want)), true); err != nil || !strings.Contains(out.String(), `"offset":10,"timestamp":1000,"key":"key","value":"value"`) {
		t.Errorf("cat: %s %v", out.String(), err)
	}
}

// reseal renews every checksum that stands where the footer says, so that what is behind them is read.
func reseal(data []byte) {
	be := binary.BigEndian
	n := len(data) - trailerBytes
	if n < 0 {
		return
	}
	t := data[n:]
	sum := func(from, to uint64) {
		if from <= to && to >= 4 && to <= uint64(len(data)) && from <= to-4 {
			be.PutUint32(data[to-4:], record.CRC(data[from:to-4]))
		}
	}
	pos, size := be.Uint64(t), uint64(be.Uint32(t[8:]))
	if pos < uint64(n) && size <= uint64(n)-pos {
		for e := data[pos : pos+size]; len(e) >= footerHead+footerRun; e = e[footerRun:] {
			run := e[footerHead:]
			sum(be.Uint64(run[52:]), be.Uint64(run[52:])+uint64(be.Uint32(run[60:])))
			sum(be.Uint64(run[64:]), be.Uint64(run[64:])+uint64(be.Uint32(run[72:])))
		}
		be.PutUint32(t[12:], record.CRC(data[pos:pos+size]))
	}
	be.PutUint32(t[20:], record.CRC(t[:20]))
}

// FuzzOpen reads any object, as it is and with its checksums renewed: what is wrong with it is said as corruption or an unknown version, and little is allocated.
func FuzzOpen(f *testing.F) {
	_, _, data := build(f, 2, 2, 5)
	f.Add(data)
	_, _, data = build(f, 1, 1, 1)
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, sealed := range []bool{false, true} {
			if sealed {
				data = bytes.Clone(data)
				reseal(data)
			}
			size := int64(len(data))
			for _, err := range []error{Cat(io.Discard, bytes.NewReader(data), size, true), Dump(io.Discard, bytes.NewReader(data), size, false)} {
				if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
					t.Errorf("neither corrupt nor of another version: %v", err)
				}
			}
		}
		_, _ = ParseIndex(data)
		_, _ = ParseDetails(data)
	})
}

func FuzzKey(f *testing.F) {
	f.Add((&Object{Plan: Plan{Owner: Owner{Shared: true}}}).Key())
	f.Fuzz(func(t *testing.T, key string) {
		if o, err := ParseKey(key); err == nil && o.Key() != key {
			t.Errorf("%q reads back as %q", key, o.Key())
		}
	})
}

func BenchmarkBuild(b *testing.B) {
	s := &sample{}
	s.add(b, record.TopicPartition{}, 0, 1000, 16, 1024)
	size := int64(0)
	b.ReportAllocs()
	for b.Loop() {
		x, err := Build(meta, s.runs, s)
		if err != nil {
			b.Fatal(err)
		}
		size = x.Size
	}
	b.SetBytes(size)
}
