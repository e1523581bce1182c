package record

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
)

func build(t testing.TB, c Codec, n, valueBytes int) Batch {
	t.Helper()
	w := NewBuilder(c)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range n {
		v := make([]byte, valueBytes)
		for j := range v {
			v[j] = byte(rng.IntN(64))
		}
		w.Add(Timestamp(1000+i*10), []byte(fmt.Sprint("k", i)), v, Header{"h", nil}, Header{"", []byte("x")})
	}
	b, err := w.Batch()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var codecs = []Codec{CodecNone, CodecGzip, CodecSnappy, CodecLZ4, CodecZstd}

func TestRoundTripOfEveryCodec(t *testing.T) {
	for _, c := range codecs {
		b := build(t, c, 100, 200)
		if got, rest, err := Next(append(bytes.Clone(b), "tail"...)); err != nil || !bytes.Equal(got, b) || string(rest) != "tail" {
			t.Fatalf("%s: Next: %v, rest %q", c, err, rest)
		}
		if err := Validate(b, Limits{Walk: true, NeedKeys: true}); err != nil {
			t.Fatalf("%s: %v", c, err)
		}
		PatchHeader(b, 500, 7)
		if err := b.CheckCRC(); err != nil || b.BaseOffset() != 500 || b.LeaderEpoch() != 7 || b.LastOffset() != 599 {
			t.Fatalf("%s: after patching: %v", c, err)
		}
		n := 0
		err := Each(b, 0, func(o Offset, r *Record) bool {
			if o != Offset(500+n) || string(r.Key) != fmt.Sprint("k", n) || len(r.Value) != 200 || r.Timestamp != Timestamp(1000+n*10) ||
				len(r.Headers) != 2 || r.Headers[0].Value != nil || string(r.Headers[1].Value) != "x" {
				t.Fatalf("%s: record %d: %+v at %d", c, n, r, o)
			}
			n++
			return true
		})
		if err != nil || n != 100 {
			t.Fatalf("%s: %d records, %v", c, n, err)
		}
		for _, to := range codecs {
			r, err := Recompress(b, to, 0)
			if err != nil || r.Codec() != to || r.BaseOffset() != 500 || Validate(r, Limits{Walk: true}) != nil {
				t.Fatalf("%s to %s: %v", c, to, err)
			}
		}
	}
}

func TestTimestampLookup(t *testing.T) {
	for _, c := range codecs {
		w := NewBuilder(c)
		for _, ts := range []Timestamp{100, 50, 300, 300, 20} {
			w.Add(ts, nil, []byte("v"))
		}
		b, _ := w.Batch()
		PatchHeader(b, 10, 0)
		for _, q := range []struct {
			ts, at Timestamp
			from   Offset
			off    Offset
			ok     bool
		}{{0, 100, 0, 10, true}, {60, 100, 0, 10, true}, {101, 300, 0, 12, true}, {300, 300, 13, 13, true}, {301, 0, 0, 0, false}, {10, 20, 14, 14, true}} {
			off, at, ok, err := FirstAtOrAfter(b, q.ts, q.from)
			if err != nil || off != q.off || at != q.at || ok != q.ok {
				t.Errorf("%s: at or after %d from %d: %d %d %v %v, want %d %d %v", c, q.ts, q.from, off, at, ok, err, q.off, q.at, q.ok)
			}
		}
		for _, q := range []struct {
			from, off Offset
			at        Timestamp
		}{{0, 12, 300}, {13, 13, 300}, {14, 14, 20}} {
			if off, at, err := MaxRecord(b, q.from); off != q.off || at != q.at || err != nil {
				t.Errorf("%s: max from %d: %d %d %v", c, q.from, off, at, err)
			}
		}
	}
}

func TestLogAppendTime(t *testing.T) {
	b := build(t, CodecNone, 3, 5)
	b.SetLogAppendTime(77777)
	if err := Validate(b, Limits{Walk: true}); err != nil {
		t.Fatal(err)
	}
	err := Each(b, 0, func(_ Offset, r *Record) bool {
		if r.Timestamp != 77777 {
			t.Errorf("timestamp %d", r.Timestamp)
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestRefusals(t *testing.T) {
	good := build(t, CodecNone, 3, 20)
	seal := func(f func(Batch)) Batch { b := Batch(bytes.Clone(good)); f(b); b.SealCRC(); return b }
	for _, c := range []struct {
		name string
		b    Batch
		l    Limits
		want error
	}{
		{"magic 0", seal(func(b Batch) { b[magicAt] = 0 }), Limits{}, ErrMagic},
		{"magic 1", seal(func(b Batch) { b[magicAt] = 1 }), Limits{}, ErrMagic},
		{"magic 3", seal(func(b Batch) { b[magicAt] = 3 }), Limits{}, ErrMagic},
		{"CRC", func() Batch { b := Batch(bytes.Clone(good)); b[70] ^= 1; return b }(), Limits{}, ErrCRC},
		{"control", seal(func(b Batch) { b[attributesAt+1] |= controlBit }), Limits{}, ErrControl},
		{"count 0", seal(func(b Batch) { b[countAt+3] = 0 }), Limits{}, ErrInvalid},
		{"negative count", seal(func(b Batch) { b[countAt] = 0x80 }), Limits{}, ErrInvalid},
		{"count against delta", seal(func(b Batch) { b[countAt+3] = 2 }), Limits{}, ErrInvalid},
		{"codec 5", seal(func(b Batch) { b[attributesAt+1] |= 5 }), Limits{}, ErrCodec},
		{"unknown attribute", seal(func(b Batch) { b[attributesAt] = 1 }), Limits{}, ErrInvalid},
		{"sequence without", seal(func(b Batch) { clear(b[producerIDAt : producerIDAt+8]) }), Limits{}, ErrInvalid},
		{"transactional without producer", seal(func(b Batch) { b[attributesAt+1] |= transactionalBit }), Limits{}, ErrInvalid},
		{"too large", good, Limits{BatchBytes: len(good) - 1}, ErrTooLarge},
		{"hostile count", seal(func(b Batch) {
			copy(b[lastDeltaAt:], []byte{0x7f, 0xff, 0xff, 0xfe})
			copy(b[countAt:], []byte{0x7f, 0xff, 0xff, 0xff})
		}), Limits{}, ErrInvalid},
		{"garbage gzip", seal(func(b Batch) { b[attributesAt+1] |= 1 }), Limits{Walk: true}, ErrInvalid},
		{"record cut", seal(func(b Batch) { b[HeaderBytes] = 4 }), Limits{Walk: true}, ErrInvalid},
	} {
		if err := Validate(c.b, c.l); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.want)
		}
	}
	w := NewBuilder(CodecNone)
	w.Add(1, []byte("k"), nil)
	w.Add(1, nil, []byte("v"))
	b, _ := w.Batch()
	var re *RecordError
	if err := Validate(b, Limits{NeedKeys: true}); !errors.As(err, &re) || re.Index != 1 || !errors.Is(err, ErrNullKey) {
		t.Errorf("null key: %v", err)
	}
	for _, cut := range []int{0, 1, 60} {
		if _, _, err := Next(good[:cut]); !errors.Is(err, ErrTruncated) {
			t.Errorf("Next of %d bytes: %v", cut, err)
		}
	}
	short := bytes.Clone(good)
	short[lengthAt] = 0xff
	if _, _, err := Next(short); !errors.Is(err, ErrInvalid) {
		t.Errorf("negative length: %v", err)
	}
}

// A batch of a megabyte that would decompress to a gigabyte is refused without holding what it decompresses to.
func TestBombs(t *testing.T) {
	for _, c := range codecs[1:] {
		w := NewBuilder(c)
		w.Add(1, []byte("k"), make([]byte, 64<<20))
		b, err := w.Batch()
		if err != nil {
			t.Fatal(err)
		}
		if err := Validate(b, Limits{Walk: true, RecordsBytes: 1 << 20}); !errors.Is(err, ErrTooLarge) && !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", c, err)
		}
		if c == CodecSnappy {
			continue // raw snappy is one block: it is bounded by its own ratio instead
		}
		if n := testing.AllocsPerRun(3, func() { _ = Validate(b, Limits{Walk: true, RecordsBytes: 1 << 20}) }); n > 200 {
			t.Errorf("%s: %v allocations", c, n)
		}
	}
}

func TestCombineCRC(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	data := make([]byte, 100_000)
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	for range 200 {
		i, j := rng.IntN(len(data)), rng.IntN(len(data))
		a, b := data[:i], data[:j]
		if got, want := CombineCRC(CRC(a), CRC(b), int64(len(b))), UpdateCRC(CRC(a), b); got != want {
			t.Fatalf("lengths %d and %d: %08x, want %08x", i, j, got, want)
		}
	}
}

func FuzzBatch(f *testing.F) {
	for _, c := range codecs {
		f.Add([]byte(build(f, c, 3, 10)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b, _, err := Next(data)
		if err != nil {
			return
		}
		b = bytes.Clone(b)
		b.SealCRC() // let the fuzzer past the checksum
		if Validate(b, Limits{Walk: true, RecordsBytes: 1 << 20}) != nil {
			return
		}
		n := int32(0)
		if err := Each(b, 1<<20, func(Offset, *Record) bool { n++; return true }); err != nil || n != b.Count() {
			t.Fatalf("valid batch of %d records: read %d, %v", b.Count(), n, err)
		}
		if r, err := Recompress(b, CodecNone, 1<<20); err != nil || Validate(r, Limits{Walk: true}) != nil {
			t.Fatalf("recompress: %v", err)
		}
	})
}

// FuzzCodecs decompresses any bytes: what comes out is never above the limit, a decoder that has met damage reads the next batch as it was, and compressing the bytes themselves and
// reading them back gives them again.
func FuzzCodecs(f *testing.F) {
	const limit = 1 << 16
	good := map[Codec]Batch{}
	for i, c := range codecs {
		good[c] = build(f, c, 3, 10)
		f.Add(byte(i), []byte(good[c].Records()))
		bomb, err := Compress(c, make([]byte, 4*limit))
		if err != nil {
			f.Fatal(err)
		}
		if c != CodecNone {
			f.Add(byte(i), bomb)
		}
		f.Add(byte(0xf0+i), bomb[:10])
	}
	f.Add(byte(2), append(append(bytes.Clone(xerialMagic), 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 3), 1, 0, 'a'))
	f.Fuzz(func(t *testing.T, codec byte, data []byte) {
		c := codecs[int(codec)%len(codecs)]
		b := append(bytes.Clone(good[c][:HeaderBytes]), data...)
		if r, err := Recompress(b, CodecNone, limit); err == nil && len(r) > HeaderBytes+limit {
			t.Fatalf("%s: %d bytes were decompressed, the limit is %d", c, len(r), limit)
		}
		_ = Each(b, limit, func(_ Offset, r *Record) bool {
			if len(r.Key)+len(r.Value) > limit {
				t.Fatalf("%s: a record of %d bytes, the limit is %d", c, len(r.Key)+len(r.Value), limit)
			}
			return true
		})
		if err := Validate(good[c], Limits{Walk: true}); err != nil {
			t.Fatalf("%s: the next batch: %v", c, err)
		}
		if codec < 0xf0 {
			return // making an encoder costs more than all the above
		}
		z, err := Compress(c, data)
		if err != nil {
			t.Fatal(err)
		}
		b = append(bytes.Clone(good[c][:HeaderBytes]), z...)
		if r, err := Recompress(b, CodecNone, int64(len(data))); err != nil || !bytes.Equal(r.Records(), data) {
			t.Fatalf("%s: %d bytes read back: %v", c, len(data), err)
		}
	})
}

func BenchmarkValidateHeaderAndCRC(b *testing.B) {
	batch := build(b, CodecNone, 16, 1024)
	b.SetBytes(int64(len(batch)))
	b.ReportAllocs()
	for b.Loop() {
		if err := Validate(batch, Limits{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWalk(b *testing.B) {
	for _, c := range codecs {
		b.Run(c.String(), func(b *testing.B) {
			batch := build(b, c, 16, 1024)
			b.SetBytes(int64(len(batch)))
			b.ReportAllocs()
			for b.Loop() {
				if err := Validate(batch, Limits{Walk: true}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkCombineCRC(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		CombineCRC(0x12345678, 0x9abcdef0, 16384)
	}
}
