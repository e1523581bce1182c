package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/estran/estran/localstack"
)

const (
	demoTopic      = "demo" // and the group's name
	demoPartitions = 6
	demoUnacked    = 20_000           // records that may wait for their acknowledgement
	demoPatience   = 30 * time.Second // for what was sent to be acknowledged and consumed, once the load has ended
	demoStart      = time.Minute      // for voters to serve
)

var demoInterrupted = &fault{Code: "E_DEMO_INTERRUPTED", What: "the demo was interrupted before it had checked every record", Fix: "interrupt it once, when it runs, and let it finish"}

// demo is a run of `estran demo`.
type demo struct {
	s         streams
	nodes     int
	rate      int64
	rateText  string
	base      string
	keep      bool
	killEvery time.Duration
	duration  time.Duration

	all   context.Context // ends with everything; its cause is the fault, if there is one
	fail  context.CancelCauseFunc
	load  context.Context // ends when nothing more is sent
	owned sync.WaitGroup  // what runs until all ends
	dir   string
	voter *localstack.Cluster
	kafka []string // of the voters; a voter itself belongs to the one who minds it
	http  []string
	check *demoCheck
	print *demoPrinter
	kills atomic.Int32
}

func demoCommand(s streams) *cobra.Command {
	d := &demo{s: s}
	c := &cobra.Command{Use: "demo", Short: "Run a whole cluster on this machine under load, and check every record", Args: usage(cobra.NoArgs),
		Long: "Run voters as processes on loopback, a producer and a consumer group. Every acknowledged record must be consumed exactly once, in order and\n" +
			"unchanged; if one is not, the exit code is 1. Ctrl-C ends the load and checks the rest, a second one stops at once. What was written is deleted at\n" +
			"the end, unless something failed. ESTRAN_* and KAFKA_* variables reach the voters, except addresses, directories, the store and the log's format, which the demo chooses.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := d.validate(); err != nil {
				return err
			}
			return d.run()
		}}
	c.Flags().IntVar(&d.nodes, "nodes", 3, "number of voters: 1, 3 or 5")
	c.Flags().StringVar(&d.rateText, "rate", "2MB/s", "how much to produce")
	c.Flags().StringVar(&d.base, "dir", os.TempDir(), "where the demo makes its directory")
	c.Flags().BoolVar(&d.keep, "keep", false, "keep the directory at the end; after a failure it is always kept")
	c.Flags().DurationVar(&d.killEvery, "kill-every", 0, "kill -9 a random voter this often and start it again; 0 = never")
	c.Flags().DurationVar(&d.duration, "duration", 0, "end after this time; 0 = at Ctrl-C")
	return c
}

func (d *demo) validate() error {
	var errs []error
	bad := func(fix, format string, args ...any) {
		errs = append(errs, &fault{Code: "E_USAGE", What: fmt.Sprintf(format, args...), Fix: fix, Exit: exitUsage})
	}
	if d.nodes != 1 && d.nodes != 3 && d.nodes != 5 {
		bad("--nodes 3", "--nodes %d is not 1, 3 or 5", d.nodes)
	}
	var err error
	if d.rate, err = parseSize(strings.TrimSuffix(d.rateText, "/s")); err != nil || d.rate < demoSize || d.rate > 10<<30 {
		bad("--rate 2MB/s", "--rate %q is not between 1kB/s and 10GiB/s", d.rateText)
	}
	if d.killEvery != 0 && d.killEvery < time.Second {
		bad("--kill-every 10s", "--kill-every %s is below 1s", d.killEvery)
	}
	if d.duration < 0 {
		bad("--duration 1m", "--duration %s is below 0", d.duration)
	}
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		for _, own := range []string{"ESTRAN_NODE_", "ESTRAN_LISTENERS_", "ESTRAN_QUORUM_VOTERS", "ESTRAN_STORAGE_", "ESTRAN_LOG_"} {
			if strings.HasPrefix(name, own) {
				bad("unset "+name, "%s is set, but the demo chooses that itself", name)
			}
		}
	}
	return errors.Join(errs...)
}

// run starts everything, waits for the end and takes everything away again, whatever happens.
func (d *demo) run() (err error) {
	// A signal ends the load, a second one everything. Both contexts are the demo's own: the command's ends with the first.
	d.all, d.fail = context.WithCancelCause(context.Background())
	load, endLoad := context.WithCancel(d.all)
	d.load = load
	sig := make(chan os.Signal, 4)
	signal.Notify(sig, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	d.owned.Go(func() {
		for _, end := range []func(){endLoad, func() { d.fail(demoInterrupted) }} {
			select {
			case <-sig:
				end()
			case <-d.all.Done():
			}
		}
	})
	defer func() {
		d.fail(nil) // if nothing failed
		d.owned.Wait()
		signal.Stop(sig)
		endLoad()
	}()

	if d.dir, err = os.MkdirTemp(d.base, "estran-demo-"); err != nil {
		return &fault{Code: "E_DEMO_DIR", What: fmt.Sprintf("cannot make a directory in %s (--dir): %v", d.base, cause(err)), Fix: "--dir DIR, one that exists and is writable", Exit: exitUsage, Err: err}
	}
	defer func() {
		if failed := err != nil && !errors.Is(err, demoInterrupted); failed {
			fmt.Fprintf(d.s.err, "files kept: %s\n", d.dir) // what they tell is the only evidence
		} else if !d.keep {
			err = errors.Join(err, os.RemoveAll(d.dir))
		}
	}()
	program, err := os.Executable()
	if err != nil {
		return err
	}
	d.voter = localstack.NewCluster(program, d.dir, d.nodes, demoEnv()...)
	began := time.Now()
	ctx, cancel := context.WithTimeout(d.load, demoStart)
	defer cancel()
	if err := d.voter.Start(ctx); err != nil {
		if d.load.Err() != nil {
			return demoInterrupted
		}
		return voterFault("the voters did not start", err)
	}
	defer func() { err = errors.Join(err, d.voter.Close()) }()
	for _, n := range d.voter.Nodes {
		d.kafka, d.http = append(d.kafka, n.Kafka), append(d.http, n.HTTP)
	}
	return d.underLoad(time.Since(began))
}

// demoEnv is what makes tiering and groups quick enough to be watched; the user's own settings win.
func demoEnv() (out []string) {
	for _, kv := range []string{"ESTRAN_TIERING_SEAL_AGE=5s", "ESTRAN_TIERING_SEAL_BYTES=16MiB", "ESTRAN_TIERING_LOCAL_RETENTION_BYTES=64MiB", "ESTRAN_TIERING_DELETE_GRACE=1m",
		"ESTRAN_HOT_MAX_BYTES=1GiB", "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS=0"} {
		name, _, _ := strings.Cut(kv, "=")
		if _, set := os.LookupEnv(name); !set {
			out = append(out, kv)
		}
	}
	return out
}

// voterFault explains a voter's end by the last lines that it wrote.
func voterFault(what string, err error) error {
	first, rest, _ := strings.Cut(err.Error(), "\n")
	lines := strings.Split(strings.TrimSpace(rest), "\n")
	return &fault{Code: "E_DEMO_VOTER", What: what + ": " + first, Excerpt: "  " + strings.Join(lines[max(0, len(lines)-6):], "\n  "), Err: err,
		Fix: "see above; all logs of the voters are kept"}
}

func (d *demo) client(opts ...kgo.Opt) (*kgo.Client, error) {
	return kgo.NewClient(append([]kgo.Opt{kgo.WithContext(d.all), kgo.SeedBrokers(d.kafka...), kgo.MetadataMinAge(100 * time.Millisecond), kgo.DialTimeout(2 * time.Second),
		kgo.AlwaysRetryEOF(), // a voter that is killed ends connections that have had no answer yet
		kgo.RetryBackoffFn(func(int) time.Duration { return 50 * time.Millisecond }), kgo.UnknownTopicRetries(-1)}, opts...)...)
}

// underLoad makes the topic, runs the load and returns the fault that was found.
func (d *demo) underLoad(took time.Duration) error {
	producer, err := d.client(kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.ProducerLinger(0), kgo.MaxBufferedRecords(2*demoUnacked), kgo.StopProducerOnDataLossDetected())
	if err != nil {
		return err
	}
	defer producer.Close()
	keep := fmt.Sprint(max(64<<20, 120*d.rate/demoPartitions)) // a demo may run for days
	ctx, cancel := context.WithTimeout(d.load, demoPatience)
	defer cancel()
	r, err := kadm.NewClient(producer).CreateTopic(ctx, demoPartitions, int16(d.nodes), map[string]*string{"retention.bytes": &keep}, demoTopic)
	if d.load.Err() != nil {
		return demoInterrupted
	}
	if err = errors.Join(err, r.Err); err != nil {
		return &fault{Code: "E_DEMO_TOPIC", What: fmt.Sprintf("cannot create topic %s: %v", demoTopic, err), Fix: "start it again; all logs of the voters are kept", Err: err}
	}
	consumer, err := d.client(kgo.ConsumerGroup(demoTopic), kgo.ConsumeTopics(demoTopic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.FetchMaxWait(500*time.Millisecond))
	if err != nil {
		return err
	}
	defer consumer.Close()
	defer func() { // before the clients are closed: they would take leave of voters that may be gone
		d.fail(nil)
		d.owned.Wait()
	}()

	d.check, d.print = newDemoCheck(rand.Uint64()), newDemoPrinter(d.s.out)
	d.banner(took)
	if d.duration > 0 {
		var cancel context.CancelFunc
		d.load, cancel = context.WithTimeout(d.load, d.duration)
		defer cancel()
	}
	acked := make(chan struct{})
	d.owned.Go(func() { defer close(acked); d.produce(producer) })
	d.owned.Go(func() { d.consume(consumer) })
	d.supervise()
	began := time.Now()
	err = d.watch(began, acked)
	d.fail(err)
	d.owned.Wait()
	d.summary(time.Since(began), err)
	return err
}

// produce sends at the rate until the load ends, and returns when all is acknowledged.
func (d *demo) produce(cl *kgo.Client) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	credit, last := 0.0, time.Now()
	for p := int32(0); ; {
		select {
		case <-d.load.Done():
			_ = cl.Flush(d.all) // what fails is told to the callbacks
			return
		case now := <-tick.C:
			credit = min(credit+float64(d.rate)*now.Sub(last).Seconds(), float64(d.rate)) // what a failover has held up is caught up on, at most a second's worth
			last = now
		}
		for ; credit >= demoSize && cl.BufferedProduceRecords() < demoUnacked; credit -= demoSize {
			r := &kgo.Record{Topic: demoTopic, Partition: p, Value: d.check.next(p)}
			sent := time.Now()
			cl.Produce(d.all, r, func(r *kgo.Record, err error) {
				if err != nil {
					d.fail(&fault{Code: "E_DEMO_PRODUCE", What: fmt.Sprintf("a record of partition %d was refused: %v", r.Partition, err), Fix: demoReport, Err: err})
					return
				}
				d.check.acknowledged(r.Partition, time.Since(sent))
			})
			p = (p + 1) % demoPartitions
		}
	}
}

// consume checks what a member of the group gets until all ends.
func (d *demo) consume(cl *kgo.Client) {
	for d.all.Err() == nil {
		fetches := cl.PollRecords(d.all, 10_000)
		for _, e := range fetches.Errors() {
			if lost, ok := errors.AsType[*kgo.ErrDataLoss](e.Err); ok {
				d.fail(&fault{Code: "E_DEMO_LOST", What: lost.Error(), Fix: demoReport, Err: lost})
			}
			d.check.trouble(e.Err)
		}
		for it := fetches.RecordIter(); !it.Done(); {
			r := it.Next()
			if err := d.check.consumed(r.Partition, r.Offset, r.Value); err != nil {
				d.fail(err)
				return
			}
		}
	}
}

// supervise keeps an eye on every voter; with --kill-every one after the other is killed and started again.
func (d *demo) supervise() {
	victims, back := make([]chan struct{}, d.nodes), make(chan struct{})
	for i, n := range d.voter.Nodes {
		victims[i] = make(chan struct{})
		d.owned.Go(func() { d.mind(i+1, n, victims[i], back) })
	}
	if d.killEvery == 0 {
		return
	}
	d.owned.Go(func() {
		tick := time.NewTicker(d.killEvery)
		defer tick.Stop()
		for {
			select {
			case <-d.load.Done():
				return
			case <-tick.C:
			}
			for _, ch := range []chan struct{}{victims[rand.IntN(d.nodes)], back} { // one at a time: a majority stays
				select {
				case ch <- struct{}{}:
				case <-d.all.Done():
					return
				}
			}
		}
	})
}

// mind owns a voter's process until all ends.
func (d *demo) mind(id int, n *localstack.Node, kill, back <-chan struct{}) {
	for {
		select {
		case <-d.all.Done():
			return
		case <-n.Done():
			d.fail(voterFault(fmt.Sprintf("voter %d ended by itself", id), fmt.Errorf("process %d is gone\n%s", n.PID, n.Tail())))
			return
		case <-kill:
		}
		led := leads(d.leaders(), id)
		if err := n.Kill(); err != nil {
			d.fail(err)
			return
		}
		d.kills.Add(1)
		d.print.event("kill -9  voter %d (pid %d), which led %s", id, n.PID, led)
		down := time.Now()
		select {
		case <-time.After(min(d.killEvery/2, 3*time.Second)): // so long the others do without it
		case <-d.load.Done():
		}
		ctx, cancel := context.WithTimeout(d.all, demoStart)
		err := n.Start(ctx)
		cancel()
		if err != nil {
			d.fail(voterFault(fmt.Sprintf("voter %d did not start again", id), err))
			return
		}
		d.print.event("back     voter %d (pid %d) after %s", id, n.PID, time.Since(down).Round(10*time.Millisecond))
		select {
		case <-back:
		case <-d.all.Done():
			return
		}
	}
}

// watch prints a line every two seconds until all that was sent has been consumed after the load's end, or something fails.
func (d *demo) watch(began time.Time, acked <-chan struct{}) error {
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	var patience <-chan time.Time
	ended := d.load.Done()
	for {
		select {
		case <-d.all.Done():
			return context.Cause(d.all)
		case <-tick.C:
			d.line(began)
		case <-ended:
			ended, patience = nil, time.After(demoPatience)
		case <-acked:
			acked = nil
		case <-d.check.progress:
		case <-patience:
			return d.check.missing()
		}
		if ended == nil && acked == nil && d.check.done() {
			return nil
		}
	}
}

// leaders asks the voters who leads what; nil if none answers.
func (d *demo) leaders() map[int32][]string {
	ctx, cancel := context.WithTimeout(d.all, 2*time.Second)
	defer cancel()
	for _, i := range rand.Perm(d.nodes) {
		ask := nodeClient{address: d.http[i]}
		st, err := ask.status(ctx)
		if err != nil {
			continue
		}
		out := map[int32][]string{}
		for _, g := range st.Groups {
			out[g.Leader] = append(out[g.Leader], g.Name)
		}
		return out
	}
	return nil
}

// leads names what a voter leads, as leaders has told.
func leads(all map[int32][]string, id int) string {
	groups := all[int32(id)]
	switch {
	case all == nil:
		return "?"
	case len(groups) == 0:
		return "nothing"
	}
	return strings.Join(groups, ",")
}

// objects counts the sealed segments in the store.
func (d *demo) objects() (n int, size int64) {
	_ = filepath.WalkDir(d.voter.Objects, func(path string, e fs.DirEntry, err error) error { // what is deleted meanwhile is not counted
		if err == nil && strings.HasSuffix(path, ".seg") {
			if fi, err := e.Info(); err == nil {
				n, size = n+1, size+fi.Size()
			}
		}
		return nil
	})
	return n, size
}

func (d *demo) banner(took time.Duration) {
	kept := "deleted at the end, unless something fails; --keep keeps it"
	if d.keep {
		kept = "kept at the end"
	}
	w := d.s.out
	fmt.Fprintf(w, "estran demo %s  %d voters ready in %d ms\n", buildVersion().Version, d.nodes, took.Milliseconds())
	for i, n := range d.voter.Nodes {
		fmt.Fprintf(w, "  voter %d   kafka %s   metrics http://%s/metrics   pid %d\n", i+1, n.Kafka, n.HTTP, n.PID)
	}
	n := d.voter.Nodes[0]
	fmt.Fprintf(w, "  topic     %s, %d partitions, %d replicas; %s/s in records of %d bytes; group %s\n", demoTopic, demoPartitions, d.nodes, humanize.Bytes(uint64(d.rate)), demoSize, demoTopic)
	fmt.Fprintf(w, "  storage   file://%s\n  files     %s (%s)\n\nTry:  kcat -b %s -t %s -C -o end\n      estran cluster status --http %s\nCtrl-C to stop.\n\n",
		d.voter.Objects, d.dir, kept, n.Kafka, demoTopic, n.HTTP)
}
