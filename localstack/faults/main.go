// Command faults runs a cluster of three voters under load, brings faults upon it that a seed chooses, and checks the history of what its clients saw.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/estran/estran/localstack"
	"github.com/estran/estran/localstack/check"
)

const (
	ackedPerRound = 5000
	quietRounds   = 12 // one of so many has no fault, beside those that the choice among all kinds gives
	shards        = 3
	diskBytes     = 2 << 30 // of each voter, mostly never written
	// deleteGrace is how long objects live that nothing refers to; what was uploaded and never committed lives twice as long.
	deleteGrace = 6 * time.Second
)

var (
	// errStuck: the cluster has not come back after a fault. Everything else that ends a life early is the fault of what drives it, and no finding.
	errStuck = errors.New("stuck")
	// errUnavailable: this machine cannot bring the fault about.
	errUnavailable = errors.New("not possible here")
)

// patience is for what must happen after a fault. The test of a slice, which other tests run beside, has more.
var patience = time.Minute

// result is the last line.
type result struct {
	Seed      uint64         `json:"seed"`
	Rounds    int            `json:"rounds"`
	Acked     int64          `json:"acked"`
	Others    int64          `json:"others"` // of them to other clients than franz-go
	Observed  int            `json:"observed"`
	Anomalies int            `json:"anomalies"`
	Skipped   int            `json:"skipped"`
	Undecided int            `json:"undecided,omitempty"` // names whose metadata operations were too many to be put in order
	Nemeses   map[string]int `json:"nemeses"`
	Found     map[string]int `json:"found"`
	Histories []string       `json:"histories"`
}

type config struct {
	seed            uint64
	rounds, perLife int
	nemeses, keep   string
	module          string // directory of the module whose program is tried
	program         string // built already
	foreign         bool   // other clients take part, if they are installed
	clients         map[string][]string
	env             []string // of every voter, beside what a life needs
	clocks          bool     // the program has a clock that can be wrong
}

func main() {
	var c config
	flag.Uint64Var(&c.seed, "seed", 1, "chooses the faults")
	flag.IntVar(&c.rounds, "rounds", 20, "rounds")
	flag.IntVar(&c.perLife, "fresh", 10, "rounds of one cluster")
	flag.StringVar(&c.nemeses, "nemeses", "", "kinds of faults, separated by commas; all if empty")
	flag.StringVar(&c.keep, "keep", os.TempDir(), "directory for failing histories")
	flag.BoolVar(&c.foreign, "foreign", true, "librdkafka (python3 with confluent_kafka) and Apache Kafka's own client (a JDK, and what `bash bench/kafka fetch` brings) take part, if they are there")
	flag.StringVar(&c.module, "module", ".", "directory of the module whose program is tried")
	mistakes := flag.String("planted", "", "plant these mistakes, separated by commas, or all; each is tried until it is caught")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM) // disks must be unmounted
	defer stop()
	if *mistakes != "" {
		if err := plant(ctx, c, *mistakes, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	kinds, err := choose(c.nemeses)
	if err == nil {
		err = isolate(kinds, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	r, err := run(ctx, c, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	line, _ := json.Marshal(r) // plain numbers and strings
	fmt.Println(string(line))
	if err != nil || r.Anomalies > 0 {
		os.Exit(1)
	}
}

func choose(names string) (out []nemesis, err error) {
	if names == "" {
		return nemeses, nil
	}
	for name := range strings.SplitSeq(names, ",") {
		found := false
		for _, n := range nemeses {
			if n.name == name {
				out, found = append(out, n), true
			}
		}
		if !found {
			return nil, fmt.Errorf("no nemesis %q", name)
		}
	}
	return out, nil
}

// run plays all rounds, in lives of one cluster each.
func run(ctx context.Context, c config, out io.Writer) (*result, error) {
	r := &result{Seed: c.seed, Nemeses: map[string]int{}, Found: map[string]int{}}
	kinds, err := choose(c.nemeses)
	if err != nil {
		return r, err
	}
	dir, err := os.MkdirTemp("", "estran-faults-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	program := c.program
	if program == "" {
		var flags []string
		if c.clocks = slices.ContainsFunc(kinds, func(n nemesis) bool { return n.clock }); c.clocks {
			flags = []string{"-tags=planted"}
		}
		if program, err = localstack.Build(ctx, c.module, dir, flags...); err != nil {
			return r, err
		}
	}
	if c.foreign {
		if c.clients, err = foreignClients(ctx, dir); err != nil {
			return r, err
		}
		fmt.Fprintln(out, "clients beside franz-go:", slices.Sorted(maps.Keys(c.clients)))
	}
	rng := rand.New(rand.NewPCG(c.seed, 0))
	for left := c.rounds; left > 0; left -= c.perLife { // every fourth cluster is of five voters
		if err := life(ctx, c, r, program, filepath.Join(dir, "cluster"), kinds, min(left, c.perLife), rng, out); err != nil {
			return r, err
		}
	}
	return r, nil
}

// life is one cluster from its start to the check of its history.
func life(ctx context.Context, c config, r *result, program, dir string, kinds []nemesis, rounds int, rng *rand.Rand, out io.Writer) (err error) {
	store, network := localstack.NewDouble(), localstack.NewNetwork()
	defer store.Close()
	defer func() { err = errors.Join(err, network.Close()) }()
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	voters := 3
	if rng.IntN(4) == 0 || needs(kinds) > voters {
		voters = 5
	}
	kinds = slices.DeleteFunc(slices.Clone(kinds), func(n nemesis) bool { return n.voters > voters })
	hot := []string{"64MiB", "64MiB", "1GiB"}[rng.IntN(3)] // with little of it there are snapshots, and logs are freed
	cluster := localstack.NewCluster(program, dir, voters, append(append(store.Env(), c.env...), "ESTRAN_HOT_MAX_BYTES="+hot, "ESTRAN_TIERING_SEAL_BYTES=1MiB", "ESTRAN_TIERING_SEAL_AGE=300ms", "ESTRAN_TIERING_LOCAL_RETENTION_BYTES=0",
		"ESTRAN_TIERING_CACHE_BYTES=8MiB", // what is read again is read from the store again
		fmt.Sprint("ESTRAN_TIERING_PREPARE_TTL=", 2*deleteGrace), fmt.Sprint("ESTRAN_TIERING_DELETE_GRACE=", deleteGrace), "KAFKA_LOG_RETENTION_CHECK_INTERVAL_MS=1000",
		"KAFKA_LOG_MESSAGE_TIMESTAMP_AFTER_MAX_MS=9223372036854775807", // wrong clocks would refuse records with right ones
		fmt.Sprint("ESTRAN_QUORUM_SHARDS=", shards), "ESTRAN_TEST_CLOCK="+dir)...)
	cluster.Storage, cluster.Network = store.URL("estran"), network
	ns, kinds, err := namespaces(kinds, voters, rng, out)
	if err != nil {
		return err
	}
	if ns != nil {
		defer func() { err = errors.Join(err, ns.Close()) }()
		if err := attach(cluster, ns, store); err != nil {
			return err
		}
	}
	if slices.ContainsFunc(kinds, func(n nemesis) bool { return n.disk }) {
		cluster.Disks = diskBytes
	}
	err = cluster.Start(ctx)
	if errors.Is(err, localstack.ErrNoDisk) { // what needs one is skipped
		cluster.Disks = 0
		err = cluster.Start(ctx)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cluster.Close()) }()
	var brokers []string
	for _, n := range cluster.Nodes {
		brokers = append(brokers, n.Kafka)
	}
	load, err := start(ctx, brokers, rng.Uint64())
	if err != nil {
		return errors.Join(r.stuck(ctx, err), keepVoters(c, cluster, out))
	}
	id := int32(foreignIDs)
	for _, name := range slices.Sorted(maps.Keys(c.clients)) {
		if err := load.foreign(load.ctx, c.clients[name], id); err != nil {
			load.end()
			load.wg.Wait()
			return fmt.Errorf("client %s: %w", name, err)
		}
		id += 10
	}
	w := &world{cluster: cluster, network: network, store: store, rng: rng, flips: map[string]int{}, leader: func() (int32, error) { return load.leader(ctx) }}
	if c.clocks {
		for i := range cluster.Nodes {
			w.clocks = append(w.clocks, filepath.Join(dir, fmt.Sprint("clock-", i+1))) // what the program looks at that has the tag
		}
	}
	var failed error
	for range rounds {
		n := kinds[rng.IntN(len(kinds))]
		if c.nemeses == "" && rng.IntN(quietRounds) == 0 {
			n = nemeses[0]
		}
		if failed = round(ctx, r, w, load, n, out); failed != nil || ctx.Err() != nil {
			break
		}
		store.Calls() // they are not kept
	}
	limit, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	ops, err := load.finish(limit)
	if ctx.Err() != nil { // interrupted: what is missing is no finding
		return ctx.Err()
	}
	if err != nil {
		err = fmt.Errorf("%w: %w", errStuck, err)
	}
	failed = errors.Join(failed, err)
	r.Others += load.others.Load()
	if failed == nil {
		found, err := load.scrub(limit, store)
		r.report(found, out)
		failed = err
	}
	if failed == nil {
		found, err := sameLogs(limit, cluster, store, w.flips)
		r.report(found, out)
		failed = err
	}
	for _, text := range cluster.After("\npanic: ", 4<<10) {
		r.report([]check.Anomaly{{Rule: "panic", Text: "a voter has ended of one:" + text, Key: -1}}, out)
	}
	r.report(load.bad, out)
	failed = errors.Join(failed, r.judgeMetadata(c, load.asked))
	if failed = r.stuck(ctx, failed); failed != nil {
		failed = errors.Join(failed, keepVoters(c, cluster, out))
	}
	return errors.Join(failed, r.judge(c, ops, failed == nil, out))
}

// keepVoters keeps what the voters have written and were doing when they did not come back.
func keepVoters(c config, cluster *localstack.Cluster, out io.Writer) error {
	dir, err := os.MkdirTemp(c.keep, fmt.Sprintf("estran-voters-%d-*", c.seed))
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "the voters' output is in", dir)
	return cluster.Keep(dir)
}

// stuck counts an error that says that the cluster has not come back, unless the run is being ended.
func (r *result) stuck(ctx context.Context, err error) error {
	if errors.Is(err, errStuck) && ctx.Err() == nil {
		r.Found["stuck"]++
		r.Anomalies++
	}
	return err
}

// needs is how many voters one of these faults wants, if it is the only one.
func needs(kinds []nemesis) int {
	if len(kinds) == 1 {
		return kinds[0].voters
	}
	return 0
}

func (r *result) report(found []check.Anomaly, out io.Writer) {
	for _, a := range found {
		r.Anomalies++
		if r.Found[a.Rule]++; r.Found[a.Rule] > 5 {
			continue
		}
		fmt.Fprintf(out, "anomaly %s, partition %d: %s\n", a.Rule, a.Key, a.Text)
	}
}

// judge checks a history, and keeps one that is not clean.
func (r *result) judge(c config, ops []check.Op, final bool, out io.Writer) error {
	got := check.Check(ops, check.Options{Final: final, Kept: keptPartitions})
	r.Acked, r.Observed = r.Acked+int64(got.Acked), r.Observed+got.Observed
	for rule, n := range got.Counts {
		r.Found[rule] += n
		r.Anomalies += n
	}
	if final && len(got.Counts) == 0 {
		return nil
	}
	for _, a := range got.Anomalies {
		fmt.Fprintf(out, "anomaly %s, partition %d: %s\n", a.Rule, a.Key, a.Text)
	}
	f, err := os.CreateTemp(c.keep, fmt.Sprintf("estran-history-%d-*", c.seed))
	if err != nil {
		return err
	}
	r.Histories = append(r.Histories, f.Name())
	var b []byte
	for i := range ops {
		b = check.Append(b, &ops[i])
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}

// round brings one fault about under load, undoes it, and waits until every partition takes records again.
func round(ctx context.Context, r *result, w *world, load *workload, n nemesis, out io.Writer) error {
	before := load.count()
	if !until(ctx, func() bool { return load.count() > before+ackedPerRound/2 && load.unacked.Load() > 0 }) {
		return fmt.Errorf("%w: %s: no acknowledgements before it", errStuck, n.name)
	}
	f, err := n.begin(w)
	if errors.Is(err, errUnavailable) {
		fmt.Fprintf(out, "%s: skipped: %v\n", n.name, err)
		r.Skipped++
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s cannot be brought about: %w", n.name, err)
	}
	begun := load.count()
	took := until(ctx, f.hit)
	outstanding := within(ctx, lullEvery, func() bool { return load.unacked.Load() > 0 }) // nobody writes now and then
	hold := w.hold()
	sleep(ctx, hold) // how long the fault lasts
	healing, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	if err := f.heal(healing); err != nil {
		return fmt.Errorf("%w: after %s: %w", errStuck, n.name, err)
	}
	var healed [partitions]int64
	for p := range healed {
		healed[p] = load.acked[p].Load()
	}
	again := until(ctx, func() bool {
		for p := range healed {
			if load.acked[p].Load() <= healed[p]+10 {
				return false
			}
		}
		return load.count() >= begun+ackedPerRound
	})
	fmt.Fprintf(out, "%s: %s for %v, in effect %v, %d acknowledged\n", n.name, f.what, hold, took && outstanding, load.count()-begun)
	if !again {
		return fmt.Errorf("%w: %s: no acknowledgements in %v after it", errStuck, n.name, patience)
	}
	if !took || !outstanding {
		r.Skipped++
		return nil
	}
	r.Rounds++
	r.Nemeses[n.name]++
	return nil
}

// until waits for a condition of other processes, for which there is no event; it is false when patience or ctx has ended before.
func until(ctx context.Context, cond func() bool) bool { return within(ctx, patience, cond) }

func within(ctx context.Context, limit time.Duration, cond func() bool) bool {
	for end := time.Now().Add(limit); !cond(); sleep(ctx, 5*time.Millisecond) {
		if ctx.Err() != nil || time.Now().After(end) {
			return false
		}
	}
	return true
}
