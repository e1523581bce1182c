package main

import (
	"io"
	"slices"
	"testing"

	"github.com/estran/estran/localstack/check"
)

// A few rounds of faults with a fixed seed leave a history without anomalies, and every one of them counts.
func TestSlice(t *testing.T) {
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	r, err := run(t.Context(), config{seed: 1, module: "../..", rounds: 6, perLife: 6, nemeses: "none,kill,pause,partition,store-503", keep: t.TempDir()}, t.Output())
	if err != nil || r.Anomalies != 0 || r.Rounds != 6 || r.Acked < 6*ackedPerRound/2 {
		t.Errorf("%+v, %v", r, err)
	}
}

// An acknowledged record that the final reader does not see is an anomaly, and its history is kept.
func TestFailingHistoryIsKept(t *testing.T) {
	r := &result{Found: map[string]int{}}
	ops := []check.Op{{Kind: check.Send, Outcome: check.OK, Records: []check.Record{{Offset: 0, Value: 1}}}}
	if err := r.judge(config{keep: t.TempDir()}, ops, true, io.Discard); err != nil || r.Anomalies != 1 || r.Found["unseen"] != 1 || len(r.Histories) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestRecordsAreChecked(t *testing.T) {
	for v := range uint64(400) {
		b := encode(v + 1)
		if decode(b) != v+1 {
			t.Fatalf("%d reads as %d", v+1, decode(b))
		}
		for i := range b {
			other := slices.Clone(b)
			if other[i] ^= 1; decode(other) != 0 {
				t.Fatalf("byte %d of record %d is not checked", i, v+1)
			}
		}
	}
}

func TestUnknownNemesis(t *testing.T) {
	if _, err := choose("kill,flood"); err == nil {
		t.Error("it was chosen")
	}
}
