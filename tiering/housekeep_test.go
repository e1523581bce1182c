package tiering

import (
	"math"
	"testing"

	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// What expires, run by run: three runs of ten records, 100 bytes and the timestamps 1000, 2000 and 3000 (ms), and 50 hot bytes behind them.
func TestLogStart(t *testing.T) {
	const day = 24 * 3600_000
	for _, c := range []struct {
		name      string
		ms, bytes int64
		now       record.Timestamp
		class     segment.Class
		change    func(*PartitionStatus, []segment.Run)
		want      record.Offset
	}{
		{"no limits", -1, -1, 1 << 40, 0, nil, 0},
		{"nothing is old", 1000, -1, 2000, 0, nil, 0},
		{"as old as allowed", 1000, -1, 2000, 0, nil, 0},
		{"one run is older", 1000, -1, 2001, 0, nil, 10},
		{"two are", 1000, -1, 3001, 0, nil, 20},
		{"all that is sealed, and what is hot is younger", 1000, -1, 4001, 0, func(p *PartitionStatus, _ []segment.Run) { p.MaxTimestamp = 3500 }, 30},
		{"all that is sealed, and what is hot is as old: it is never uploaded", 1000, -1, 4001, 0, nil, 35},
		{"nothing is hot", 1000, -1, 4001, 0, func(p *PartitionStatus, _ []segment.Run) { p.HotBytes, p.HighWatermark = 0, 30 }, 30},
		{"a young run keeps older ones behind it", 1000, -1, 4001, 0, func(_ *PartitionStatus, r []segment.Run) { r[1].MaxTimestamp = 9000 }, 10},
		{"the topic is compacted", 1000, -1, 1 << 40, 0, func(p *PartitionStatus, _ []segment.Run) { p.Compact = true }, 0},
		{"retention 0", 0, -1, 2000, 0, nil, 10},
		{"size: just enough", -1, 350, 1, 0, nil, 0},
		{"size: one byte less than what is there", -1, 349, 1, 0, nil, 0},
		{"size: enough without the first run", -1, 250, 1, 0, nil, 10},
		{"size: almost nothing; what is hot stays", -1, 0, 1, 0, nil, 30},
		{"time or size, whichever is first", 1000, 250, 3001, 0, nil, 20},
		{"records from the future go with their class", 1000, -1, day + 101, 1, func(_ *PartitionStatus, r []segment.Run) { r[0].MaxTimestamp = 1 << 50 }, 35},
		{"and not before", 1000, -1, day + 100, 1, func(_ *PartitionStatus, r []segment.Run) { r[0].MaxTimestamp = 1 << 50 }, 0},
		{"the longest retention there is", math.MaxInt64, -1, 1 << 40, 0, nil, 0},
		{"and the latest record", 1000, -1, 1 << 40, 0, func(p *PartitionStatus, r []segment.Run) {
			r[0].MaxTimestamp, p.MaxTimestamp = math.MaxInt64, math.MaxInt64
		}, 0},
		{"the longest retention, nothing sealed", math.MaxInt64, -1, 1 << 40, 0, func(p *PartitionStatus, _ []segment.Run) { p.LogStart, p.SealedBytes = 30, 0 }, 30},
		{"all has gone", 0, -1, 1 << 40, 0, func(p *PartitionStatus, _ []segment.Run) { p.LogStart, p.HighWatermark = 35, 35 }, 35},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t)
			tp := partition(1)
			p := f.part(tp)
			f.objects[1] = &segment.Object{Number: 1, Plan: segment.Plan{Class: c.class}, UploadedAt: 100}
			for i := range record.Offset(3) {
				p.runs = append(p.runs, segment.Run{Object: 1, StartOffset: 10 * i, EndOffset: 10*i + 9, SizeBytes: 100, MaxTimestamp: record.Timestamp(1000 * (i + 1))})
			}
			s := PartitionStatus{TP: tp, RetentionMs: c.ms, RetentionBytes: c.bytes, Class: c.class, Bounds: Bounds{SealedEnd: 30, HighWatermark: 35, LastStable: 35},
				SealedBytes: 300, HotBytes: 50, MaxTimestamp: 3000}
			if c.change != nil {
				c.change(&s, p.runs)
			}
			if got := New(Config{}, f, f.bucket).logStartOf(&s, c.now); got != c.want {
				t.Errorf("the log starts at %d, want %d", got, c.want)
			}
		})
	}
}

// More runs than one look takes are all looked at.
func TestLogStartBehindManyRuns(t *testing.T) {
	f := newFake(t)
	p := f.part(partition(1))
	f.objects[1] = &segment.Object{Number: 1}
	const n = 2*runsPerLook + 10
	for i := range record.Offset(n) {
		p.runs = append(p.runs, segment.Run{Object: 1, StartOffset: i, EndOffset: i, SizeBytes: 10, MaxTimestamp: 1000})
	}
	s := PartitionStatus{TP: partition(1), RetentionMs: -1, RetentionBytes: 50, Bounds: Bounds{SealedEnd: n, HighWatermark: n}, SealedBytes: 10 * n}
	if got := New(Config{}, f, f.bucket).logStartOf(&s, 1); got != n-5 {
		t.Errorf("the log starts at %d, want %d", got, n-5)
	}
}
