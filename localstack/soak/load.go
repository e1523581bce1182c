package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	topic      = "steady"
	partitions = 6
	recordSize = 1000
	perBeat    = 20        // records of each of the two producers, fifty times a second
	kept       = 4_000_000 // bytes of a partition that retention leaves: some ten seconds
	keptFull   = 100 * kept
)

// load is the clients. Each kind does one thing over and over, at a pace of its own, until the time is over.
type load struct {
	brokers                                []string
	acked, topics, connections, rebalances atomic.Int64
	wg                                     sync.WaitGroup
	mu                                     sync.Mutex
	err                                    error
}

// options of every client: patient with elections, which are counted elsewhere.
func (l *load) client(opts ...kgo.Opt) (*kgo.Client, error) {
	return kgo.NewClient(append([]kgo.Opt{kgo.SeedBrokers(l.brokers...), kgo.MetadataMinAge(100 * time.Millisecond), kgo.UnknownTopicRetries(-1), kgo.RetryTimeout(time.Minute)}, opts...)...)
}

// pace is how much the producers write.
type pace string

const (
	moderate pace = ""     // 2 MB/s
	full     pace = "full" // what is acknowledged makes room for more
	idle     pace = "idle" // a record a second, and no other client
)

func (p *pace) set(s string) error {
	if *p = pace(s); *p != full && *p != idle {
		return errors.New("full or idle")
	}
	return nil
}

// start makes the topic and starts all clients.
func start(ctx context.Context, brokers []string, p pace) (*load, error) {
	l := &load{brokers: brokers}
	cl, err := l.client()
	if err != nil {
		return nil, err
	}
	defer cl.Close()
	bytes := fmt.Sprint(kept)
	if p == full {
		bytes = fmt.Sprint(keptFull)
	}
	if err := decided(ctx, kerr.TopicAlreadyExists, func() error {
		made, err := kadm.NewClient(cl).CreateTopic(ctx, partitions, 3, map[string]*string{"retention.bytes": &bytes}, topic)
		return errors.Join(err, made.Err)
	}); err != nil {
		return nil, err
	}
	if p == idle {
		l.run(ctx, "produce", l.trickle)
		return l, nil
	}
	for range 2 {
		l.run(ctx, "produce", func(ctx context.Context) error { return l.produce(ctx, p) })
	}
	l.run(ctx, "come and go", l.comeAndGo)
	l.run(ctx, "drop connections", l.drop)
	l.run(ctx, "topics", l.makeTopics)
	l.run(ctx, "read again", l.readAgain)
	for i := range 3 {
		l.run(ctx, "join", func(ctx context.Context) error { return l.join(ctx, time.Duration(7+4*i)*time.Second) })
	}
	return l, nil
}

// run notes why a client ended, unless the time was over.
func (l *load) run(ctx context.Context, what string, f func(context.Context) error) {
	l.wg.Go(func() {
		if err := f(ctx); err != nil && ctx.Err() == nil {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.err = errors.Join(l.err, fmt.Errorf("%s: %w", what, err))
		}
	})
}

func (l *load) failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// wait returns when all clients have ended, and why one ended early.
func (l *load) wait() error {
	l.wg.Wait()
	return l.failed()
}

// paced calls f at a pace until ctx ends.
func paced(ctx context.Context, d time.Duration, f func() error) error {
	t := time.NewTicker(d)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if err := f(); err != nil {
			return err
		}
	}
}

// trickle writes a record a second: what has frozen is noticed.
func (l *load) trickle(ctx context.Context) error {
	cl, err := l.client(kgo.DefaultProduceTopic(topic))
	if err != nil {
		return err
	}
	defer cl.Close()
	return paced(ctx, time.Second, func() error {
		err := cl.ProduceSync(ctx, &kgo.Record{Value: make([]byte, recordSize)}).FirstErr()
		if err == nil {
			l.acked.Add(1)
		}
		return err
	})
}

// produce writes at a pace, or as fast as there is room in its buffer.
func (l *load) produce(ctx context.Context, p pace) error {
	cl, err := l.client(kgo.DefaultProduceTopic(topic), kgo.RecordRetries(1<<30), kgo.ProducerBatchCompression(kgo.NoCompression()))
	if err != nil {
		return err
	}
	defer cl.Close()
	value := make([]byte, recordSize)
	var failed atomic.Pointer[error]
	beat := func() error {
		for range perBeat {
			cl.Produce(ctx, &kgo.Record{Value: value}, func(_ *kgo.Record, err error) { // it waits while 10,000 are on their way
				if err != nil {
					failed.Store(&err)
					return
				}
				l.acked.Add(1)
			})
		}
		if err := failed.Load(); err != nil {
			return *err
		}
		return nil
	}
	if p != full {
		return paced(ctx, 20*time.Millisecond, beat)
	}
	for ctx.Err() == nil {
		if err := beat(); err != nil {
			return err
		}
	}
	return nil
}

// comeAndGo is a client that connects, writes, reads and goes, twice a second. It is not idempotent: producers are remembered for days.
func (l *load) comeAndGo(ctx context.Context) error {
	return paced(ctx, 500*time.Millisecond, func() error {
		cl, err := l.client(kgo.DefaultProduceTopic(topic), kgo.DisableIdempotentWrite(), kgo.ConsumeTopics(topic), kgo.FetchMaxBytes(1<<20))
		if err != nil {
			return err
		}
		defer cl.Close()
		l.connections.Add(1)
		if err := cl.ProduceSync(ctx, &kgo.Record{Value: []byte("v")}).FirstErr(); err != nil {
			return err
		}
		return cl.PollFetches(ctx).Err()
	})
}

// drop opens connections that end without a word, one of them in the middle of a frame.
func (l *load) drop(ctx context.Context) error {
	return paced(ctx, 100*time.Millisecond, func() error {
		for i, b := range l.brokers {
			c, err := net.DialTimeout("tcp", b, 10*time.Second)
			if err != nil {
				return err
			}
			l.connections.Add(1)
			if i == 0 {
				_, err = c.Write([]byte{0, 0, 1, 0, 0, 0, 0, 8})
			}
			if err := errors.Join(err, c.(*net.TCPConn).SetLinger(0), c.Close()); err != nil {
				return err
			}
		}
		return nil
	})
}

// decided repeats a request of which an election leaves open what came of it; already is what it is answered if a try before had done it. Names come once, so nothing else can mean that.
func decided(ctx context.Context, already error, ask func() error) error {
	for {
		err := ask()
		if err == nil || errors.Is(err, already) {
			return nil
		}
		if !kerr.IsRetriable(err) {
			return err
		}
		t := time.NewTimer(100 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}

// makeTopics makes a topic, writes to it and deletes it; no name comes again.
func (l *load) makeTopics(ctx context.Context) error {
	cl, err := l.client(kgo.DisableIdempotentWrite())
	if err != nil {
		return err
	}
	defer cl.Close()
	adm := kadm.NewClient(cl)
	return paced(ctx, 500*time.Millisecond, func() error {
		name := fmt.Sprint("passing-", l.topics.Load())
		if err := decided(ctx, kerr.TopicAlreadyExists, func() error {
			made, err := adm.CreateTopic(ctx, 3, 3, nil, name)
			return errors.Join(err, made.Err)
		}); err != nil {
			return err
		}
		for range 10 {
			if err := cl.ProduceSync(ctx, &kgo.Record{Topic: name, Value: []byte("v")}).FirstErr(); err != nil {
				return err
			}
		}
		if err := decided(ctx, kerr.UnknownTopicOrPartition, func() error {
			gone, err := adm.DeleteTopic(ctx, name)
			return errors.Join(err, gone.Err)
		}); err != nil {
			return err
		}
		cl.PurgeTopicsFromClient(name)
		l.topics.Add(1)
		return nil
	})
}

// readAgain reads some of the start of the topic, from objects.
func (l *load) readAgain(ctx context.Context) error {
	return paced(ctx, 2*time.Second, func() error {
		cl, err := l.client(kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.FetchMaxBytes(4<<20))
		if err != nil {
			return err
		}
		defer cl.Close()
		for n := 0; n < 2000 && ctx.Err() == nil; {
			fs := cl.PollFetches(ctx)
			if err := fs.Err(); err != nil {
				return err
			}
			n += fs.NumRecords()
		}
		return nil
	})
}

// join is a member that leaves its group after a while and comes back as another.
func (l *load) join(ctx context.Context, stay time.Duration) error {
	for ctx.Err() == nil {
		if err := l.member(ctx, stay); err != nil {
			return err
		}
	}
	return nil
}

func (l *load) member(ctx context.Context, stay time.Duration) error {
	cl, err := l.client(kgo.ConsumerGroup("g"), kgo.ConsumeTopics(topic), kgo.OnPartitionsAssigned(func(context.Context, *kgo.Client, map[string][]int32) { l.rebalances.Add(1) }))
	if err != nil {
		return err
	}
	defer cl.Close()
	l.connections.Add(1)
	limit, cancel := context.WithTimeout(ctx, stay)
	defer cancel()
	for limit.Err() == nil {
		if err := cl.PollFetches(limit).Err(); err != nil && limit.Err() == nil && !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	}
	return nil
}
