package main

import (
	"context"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/estran/estran/localstack/check"
	"github.com/estran/estran/localstack/planted"
)

// A few rounds of faults with a fixed seed leave a history without anomalies. Most of them count: for a moment there may be nothing outstanding.
func TestSlice(t *testing.T) {
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	defer func(was time.Duration) { patience = was }(patience)
	patience = 4 * time.Minute
	for seed, c := range []struct {
		nemeses string
		disks   bool // they need root
	}{{"none,kill,pause,partition,store-503,members", false}, {"power-cut-all,clock-all,drain,frozen-disk", true}} {
		r, err := run(t.Context(), config{seed: uint64(seed), module: "../..", rounds: 6, perLife: 6, nemeses: c.nemeses, keep: t.TempDir()}, t.Output())
		if err != nil || r.Anomalies != 0 || r.Rounds+r.Skipped != 6 || r.Rounds < 4 && (!c.disks || os.Geteuid() == 0) || r.Acked < 3*ackedPerRound {
			t.Errorf("%+v, %v", r, err)
		}
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

// roundOf plays one round of n in virtual time against a load that is acknowledged as long as flows says so.
func roundOf(t *testing.T, n nemesis, flows func() bool) (r *result, said string, err error) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		load := &workload{}
		load.unacked.Store(1)
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			for ; ctx.Err() == nil; time.Sleep(time.Millisecond) {
				for p := range load.acked {
					if flows() {
						load.acked[p].Add(1)
					}
				}
			}
		})
		var out strings.Builder
		r = &result{Nemeses: map[string]int{}}
		err = round(ctx, r, &world{rng: rand.New(rand.NewPCG(1, 1))}, load, n, &out)
		said = out.String()
		stop()
		wg.Wait()
	})
	return r, said, err
}

// What ends a round is told apart: a fault that cannot be brought about here, one that does not take effect, a driver that fails, and a cluster that does not come back.
func TestRoundOutcomes(t *testing.T) {
	no, well := func() bool { return false }, nothing
	broken := errors.New("broken")
	begin := func(hit func() bool, heal func(context.Context) error, err error) nemesis {
		return nemesis{name: "n", begin: func(*world) (*fault, error) { return &fault{"", hit, heal}, err }}
	}
	for _, c := range []struct {
		name            string
		n               nemesis
		rounds, skipped int
		stuck, fails    bool
	}{
		{"counts", begin(yes, well, nil), 1, 0, false, false},
		{"unavailable", begin(nil, nil, fmt.Errorf("%w: not root", errUnavailable)), 0, 1, false, false},
		{"no effect", begin(no, well, nil), 0, 1, false, false},
		{"not begun", begin(nil, nil, broken), 0, 0, false, true},
		{"not healed", begin(yes, func(context.Context) error { return broken }, nil), 0, 0, true, true},
	} {
		r, said, err := roundOf(t, c.n, yes)
		if r.Rounds != c.rounds || r.Skipped != c.skipped || (err != nil) != c.fails || errors.Is(err, errStuck) != c.stuck {
			t.Errorf("%s: %+v, %v", c.name, r, err)
		}
		if c.name == "unavailable" && !strings.Contains(said, "not root") {
			t.Errorf("%q does not say why", said)
		}
	}
	var gone atomic.Bool
	_, _, err := roundOf(t, begin(yes, func(context.Context) error { gone.Store(true); return nil }, nil), func() bool { return !gone.Load() })
	if !errors.Is(err, errStuck) {
		t.Errorf("a cluster that takes nothing any more: %v", err)
	}
}

// A run that is interrupted waits for nothing more, and that is no finding.
func TestInterruptedWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		defer time.AfterFunc(time.Second, stop).Stop()
		load := &workload{}
		load.unacked.Store(1)
		began, r := time.Now(), &result{Found: map[string]int{}}
		err := round(ctx, r, &world{}, load, nemesis{name: "n"}, io.Discard)
		if time.Since(began) > time.Second || err == nil {
			t.Errorf("%v, after %v", err, time.Since(began))
		}
		if _ = r.stuck(ctx, err); r.Anomalies != 0 {
			t.Errorf("%+v", r)
		}
	})
}

// The records of a round are those that were acknowledged once its fault had begun, and some must be outstanding when it takes effect.
func TestWhatARoundCounts(t *testing.T) {
	var load atomic.Int64
	var atBegin, atEnd int64
	n := nemesis{name: "n", begin: func(*world) (*fault, error) {
		atBegin = load.Load()
		return &fault{"", yes, nothing}, nil
	}}
	_, said, err := roundOf(t, n, func() bool { load.Add(1); return true })
	var acked int64
	if _, scan := fmt.Sscanf(said[strings.LastIndex(said, ", ")+2:], "%d acknowledged", &acked); err != nil || scan != nil {
		t.Fatal(err, scan, said)
	}
	if atEnd = load.Load(); acked < ackedPerRound || acked > atEnd-atBegin {
		t.Errorf("%d of %d records since the fault count", acked, atEnd-atBegin)
	}
	synctest.Test(t, func(t *testing.T) {
		idle := &workload{}
		idle.unacked.Store(1)
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() {
			for range 20 * ackedPerRound / partitions {
				for p := range idle.acked {
					idle.acked[p].Add(1)
				}
				time.Sleep(time.Millisecond)
			}
		})
		r := &result{Nemeses: map[string]int{}}
		hit := func() bool { idle.unacked.Store(0); return true }
		n := nemesis{name: "n", begin: func(*world) (*fault, error) { return &fault{"", hit, nothing}, nil }}
		if err := round(t.Context(), r, &world{rng: rand.New(rand.NewPCG(1, 1))}, idle, n, io.Discard); err != nil || r.Rounds != 0 || r.Skipped != 1 {
			t.Errorf("nothing was outstanding: %+v, %v", r, err)
		}
	})
}

// A mistake is caught by anomalies of a life that was played, not by a life that could not be; and the same program without it must be clean.
func TestWhatCatchesAMistake(t *testing.T) {
	setup := errors.New("no port")
	gives := func(anomalies int, err error) player {
		return func(context.Context, config, io.Writer) (*result, error) {
			return &result{Anomalies: anomalies, Found: map[string]int{"unseen": anomalies}}, err
		}
	}
	for _, c := range []struct {
		name   string
		play   player
		caught bool
	}{
		{"anomaly", gives(1, nil), true}, {"stuck", gives(1, errStuck), true}, {"could not be played", gives(1, setup), false}, {"failed", gives(0, setup), false},
	} {
		if row, caught := try(t.Context(), config{}, "m", c.play); caught != c.caught {
			t.Errorf("%s: %s", c.name, row)
		}
	}
	if row, caught := try(t.Context(), config{}, "m", func(_ context.Context, c config, _ io.Writer) (*result, error) {
		return &result{Anomalies: int(c.seed / 3000)}, nil
	}); !caught {
		t.Errorf("only later: %s", row)
	}
	if control(t.Context(), config{}, gives(0, nil)) != nil || control(t.Context(), config{}, gives(1, nil)) == nil || !errors.Is(control(t.Context(), config{}, gives(0, setup)), setup) {
		t.Error("the control")
	}
}

// Every mistake that has faults of its own is one, and so are they.
func TestTempters(t *testing.T) {
	for m, names := range tempters {
		if !slices.Contains(planted.All, m) {
			t.Errorf("no mistake %q", m)
		}
		if _, err := choose(names); err != nil {
			t.Errorf("%s: %v", m, err)
		}
	}
}

// The windows that are widened are there in raft's source, each for a mistake of its own.
func TestWindows(t *testing.T) {
	dir := t.TempDir()
	if _, err := widened(t.Context(), "../..", dir); err != nil {
		t.Fatal(err)
	}
	for _, w := range windows {
		b, err := os.ReadFile(filepath.Join(dir, "raft", w.file))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(planted.All, w.mistake) || !strings.Contains(string(b), w.mistake) || widens(w.mistake) == "" {
			t.Errorf("%s is not in %s", w.mistake, w.file)
		}
		if _, err := parser.ParseFile(token.NewFileSet(), w.file, b, parser.SkipObjectResolution); err != nil {
			t.Error(err)
		}
	}
	absent := window{planted.NoFsync, "", "raft.go", "no such line", ""}
	if err := absent.open(filepath.Join(dir, "raft")); err == nil {
		t.Error("a window that raft does not have is taken for open")
	}
	if widens(planted.NoFsync) != "" {
		t.Error("a mistake without a window has one")
	}
}
