package main

import (
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// Ten seconds of it, or as many as a busy machine needs, leave figures of every quantity and every kind of load, and no error.
func TestShortSoak(t *testing.T) {
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	var r *result
	for length := 12 * time.Second; length < 5*time.Minute; length *= 3 {
		var err error
		if r, err = run(t.Context(), config{length: length, every: time.Minute, module: "../.."}, t.Output()); err != nil || len(r.Errors) > 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		if r.Acked > 0 && r.Topics > 0 && r.Connections > 0 && r.Rebalances > 0 && r.Samples >= 5 {
			break
		}
	}
	if r.Acked == 0 || r.Topics == 0 || r.Connections == 0 || r.Rebalances == 0 || r.Samples < 5 {
		t.Errorf("%+v", r)
	}
	for _, q := range quantities {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(r.PerHour)), func(k string) bool { return strings.HasSuffix(k, " "+q.name) }) {
			t.Errorf("no figure of %s in %v", q.name, r.PerHour)
		}
	}
}

func TestLine(t *testing.T) {
	slope, deviation, mean := line([]float64{0, 1, 2, 3}, []float64{1, 3, 5, 7})
	if slope != 2 || deviation != 0 || mean != 4 {
		t.Error(slope, deviation, mean)
	}
	slope, deviation, _ = line([]float64{0, 1, 2, 3, 4}, []float64{0, 1, 0, 1, 0}) // by hand: rest 1.2, divided by 3 and by 10
	if slope != 0 || math.Abs(deviation-0.2) > 1e-12 {
		t.Error(slope, deviation)
	}
}

// made is two hours of samples with noise.
func made(value func(h float64) float64, change func(i int, s *sample)) (out []sample) {
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 120 {
		at := time.Duration(i+1) * time.Minute
		s := sample{at: at, values: map[string]float64{"voter-1 rss": value(at.Hours()) + rng.NormFloat64()*2*(1<<20)}, terms: map[string]float64{"meta": 2}}
		if change != nil {
			change(i, &s)
		}
		out = append(out, s)
	}
	return out
}

// What grows is told from what is only restless or grew while it warmed up; an election counts unless something stalled.
func TestJudge(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name                          string
		samples                       []sample
		grows, elections, unexplained int
	}{
		{"restless", made(func(float64) float64 { return 200 * mib }, nil), 0, 0, 0},
		{"warms up", made(func(h float64) float64 { return 200*mib - 80*mib*math.Exp(-h*10) }, nil), 0, 0, 0},
		{"grows", made(func(h float64) float64 { return 200*mib + 8*mib*h }, nil), 1, 0, 0},
		{"too short to say", made(func(h float64) float64 { return 200*mib + 600*mib*h }, nil)[:14], 0, 0, 0},
		{"election", made(func(float64) float64 { return 0 }, func(i int, s *sample) {
			if i >= 100 {
				s.terms["meta"] = 3
			}
		}), 0, 1, 1},
		{"early election", made(func(float64) float64 { return 0 }, func(i int, s *sample) {
			if i >= 2 {
				s.terms["meta"] = 3
			}
		}), 0, 0, 0},
		{"disk", made(func(float64) float64 { return 0 }, func(i int, s *sample) {
			if i >= 100 {
				s.terms["meta"], s.slow = 3, 1
			}
		}), 0, 1, 0},
		{"disk, and back", made(func(float64) float64 { return 0 }, func(i int, s *sample) {
			if i >= 60 {
				s.terms["meta"], s.slow = 3, 1
			}
			if i >= 62 {
				s.terms["meta"] = 4
			}
			if i >= 64 {
				s.terms["meta"] = 5
			}
		}), 0, 3, 1},
		{"long after", made(func(float64) float64 { return 0 }, func(i int, s *sample) {
			if i >= 60 {
				s.terms["meta"], s.slow = 3, 1
			}
			if i >= 100 {
				s.terms["meta"] = 4
			}
		}), 0, 2, 1},
		{"processor", made(func(float64) float64 { return 0 }, func(i int, s *sample) {
			if i >= 100 {
				s.terms["meta"], s.stall = 3, time.Second
			}
		}), 0, 1, 0},
	} {
		r := &result{PerHour: map[string]float64{}}
		r.judge(c.samples)
		if len(r.Grows) != c.grows || r.Elections != c.elections || r.Unexplained != c.unexplained || r.clean() != (c.grows+c.unexplained == 0) {
			t.Errorf("%s: %+v", c.name, r)
		}
	}
}
