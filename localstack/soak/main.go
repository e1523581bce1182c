// Command soak runs three voters for hours under a moderate load in which everything comes and goes: topics, connections, members of groups, records that retention deletes. It measures what
// leaks, and says at the end how much of it an hour adds.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/estran/estran/localstack"
)

// result is the last line.
type result struct {
	Minutes     float64            `json:"minutes"`
	Samples     int                `json:"samples"` // after the warm-up
	Judged      bool               `json:"judged"`  // it was long enough to say what grows
	Acked       int64              `json:"acked"`
	Topics      int64              `json:"topics"`      // made and deleted
	Connections int64              `json:"connections"` // made and dropped
	Rebalances  int64              `json:"rebalances"`
	Elections   int                `json:"elections"`   // since leaderships had settled
	Unexplained int                `json:"unexplained"` // of these, in a time without a stall
	PerHour     map[string]float64 `json:"per_hour"`    // slopes
	Grows       []string           `json:"grows"`
	Errors      []string           `json:"errors"`
}

type config struct {
	length, every time.Duration
	module        string
	pace          pace
	store         string // URL; "" = a directory beside the voters'
}

func main() {
	var c config
	minutes := flag.Float64("minutes", 120, "how long it runs")
	flag.DurationVar(&c.every, "every", time.Minute, "time between two lines; shorter if there would be fewer than twelve")
	flag.Func("load", "full: produce as fast as records are acknowledged; idle: a record a second and nothing else; without it 2 MB/s", c.pace.set)
	flag.StringVar(&c.store, "store", "", "URL of the object store; a directory beside those of the voters if empty")
	flag.StringVar(&c.module, "module", ".", "directory of the module whose program is tried")
	flag.Parse()
	c.length = time.Duration(*minutes * float64(time.Minute))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	r, err := run(ctx, c, os.Stdout)
	if err != nil {
		r.Errors = append(r.Errors, err.Error())
	}
	line, _ := json.Marshal(r) // plain numbers and strings
	fmt.Println(string(line))
	if !r.clean() {
		os.Exit(1)
	}
}

func (r *result) clean() bool {
	return len(r.Errors) == 0 && len(r.Grows) == 0 && r.Unexplained == 0
}

// shards of the cluster, beside meta.
const shards = 3

// settings of every run: what is deleted goes soon. small make minutes show what takes days, a small log and small segments; under full load these are as they are by default.
var (
	settings = []string{fmt.Sprint("ESTRAN_QUORUM_SHARDS=", shards), "ESTRAN_TIERING_PREPARE_TTL=30s", "ESTRAN_TIERING_DELETE_GRACE=10s", "KAFKA_LOG_RETENTION_CHECK_INTERVAL_MS=1000", "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS=0"}
	small    = []string{"ESTRAN_TIERING_SEAL_BYTES=4MiB", "ESTRAN_TIERING_SEAL_AGE=5s", "ESTRAN_TIERING_LOCAL_RETENTION_BYTES=16MiB", "ESTRAN_TIERING_CACHE_BYTES=16MiB", "ESTRAN_HOT_MAX_BYTES=512MiB"}
)

// run soaks until the time is over or ctx ends.
func run(ctx context.Context, c config, out io.Writer) (r *result, err error) {
	r = &result{PerHour: map[string]float64{}, Grows: []string{}, Errors: []string{}}
	dir, err := os.MkdirTemp("", "estran-soak-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	program, err := localstack.Build(ctx, c.module, dir)
	if err != nil {
		return r, err
	}
	data := filepath.Join(dir, "cluster")
	if err := os.Mkdir(data, 0o755); err != nil {
		return r, err
	}
	env := settings
	if c.pace != full {
		env = slices.Concat(settings, small)
	}
	cluster := localstack.NewCluster(program, data, 3, env...)
	cluster.Storage = c.store
	if err := cluster.Start(ctx); err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, cluster.Close()) }()
	var brokers []string
	for _, n := range cluster.Nodes {
		brokers = append(brokers, n.Kafka)
	}
	begun := time.Now()
	life, end := context.WithTimeout(ctx, c.length)
	defer end()
	l, err := start(life, brokers, c.pace)
	if err != nil {
		return r, err
	}
	samples, err := watch(life, cluster, data, l, min(c.every, c.length/12), begun, out)
	end()
	if e := l.wait(); e != nil {
		r.Errors = append(r.Errors, e.Error())
	}
	r.Minutes = time.Since(begun).Minutes()
	r.Acked, r.Topics, r.Connections, r.Rebalances = l.acked.Load(), l.topics.Load(), l.connections.Load(), l.rebalances.Load()
	r.judge(samples)
	return r, err
}

// watch takes a sample again and again, and prints it.
func watch(ctx context.Context, cluster *localstack.Cluster, dir string, l *load, every time.Duration, begun time.Time, out io.Writer) (all []sample, err error) {
	stalls := watchStalls(ctx)
	tick := time.NewTicker(every)
	defer tick.Stop()
	acked := int64(0)
	for {
		select {
		case <-ctx.Done():
			return all, nil
		case <-tick.C:
		}
		s, err := measure(cluster, dir)
		if err != nil {
			return all, err
		}
		s.at, s.stall = time.Since(begun), stalls()
		all = append(all, s)
		fmt.Fprintln(out, s)
		if was := acked; l.acked.Load() == was {
			return all, fmt.Errorf("nothing was acknowledged between two lines, after %v", s.at)
		}
		acked = l.acked.Load()
		if err := l.failed(); err != nil {
			return all, err
		}
	}
}
