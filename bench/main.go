// Command bench compares Estran with Apache Kafka, as shipped and with an fsync before each acknowledgement, on this machine: both run side by side, the same clients send the same
// records to one after the other, round after round, and each run is checked: every record once, in order, unharmed. It also measures what the machine can do at most. Everything
// is printed, and written to docs/BENCHMARKS.md.
//
// It runs from the root of the module. What is measured is a table, works.go; a line of key=value pairs comes out of each run, and the report is made of these lines alone.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

type options struct {
	nodes        []int
	rounds       int
	mb           int64
	warm, during time.Duration
	retention    int64
	failovers    int
	partitions   []int
	topics       int
	works        []string
	systems      []string
	limit        time.Duration
	program      string
	out, doc     string
	add, render  bool
}

func parseOptions(args []string) (o options, err error) {
	o.nodes, o.partitions, o.systems = []int{1, 3}, []int{10, 1000, 10_000, 50_000}, []string{estran, kafka, kafkaFsync}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	list := func(to *[]int) func(string) error {
		return func(s string) error {
			*to = nil
			for _, x := range strings.Split(s, ",") {
				n, err := strconv.Atoi(x)
				if err != nil || n < 1 {
					return fmt.Errorf("%q is no number above 0", x)
				}
				*to = append(*to, n)
			}
			return nil
		}
	}
	fs.Func("nodes", "sizes of clusters, 1 or 3 (default 1,3)", list(&o.nodes))
	fs.IntVar(&o.rounds, "rounds", 3, "how often each system does each work, in turn")
	fs.Int64Var(&o.mb, "mb", 3000, "megabytes (10^6) of a run in a closed loop")
	fs.DurationVar(&o.warm, "warm", 210*time.Second, "load on Kafka before it is measured")
	fs.DurationVar(&o.during, "during", 15*time.Second, "of a run in an open loop, of one record at a time, of being idle; a fifteenth of it of each limit of the machine")
	fs.Int64Var(&o.retention, "retention", 2<<30, "tiering.local_retention_bytes of Estran; twice as much is written before it is measured")
	fs.IntVar(&o.failovers, "failovers", 100, "how often a leader goes; a tenth of it for Kafka")
	fs.Func("partitions", "partitions of the rows partitions-N (default 10,1000,10000,50000)", list(&o.partitions))
	fs.IntVar(&o.topics, "topics", 1000, "topics made one by one; four times as many at once")
	names := func(to *[]string) func(string) error {
		return func(s string) error { *to = strings.Split(s, ","); return nil }
	}
	fs.Func("works", "names of rows (default all)", names(&o.works))
	fs.Func("systems", "estran,kafka,kafka-fsync (default all)", names(&o.systems))
	fs.DurationVar(&o.limit, "limit", 15*time.Minute, "of a run; one that takes longer has failed (failover: no limit)")
	fs.StringVar(&o.program, "program", "./estran", "the estran program")
	fs.StringVar(&o.out, "out", "bench/out", "directory of data and raw lines, on the disk that is measured, and of the logs of nodes in a run that failed")
	fs.StringVar(&o.doc, "doc", "docs/BENCHMARKS.md", "the report; \"\" = none")
	fs.BoolVar(&o.add, "add", false, "keep the lines of earlier runs in raw.txt and in the report")
	fs.BoolVar(&o.render, "render", false, "only write the report anew from raw.txt")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	for _, n := range o.nodes {
		if n != 1 && n != 3 {
			return o, fmt.Errorf("--nodes: %d is neither 1 nor 3", n)
		}
	}
	for _, s := range o.systems {
		if !slices.Contains([]string{estran, kafka, kafkaFsync}, s) {
			return o, fmt.Errorf("--systems: there is no %q", s)
		}
	}
	if fs.NArg() > 0 || o.rounds < 1 || o.mb < 1 || o.during <= 0 || o.warm < 0 || o.retention < 0 || o.failovers < 1 || o.topics < 1 {
		return o, fmt.Errorf("what is left over is %q; --rounds, --mb, --during, --failovers and --topics are above 0", fs.Args())
	}
	_, err = o.chosen()
	return o, err
}

func main() {
	if slow := os.Getenv(doubleEnv); slow != "" {
		exit(runDouble(slow == "true"))
	}
	o, err := parseOptions(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		err = bench(ctx, o, os.Stdout)
		stop()
	}
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// comparison is a run of the bench.
type comparison struct {
	o      options
	works  []work
	jars   string
	disk   string // its counters
	store  string // a directory on tmpfs
	lines  []line
	print  func(string) error // prints a line and keeps it
	failed int
	mu     sync.Mutex
	pools  map[[2]int]pool
	made   int // directories
}

func (b *comparison) pool(size, letters int) pool {
	b.mu.Lock()
	defer b.mu.Unlock()
	k := [2]int{size, letters}
	if _, ok := b.pools[k]; !ok {
		if len(b.pools) > 3 {
			clear(b.pools)
		}
		b.pools[k] = newPool(size, letters)
	}
	return b.pools[k]
}

// bench measures what was asked for. An error says that something was wrong or did not run; the rest was measured all the same.
func bench(ctx context.Context, o options, stdout interface{ WriteString(string) (int, error) }) (err error) {
	b := &comparison{o: o, pools: map[[2]int]pool{}}
	if b.works, err = o.chosen(); err != nil {
		return err
	}
	raw, err := b.prepareOut()
	if err != nil {
		return err
	}
	defer raw.Close()
	if o.render {
		return writeReport(o.doc, o, b.lines)
	}
	if b.store, err = os.MkdirTemp(tmpfs(), "estran-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.store)) }()
	b.disk = diskStat(o.out)
	b.print = func(s string) error {
		_, err1 := stdout.WriteString(s + "\n")
		_, err2 := raw.WriteString(s + "\n")
		return errors.Join(err1, err2)
	}
	if b.needsJava() {
		if b.jars, err = fetchKafka(ctx); err != nil {
			return err
		}
	}
	facts, err := b.facts(ctx)
	if err != nil {
		return err
	}
	measured, err := limits(ctx, o.out, b.store, max(o.during/15, 20*time.Millisecond))
	if err != nil {
		return err
	}
	for _, l := range append([]line{facts}, measured...) {
		if err := b.emit(l); err != nil {
			return err
		}
	}
	for _, n := range o.nodes {
		for _, part := range []func(context.Context, int) error{b.sideBySide, b.alone} {
			err := part(ctx, n)
			if ctx.Err() != nil {
				return err
			}
			if err != nil { // the clusters did not start: the other part may
				b.failed++
				var l line
				l.set("nodes", n)
				l.put("error", b.why(err))
				if err := b.emit(l); err != nil {
					return err
				}
			}
		}
	}
	if b.failed > 0 {
		return fmt.Errorf("%d runs failed", b.failed)
	}
	return ctx.Err()
}

// tmpfs is where the store lies: memory, where there is such a file system.
func tmpfs() string {
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		return "/dev/shm"
	}
	return ""
}

// prepareOut empties the directory and opens the file of raw lines.
func (b *comparison) prepareOut() (*os.File, error) {
	var err error
	if b.o.out, err = filepath.Abs(b.o.out); err != nil {
		return nil, err
	}
	path := filepath.Join(b.o.out, "raw.txt")
	var earlier []byte
	if b.o.add || b.o.render {
		if earlier, err = os.ReadFile(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if b.lines, err = parseLines(string(earlier)); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(b.o.out, "data")), os.MkdirAll(b.o.out, 0o755), os.WriteFile(path, earlier, 0o600)); err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0o600)
}

func (b *comparison) needsJava() bool {
	return slices.ContainsFunc(b.o.systems, func(s string) bool { return s != estran }) || slices.ContainsFunc(b.works, func(w work) bool { return w.name == "java" })
}

func fetchKafka(ctx context.Context) (jars string, err error) {
	out, err := exec.CommandContext(ctx, "bash", "bench/kafka", "fetch").Output()
	if err != nil {
		var e *exec.ExitError
		if errors.As(err, &e) {
			err = fmt.Errorf("%w: %s", err, e.Stderr)
		}
		return "", fmt.Errorf("fetching Kafka: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// emit prints a line and writes the report with it.
func (b *comparison) emit(l line) error {
	b.lines = append(b.lines, l)
	if err := b.print(l.String()); err != nil || b.o.doc == "" {
		return err
	}
	return writeReport(b.o.doc, b.o, b.lines)
}

// setup completes what a work asks of its cluster.
func (b *comparison) setup(s setup) setup {
	s.jars = b.jars
	s.env = append([]string{fmt.Sprint("ESTRAN_TIERING_LOCAL_RETENTION_BYTES=", b.o.retention), "ESTRAN_TIERING_DELETE_GRACE=10s"}, s.env...)
	s.tmp = func() (p paths, err error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.made++
		p = paths{filepath.Join(b.o.out, "data", fmt.Sprint(b.made)), filepath.Join(b.store, fmt.Sprint(b.made))}
		return p, errors.Join(os.MkdirAll(p.logs, 0o755), os.MkdirAll(p.store, 0o755))
	}
	return s
}

// why is an error as a line may have it: short, and without this machine's directories. The nodes' logs have more.
func (b *comparison) why(err error) string {
	return fmt.Sprintf("%.500s", strings.ReplaceAll(strings.ReplaceAll(err.Error(), b.o.out, "out"), b.store, "store"))
}

// sideBySide runs the works that share clusters: all systems at once, one measured after the other.
func (b *comparison) sideBySide(ctx context.Context, nodes int) (err error) {
	works := slices.DeleteFunc(slices.Clone(b.works), func(w work) bool { return w.own })
	if len(works) == 0 {
		return nil
	}
	var all []*cluster
	defer func() {
		for _, c := range all {
			err = errors.Join(err, c.close())
		}
	}()
	for _, s := range b.o.systems {
		c, _, err := startCluster(ctx, s, nodes, b.o.program, b.setup(setup{}))
		all = append(all, c)
		if err != nil {
			return fmt.Errorf("starting %s: %w", s, errors.Join(err, c.keepLogs(b.o.out)))
		}
	}
	if err := b.prepare(ctx, all...); err != nil {
		return err
	}
	for _, w := range works {
		for round := range b.o.rounds {
			for _, c := range all {
				if !w.fits(c.system, nodes) {
					continue
				}
				if err := b.one(ctx, &run{b: b, c: c, w: w}, nodes, round); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// alone runs the works for which each system has a new cluster and the machine for itself.
func (b *comparison) alone(ctx context.Context, nodes int) error {
	for _, w := range b.works {
		for round := range b.o.rounds {
			for _, s := range b.o.systems {
				if !w.own || !w.fits(s, nodes) {
					continue
				}
				if err := b.oneAlone(ctx, w, s, nodes, round); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (b *comparison) oneAlone(ctx context.Context, w work, system string, nodes, round int) error {
	c, took, err := startCluster(ctx, system, nodes, b.o.program, b.setup(w.setup))
	if err == nil && w.ready {
		err = b.prepare(ctx, c)
	}
	if err != nil {
		w.run = func(context.Context, *run) error { return fmt.Errorf("the cluster: %w", err) }
	}
	return errors.Join(b.one(ctx, &run{b: b, c: c, w: w, start: took}, nodes, round), c.close())
}

// one does a run and emits its line. That the run fails is in the line, and is no error of one.
func (b *comparison) one(ctx context.Context, r *run, nodes, round int) error {
	r.l, r.topic = &line{}, fmt.Sprintf("%s-%d", r.w.name, round)
	for _, f := range []struct {
		key string
		v   any
	}{{"work", r.w.name}, {"system", r.c.system}, {"nodes", nodes}, {"round", round + 1}} {
		r.l.set(f.key, f.v)
	}
	limited, cancel := ctx, func() {}
	if r.w.name != "failover" {
		limited, cancel = context.WithTimeout(ctx, b.o.limit)
	}
	err := r.w.run(limited, r)
	cancel()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		b.failed++
		r.l.put("error", b.why(errors.Join(err, r.c.keepLogs(b.o.out))))
	}
	return b.emit(*r.l)
}

// prepare makes clusters as they are after a while: Estran has written its local retention once and more, so that its log files are recycled ones, and Kafka's JVMs are warm.
func (b *comparison) prepare(ctx context.Context, all ...*cluster) error {
	var wg sync.WaitGroup
	errs := make([]error, len(all))
	for i, c := range all {
		r := &run{b: b, c: c}
		if c.system == estran {
			j := r.job("through", load{})
			j.total = 2*b.o.retention/int64(j.size) + 1
			_, _, err := j.fill(ctx)
			if err := errors.Join(err, j.remove(ctx)); err != nil {
				return fmt.Errorf("writing local retention through: %w", err)
			}
			continue
		}
		wg.Go(func() { errs[i] = r.warm(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// warm produces and consumes; each topic is removed soon.
func (r *run) warm(ctx context.Context) error {
	for began, n := time.Now(), 0; time.Since(began) < r.b.o.warm && ctx.Err() == nil; n++ {
		j := r.job(fmt.Sprint("warm-", n), load{rate: 60})
		j.during = max(time.Second, min(10*time.Second, r.b.o.warm-time.Since(began)))
		j.total = int64(j.rate * 1e6 * j.during.Seconds() / float64(j.size))
		from, s, err := j.fill(ctx)
		if err == nil {
			err = j.verify(ctx, from, s.records, 64)
		}
		if err := errors.Join(err, j.remove(ctx)); err != nil {
			return fmt.Errorf("warming %s: %w", r.c.system, err)
		}
	}
	return ctx.Err()
}
