package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// gaps is the longest time without an acknowledgement in each partition, which gets one record after the other: what a client sees, its own metadata and retries included.
type gaps struct {
	mu      sync.Mutex
	last    []time.Time
	longest []time.Duration
	acks    []int
}

func (g *gaps) acked(p int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	if !g.last[p].IsZero() {
		g.longest[p] = max(g.longest[p], now.Sub(g.last[p]))
	}
	g.last[p] = now
	g.acks[p]++
}

func (g *gaps) reset() {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.longest)
	clear(g.acks)
}

// calm reports whether every partition has had some acknowledgements since reset.
func (g *gaps) calm() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Min(g.acks) >= 20
}

// failoverRun ends leaders, Kafka's less often: it takes a hundred times as long.
func failoverRun(ctx context.Context, r *run) error {
	j := r.job(r.topic, load{partitions: 6, size: 64})
	if err := j.create(ctx); err != nil {
		return err
	}
	from, err := j.ends(ctx)
	if err != nil {
		return err
	}
	g := &gaps{last: make([]time.Time, j.partitions), longest: make([]time.Duration, j.partitions), acks: make([]int, j.partitions)}
	j.total = 1 << 26
	c := newCheck(j.pool, j.total, 1, from)
	cl, err := j.client(kgo.DefaultProduceTopic(j.topic), kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.RecordRetries(1<<30), kgo.ProducerLinger(0), kgo.MetadataMinAge(10*time.Millisecond),
		kgo.RetryBackoffFn(func(int) time.Duration { return 5 * time.Millisecond }), kgo.ProduceRequestTimeout(100*time.Millisecond), kgo.RequestTimeoutOverhead(100*time.Millisecond))
	if err != nil {
		return err
	}
	defer cl.Close()
	load, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	var number, acked, unknown atomic.Int64
	for p := range j.partitions {
		wg.Go(func() {
			for load.Err() == nil && number.Load() < j.total-int64(j.partitions) {
				i := number.Add(1)
				rec := j.record(p, i)
				rec.Partition = int32(p)
				if cl.ProduceSync(ctx, rec).FirstErr() != nil {
					unknown.Add(1)
					continue
				}
				acked.Add(1)
				g.acked(p)
			}
		})
	}
	err = errors.Join(r.hit(ctx, g, j.topic, "kill", server.Kill, func(s server) error { return s.Start(ctx) }),
		r.hit(ctx, g, j.topic, "stop", sends(syscall.SIGSTOP), sends(syscall.SIGCONT)))
	stop()
	wg.Wait()
	if err != nil {
		return err
	}
	to, err := j.ends(ctx)
	if err != nil {
		return err
	}
	if _, err := j.read(ctx, from, to, 1, c.record); err != nil {
		return err
	}
	if n := c.n.Load(); n > acked.Load() && n <= acked.Load()+unknown.Load() {
		return c.end(n) // records whose producers gave up may be there
	}
	return c.end(acked.Load())
}

func sends(s syscall.Signal) func(server) error {
	return func(x server) error { return syscall.Kill(x.pid(), s) }
}

// hit does something to the leader of partition 0, again and again, and puts the gaps of the partitions that it led into the line.
func (r *run) hit(ctx context.Context, g *gaps, topic, name string, hit, back func(server) error) error {
	n := r.b.o.failovers
	if r.c.system != estran {
		n = max(1, n/10)
	}
	cl, err := kgo.NewClient(kgo.SeedBrokers(r.c.seeds()...), kgo.MetadataMinAge(10*time.Millisecond))
	if err != nil {
		return err
	}
	defer cl.Close()
	adm := kadm.NewClient(cl)
	var all []time.Duration
	var raw []string
	for range n {
		g.reset()
		var leader int32
		var mine []int32
		if err := until(ctx, "all replicas to be in sync", func() bool {
			leader, mine = ledBySameAsFirst(ctx, adm, topic, len(r.c.servers))
			return leader > 0 && g.calm()
		}); err != nil {
			return err
		}
		s := r.c.servers[leader-1]
		g.reset()
		if err := hit(s); err != nil {
			return err
		}
		err := until(ctx, "acknowledgements in every partition", g.calm)
		g.mu.Lock()
		for _, p := range mine {
			all = append(all, g.longest[p])
			raw = append(raw, fmt.Sprint(g.longest[p].Milliseconds()))
		}
		g.mu.Unlock()
		if err := errors.Join(back(s), err); err != nil {
			return err
		}
	}
	r.l.quantiles(name+"_", all)
	r.l.set(name+"s", float64(n))
	r.l.put(name+"_all_ms", strings.Join(raw, ","))
	return nil
}

// ledBySameAsFirst returns the leader of partition 0 and what it leads; 0 while a replica is not in sync.
func ledBySameAsFirst(ctx context.Context, adm *kadm.Client, topic string, replicas int) (leader int32, led []int32) {
	t, err := adm.ListTopics(ctx, topic)
	if err != nil || t.Error() != nil {
		return 0, nil
	}
	all := t[topic].Partitions
	for p, d := range all {
		if d.Err != nil || len(d.ISR) < replicas || d.Leader < 1 {
			return 0, nil
		}
		if d.Leader == all[0].Leader {
			led = append(led, p)
		}
	}
	return all[0].Leader, led
}

// until asks every few milliseconds, for three minutes at most.
func until(ctx context.Context, what string, done func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for !done() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}
