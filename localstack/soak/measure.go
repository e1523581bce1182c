package main

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/estran/estran/localstack"
)

// sample is what was measured at one time.
type sample struct {
	at     time.Duration
	values map[string]float64 // "voter-1 rss": what may grow
	terms  map[string]float64 // of each group, the highest
	stall  time.Duration      // the longest since the sample before, of this process
	slow   float64            // writes so far that took longer than an election's timers allow
}

// what is measured of each voter, in the order in which it is printed, and how much of it an hour may add: bytes, or a part of the mean.
var quantities = []struct {
	name  string
	bytes float64
	part  float64
}{{"rss", 1 << 20, 0}, {"heap", 1 << 20, 0}, {"goroutines", 0, 0.05}, {"descriptors", 0, 0.05}, {"files", 0, 0.05}, {"series", 0, 0.05}, {"objects", 0, 0.05}}

// stallMost is what a disk or a processor may take before followers may take their leader for dead.
const stallMost = 500 * time.Millisecond

func (s sample) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%6.1f min", s.at.Minutes())
	last := ""
	for _, k := range slices.Sorted(maps.Keys(s.values)) {
		who, what, _ := strings.Cut(k, " ")
		if who != last {
			last = who
			fmt.Fprintf(&b, "; %s", who)
		}
		if v := s.values[k]; what == "rss" || what == "heap" {
			fmt.Fprintf(&b, " %s %.1f MiB", what, v/(1<<20))
		} else {
			fmt.Fprintf(&b, " %s %.0f", what, v)
		}
	}
	sum := 0.0
	for _, t := range s.terms {
		sum += t
	}
	fmt.Fprintf(&b, "; terms %.0f, slow writes %.0f, longest stall %v", sum, s.slow, s.stall.Round(time.Millisecond))
	return b.String()
}

// measure asks every voter and looks at what lies on the disks.
func measure(c *localstack.Cluster, dir string) (s sample, err error) {
	s = sample{values: map[string]float64{}, terms: map[string]float64{}}
	for i, n := range c.Nodes {
		name := fmt.Sprint("voter-", i+1)
		if !n.Alive() {
			return s, fmt.Errorf("%s has ended:\n%s", name, n.Tail())
		}
		if err := s.scrape(name, n); err != nil {
			return s, fmt.Errorf("%s: %w", name, err)
		}
		if s.values[name+" files"], err = files(filepath.Join(dir, name)); err != nil {
			return s, err
		}
		if s.values[name+" rss"], err = rss(n.PID); err != nil {
			return s, err
		}
	}
	s.values["store objects"], err = files(c.Objects)
	return s, err
}

func (s *sample) scrape(name string, n *localstack.Node) error {
	resp, err := http.Get("http://" + n.HTTP + "/metrics")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "#") {
			continue
		}
		s.values[name+" series"]++
		at := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			return err
		}
		switch key, label, _ := strings.Cut(line[:at], "{"); {
		case key == "go_goroutines":
			s.values[name+" goroutines"] = v
		case key == "process_open_fds":
			s.values[name+" descriptors"] = v
		case key == "go_memstats_heap_inuse_bytes":
			s.values[name+" heap"] = v
		case key == "estran_raft_term":
			s.terms[label] = max(s.terms[label], v)
		case key == "estran_raft_store_logs_seconds_count":
			s.slow += v
		case key == "estran_raft_store_logs_seconds_bucket" && strings.Contains(label, fmt.Sprintf(`le="%v"`, stallMost.Seconds())):
			s.slow -= v
		}
	}
	return lines.Err()
}

func files(dir string) (n float64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil // it went meanwhile
		}
		if err == nil && !d.IsDir() {
			n++
		}
		return err
	})
	return n, err
}

// rss is a process's resident memory, 0 where the system does not tell.
func rss(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if os.IsNotExist(err) {
		return 0, nil
	}
	var size, pages float64
	if err == nil {
		_, err = fmt.Sscan(string(b), &size, &pages)
	}
	return pages * float64(os.Getpagesize()), err
}

// watchStalls looks how long this process, which does little, was kept from running; a call returns the longest time since the one before.
func watchStalls(ctx context.Context) (longest func() time.Duration) {
	const beat = 20 * time.Millisecond
	asked, told := make(chan struct{}), make(chan time.Duration)
	go func() { // ends with ctx
		t := time.NewTicker(beat)
		defer t.Stop()
		var worst time.Duration
		for last := time.Now(); ; {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
				worst, last = max(worst, time.Since(last)-beat), time.Now()
			case <-asked:
				told <- worst
				worst = 0
			}
		}
	}()
	return func() time.Duration {
		select {
		case asked <- struct{}{}:
			return <-told
		case <-ctx.Done():
			return 0
		}
	}
}

// warmUp is the part of a run that is not judged, an hour at most. After less than leastWarmUp what fills up would pass for what grows.
func warmUp(length time.Duration) time.Duration { return min(length/3, time.Hour) }

const leastWarmUp = 5 * time.Minute

// settled is when leaderships are where they are to be: elections count from then on.
const settled = 3 * time.Minute

// judge says what grows, and which elections nothing explains.
func (r *result) judge(all []sample) {
	if len(all) == 0 {
		r.Errors = append(r.Errors, "no sample")
		return
	}
	warm := warmUp(all[len(all)-1].at)
	i := slices.IndexFunc(all, func(s sample) bool { return s.at >= warm })
	r.elections(all, slices.IndexFunc(all, func(s sample) bool { return s.at >= min(warm, settled) }))
	all = all[i:]
	r.Samples, r.Judged = len(all), warm >= leastWarmUp
	for key := range all[0].values {
		var x, y []float64
		for _, s := range all {
			x, y = append(x, s.at.Hours()), append(y, s.values[key])
		}
		slope, deviation, mean := line(x, y)
		r.PerHour[key] = math.Round(slope*100) / 100
		for _, q := range quantities {
			if r.Judged && strings.HasSuffix(key, " "+q.name) && slope-3*deviation > q.bytes+q.part*mean {
				r.Grows = append(r.Grows, fmt.Sprintf("%s: %.2f an hour (± %.2f), from %.0f to %.0f", key, slope, deviation, y[0], y[len(y)-1]))
			}
		}
	}
	slices.Sort(r.Grows)
}

// returnTime is how long after a stall a group may be handed back to who should lead it: raftmeta's balance waits for 40 seconds at most, and a sample is taken once a minute.
const returnTime = 2 * time.Minute

// elections counts those behind sample first, and of them those that nothing explains: neither a stall nor, once for each that one does explain, the return of the leadership afterwards.
func (r *result) elections(all []sample, first int) {
	owed, since := map[string]int{}, time.Duration(0)
	for i := 1; i < len(all); i++ {
		s, was := all[i], all[i-1]
		stalled := s.stall >= stallMost || s.slow > was.slow
		if stalled {
			since = s.at
		} else if s.at-since > returnTime {
			clear(owed)
		}
		for g, term := range s.terms {
			n, explained := int(term-was.terms[g]), 0
			if stalled {
				owed[g] += n
				explained = n
			} else {
				explained = min(n, owed[g])
				owed[g] -= explained
			}
			if i > first {
				r.Elections += n
				r.Unexplained += n - explained
			}
		}
	}
}

// line fits a straight line by least squares: its slope, the slope's standard deviation, and the mean of y.
func line(x, y []float64) (slope, deviation, mean float64) {
	n, sx, sy := float64(len(x)), 0.0, 0.0
	for i := range x {
		sx, sy = sx+x[i], sy+y[i]
	}
	mx, mean := sx/n, sy/n
	var xx, xy float64
	for i := range x {
		xx += (x[i] - mx) * (x[i] - mx)
		xy += (x[i] - mx) * (y[i] - mean)
	}
	if n < 3 || xx == 0 {
		return 0, math.Inf(1), mean
	}
	slope = xy / xx
	rest := 0.0
	for i := range x {
		e := y[i] - mean - slope*(x[i]-mx)
		rest += e * e
	}
	return slope, math.Sqrt(rest / (n - 2) / xx), mean
}
