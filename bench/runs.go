package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// run is one work on one system, once.
type run struct {
	b     *comparison
	c     *cluster
	w     work
	start time.Duration // start to first acknowledgement of a cluster of its own
	l     *line
	topic string
}

// job is the work's load on a topic of its own, which is not made yet.
func (r *run) job(topic string, l load) *job {
	l.partitions, l.size, l.producers, l.letters = cmp.Or(l.partitions, 12), cmp.Or(l.size, 1024), cmp.Or(l.producers, 1), cmp.Or(l.letters, 256)
	j := &job{load: l, seeds: r.c.seeds(), topic: topic, rf: len(r.c.servers), pool: r.b.pool(l.size, l.letters)}
	j.total = r.b.o.mb * 1_000_000 / int64(l.size)
	switch {
	case l.rate > 0:
		j.total = int64(l.rate*1e6*r.b.o.during.Seconds()) / int64(l.size)
	case l.one || l.spread:
		j.total, j.during = 1<<24, r.b.o.during
	}
	j.total = max(j.total, 2*int64(l.producers)) // each has one beside its first
	return j
}

// produceRun measures producers, and what follows them, and then reads all that was acknowledged.
func produceRun(ctx context.Context, r *run) error {
	j := r.job(r.topic, r.w.load)
	if err := j.create(ctx); err != nil {
		return err
	}
	return errors.Join(r.produce(ctx, j, ""), r.end(ctx, j))
}

// end removes the topic of a run from a cluster that others use.
func (r *run) end(ctx context.Context, j *job) error {
	if r.w.own {
		return nil
	}
	return j.remove(context.WithoutCancel(ctx))
}

// produce measures a job and checks it. The keys that it puts into the line begin with prefix.
func (r *run) produce(ctx context.Context, j *job, prefix string) error {
	from, err := j.ends(ctx)
	if err != nil {
		return err
	}
	var s sent
	var e2e []time.Duration
	if err := r.measure(ctx, prefix, func() (int64, error) {
		s, e2e, err = j.produceAndFollow(ctx, from)
		return s.records * int64(j.size), err
	}); err != nil {
		return err
	}
	bytes := float64(s.records) * float64(j.size)
	r.l.set(prefix+"MB/s", s.rate)
	r.l.quantiles(prefix, s.lat)
	r.l.set(prefix+"wire_B/B", float64(j.wire.sent.Load()+j.wire.got.Load())/bytes)
	r.l.set(prefix+"ratio", float64(j.wire.raw.Load())/float64(max(1, j.wire.packed.Load())))
	if j.tails > 0 {
		r.l.quantiles(prefix+"e2e_", e2e)
		return nil // they have checked everything
	}
	return j.verify(ctx, from, s.records, 1)
}

// verify reads what lies behind from.
func (j *job) verify(ctx context.Context, from map[int32]int64, want, every int64) error {
	to, err := j.ends(ctx)
	if err != nil {
		return err
	}
	c := newCheck(j.pool, max(want, j.total), every, from)
	if _, err := j.read(ctx, from, to, 1, c.record); err != nil {
		return err
	}
	return c.end(want)
}

// produceAndFollow produces while j.tails consumers follow from the ends on, each of which checks all.
func (j *job) produceAndFollow(ctx context.Context, from map[int32]int64) (s sent, e2e []time.Duration, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	lat, errs := make([][]time.Duration, j.tails), make([]error, j.tails)
	var wg sync.WaitGroup
	for i := range j.tails {
		cl, err := j.consumer(from, func(int32) bool { return true }, j.tails)
		if err != nil {
			return s, nil, err
		}
		defer cl.Close()
		j.following.Add(1)
		wg.Go(func() {
			if lat[i], errs[i] = j.tail(ctx, cl, newCheck(j.pool, j.total, 16, from)); errs[i] != nil {
				cancel(errs[i])
			}
		})
	}
	if s, err = j.produce(ctx); err != nil {
		cancel(err)
	}
	wg.Wait()
	return s, slices.Concat(lat...), errors.Join(append(errs, err)...)
}

// fill makes a topic and writes the job's records to it, unmeasured.
func (j *job) fill(ctx context.Context) (from map[int32]int64, s sent, err error) {
	if err := j.create(ctx); err != nil {
		return nil, s, err
	}
	if from, err = j.ends(ctx); err != nil {
		return nil, s, err
	}
	s, err = j.produce(ctx)
	return from, s, err
}

// consumeRun writes a topic and measures how it is read.
func consumeRun(ctx context.Context, r *run) (err error) {
	j := r.job(r.topic, r.w.load)
	from, s, err := j.fill(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.end(ctx, j)) }()
	if j.sealed {
		if err := r.c.waitSealed(ctx); err != nil {
			return err
		}
	}
	if j.cold {
		if err := r.restart(ctx, "restart_ms", server.Stop); err != nil {
			return err
		}
	}
	to, err := j.ends(ctx)
	if err != nil {
		return err
	}
	c := newCheck(j.pool, j.total, 64, from)
	got := j.wire.got.Load()
	if err := r.measure(ctx, "", func() (int64, error) { return j.read(ctx, from, to, j.consumers, c.record) }); err != nil {
		return err
	}
	r.l.set("wire_B/B", float64(j.wire.got.Load()-got)/float64(s.records*int64(j.size)))
	if mb, _ := r.l.num("from_objects_MB"); j.cold && mb*1e6 < .9*float64(s.records*int64(j.size)) {
		r.l.set("counts", "not all was read from the store")
	}
	return c.end(s.records)
}

// mixedRun measures producers and who follows them while all that was written before is read, again and again.
func mixedRun(ctx context.Context, r *run) (err error) {
	old := r.job(r.topic, load{})
	from, s, err := old.fill(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.end(ctx, old)) }()
	if err := r.c.waitSealed(ctx); err != nil {
		return err
	}
	to, err := old.ends(ctx)
	if err != nil {
		return err
	}
	backfill, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	var bytes int64
	var wrong error
	began := time.Now()
	wg.Go(func() {
		for backfill.Err() == nil && wrong == nil {
			c := newCheck(old.pool, old.total, 64, from)
			n, err := old.read(backfill, from, to, 1, c.record)
			bytes += n
			if backfill.Err() == nil {
				wrong = errors.Join(err, c.end(s.records))
			}
		}
	})
	err = r.produce(ctx, r.job(r.topic, r.w.load), "")
	cancel()
	wg.Wait()
	r.l.set("backfill_MB/s", float64(bytes)/1e6/time.Since(began).Seconds())
	return errors.Join(err, wrong)
}

// javaRun measures Kafka's own producer as it comes.
func javaRun(ctx context.Context, r *run) (err error) {
	j := r.job(r.topic, r.w.load)
	if err := j.create(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.end(ctx, j)) }()
	from, err := j.ends(ctx)
	if err != nil {
		return err
	}
	cmd := java(r.b.jars, "org.apache.kafka.tools.ProducerPerformance", "--topic", j.topic, "--num-records", fmt.Sprint(j.total), "--record-size", fmt.Sprint(j.size), "--throughput", "-1",
		"--producer-props", "bootstrap.servers="+strings.Join(j.seeds, ","))
	var out []byte
	if err := r.measure(ctx, "", func() (int64, error) {
		stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
		defer stop()
		out, err = cmd.CombinedOutput()
		return j.total * int64(j.size), err
	}); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	cpu := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	r.l.set("client_s/GiB", cpu.Seconds()/(float64(j.total)*float64(j.size)/(1<<30)))
	if err := parsePerformance(string(out), r.l); err != nil {
		return err
	}
	return j.verify(ctx, from, j.total, 0)
}

var performance = regexp.MustCompile(`^(\d+) records sent, [\d.]+ records/sec \(([\d.]+) MB/sec\), [\d.]+ ms avg latency, ([\d.]+) ms max latency, ([\d.]+) ms 50th, [\d.]+ ms 95th, ([\d.]+) ms 99th, ([\d.]+) ms 99\.9th`)

// parsePerformance reads the last line of ProducerPerformance. What it calls MB is 2^20 bytes.
func parsePerformance(out string, l *line) error {
	for _, s := range slices.Backward(strings.Split(strings.TrimSpace(out), "\n")) {
		m := performance.FindStringSubmatch(s)
		if m == nil {
			continue
		}
		for i, key := range []string{"MB/s", "max_ms", "p50_ms", "p99_ms", "p999_ms"} {
			v, err := strconv.ParseFloat(m[i+2], 64)
			if err != nil {
				return err
			}
			if key == "MB/s" {
				v *= 1.048576
			}
			l.set(key, v)
		}
		return nil
	}
	return fmt.Errorf("ProducerPerformance has said nothing that is understood:\n%s", out)
}

// idle measures a cluster that has nothing to do.
func (r *run) idle(ctx context.Context) error {
	select {
	case <-time.After(r.b.o.during / 3): // what its start has left behind
	case <-ctx.Done():
		return ctx.Err()
	}
	before, err := r.c.usage(ctx, r.b.disk)
	if err != nil {
		return err
	}
	began := time.Now()
	select {
	case <-time.After(r.b.o.during):
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := r.c.usage(ctx, r.b.disk)
	if err != nil {
		return err
	}
	rss, _, err := r.c.memory()
	r.l.set("idle_cpu_%", 100*(after.cpu-before.cpu)/time.Since(began).Seconds())
	r.l.set("idle_rss_MiB", rss)
	return err
}

func startRun(ctx context.Context, r *run) error {
	r.l.set("start_ms", r.start.Seconds()*1000)
	if err := r.idle(ctx); err != nil {
		return err
	}
	return r.restart(ctx, "restart_ms", server.Stop)
}

func (r *run) restart(ctx context.Context, key string, end func(server) error) error {
	if err := r.c.each(end); err != nil && r.c.system == estran { // Kafka's exit code after SIGTERM is 143
		return err
	}
	took, err := r.c.start(ctx)
	r.l.set(key, took.Seconds()*1000)
	return err
}

// partitionStep is how many partitions are made by a request: Kafka makes at most 10,000.
const partitionStep = 5000

func partitionsRun(ctx context.Context, r *run) error {
	many := r.job("many", r.w.load)
	n := many.partitions
	began := time.Now()
	many.partitions = min(n, partitionStep)
	if err := many.create(ctx); err != nil {
		return err
	}
	adm, err := many.admin()
	if err != nil {
		return err
	}
	defer adm.Close()
	for many.partitions < n {
		many.partitions = min(n, many.partitions+partitionStep)
		rs, err := adm.UpdatePartitions(ctx, many.partitions, many.topic)
		if err := errors.Join(err, rs.Error()); err != nil {
			return err
		}
	}
	if _, err := many.ends(ctx); err != nil { // all have leaders
		return err
	}
	r.l.set("create_s", time.Since(began).Seconds())
	if err := r.idle(ctx); err != nil {
		return err
	}
	twelve := r.job("twelve", load{})
	if err := twelve.create(ctx); err != nil {
		return err
	}
	if err := r.produce(ctx, twelve, ""); err != nil {
		return err
	}
	return r.produce(ctx, many, "active_")
}

// topicsRun makes topics one request after the other, then many at once, until a record in each has been acknowledged, and starts the nodes again with all of them.
func topicsRun(ctx context.Context, r *run) error {
	n := r.b.o.topics
	j := r.job("", load{})
	cl, err := j.client(kgo.MetadataMinAge(100*time.Millisecond), kgo.MaxBufferedRecords(8*n), kgo.ProducerLinger(0), kgo.UnknownTopicRetries(-1), kgo.RecordPartitioner(kgo.ManualPartitioner()))
	if err != nil {
		return err
	}
	defer cl.Close()
	adm := kadm.NewClient(cl)
	var lat []time.Duration
	for i := range n {
		sent := time.Now()
		t, err := adm.CreateTopic(ctx, 1, int16(j.rf), nil, fmt.Sprint("one-", i))
		if err := errors.Join(err, t.Err); err != nil {
			return err
		}
		lat = append(lat, time.Since(sent))
	}
	r.l.quantiles("create_", lat)
	names, records := make([]string, 4*n), make([]*kgo.Record, 4*n)
	for i := range names {
		names[i] = fmt.Sprint("many-", i)
		records[i] = &kgo.Record{Topic: names[i], Value: []byte("first")}
	}
	began := time.Now()
	for part := range slices.Chunk(names, n) {
		rs, err := adm.CreateTopics(ctx, 1, int16(j.rf), nil, part...)
		if err := errors.Join(err, rs.Error()); err != nil {
			return err
		}
	}
	r.l.set("created_ms", time.Since(began).Seconds()*1000)
	if err := cl.ProduceSync(ctx, records...).FirstErr(); err != nil {
		return err
	}
	r.l.set("writable_ms", time.Since(began).Seconds()*1000)
	rss, _, err := r.c.memory()
	if err != nil {
		return err
	}
	r.l.set("rss_MiB", rss)
	if err := r.restart(ctx, "restart_ms", server.Stop); err != nil {
		return err
	}
	if err := r.restart(ctx, "kill9_ms", server.Kill); err != nil {
		return err
	}
	var last error
	err = until(ctx, "leaders of all topics", func() bool {
		ends, err := adm.ListEndOffsets(ctx, names...)
		last = errors.Join(err, ends.Error())
		ends.Each(func(o kadm.ListedOffset) { // each has its record still
			if o.Err == nil && o.Offset != 1 {
				last = fmt.Errorf("WRONG: %s ends at %d, not at 1", o.Topic, o.Offset)
			}
		})
		return last == nil
	})
	return errors.Join(err, last)
}
