// Command bench is the load of the comparison with Apache Kafka: the same client, records and settings against any broker. It prints one line of key=value pairs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/estran/estran/localstack"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

type options struct {
	broker, topic, dir  string
	partitions, rf      int
	count, requests     int
	size                int
	megabytes           int64
	clients             int
	rate                float64
	linger, warm, limit time.Duration
}

func main() {
	var o options
	if len(os.Args) < 2 {
		fail(errors.New("usage: bench produce|consume|first|topics|many|minio [flags]"))
	}
	fs := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	fs.StringVar(&o.broker, "b", "127.0.0.1:9092", "brokers, separated by commas")
	fs.StringVar(&o.topic, "topic", "bench", "topic; it is created if it does not exist")
	fs.IntVar(&o.partitions, "partitions", 12, "partitions of a new topic")
	fs.IntVar(&o.rf, "rf", 1, "replication factor of a new topic")
	fs.IntVar(&o.count, "count", 1000, "topics to create")
	fs.IntVar(&o.requests, "requests", 1, "CreateTopics requests that `many` divides them among")
	fs.IntVar(&o.size, "size", 1024, "bytes of a record's value, random")
	fs.Int64Var(&o.megabytes, "mb", 2048, "megabytes (10^6) to move")
	fs.IntVar(&o.clients, "clients", 1, "clients")
	fs.Float64Var(&o.rate, "rate", 0, "MB/s of an open loop; 0 = as fast as it goes")
	fs.DurationVar(&o.linger, "linger", 0, "producer linger")
	fs.DurationVar(&o.warm, "warm", 0, "time that is not counted")
	fs.StringVar(&o.dir, "dir", "", "directory of MinIO's data")
	fs.DurationVar(&o.limit, "limit", 5*time.Minute, "give up after")
	if err := fs.Parse(os.Args[2:]); err != nil {
		fail(err)
	}
	if os.Args[1] == "minio" {
		if err := minio(o.dir); err != nil {
			fail(err)
		}
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), o.limit)
	defer cancel()
	var err error
	switch os.Args[1] {
	case "produce":
		err = produce(ctx, o)
	case "consume":
		err = consume(ctx, o)
	case "first":
		err = first(ctx, o)
	case "topics":
		err = topics(ctx, o)
	case "many":
		err = many(ctx, o)
	default:
		err = fmt.Errorf("unknown command %q", os.Args[1])
	}
	if err != nil {
		fail(err)
	}
}

func (o *options) seeds() kgo.Opt { return kgo.SeedBrokers(strings.Split(o.broker, ",")...) }

func fail(err error) {
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(1)
}

func ensureTopic(ctx context.Context, o options) error {
	cl, err := kgo.NewClient(o.seeds())
	if err != nil {
		return err
	}
	defer cl.Close()
	adm := kadm.NewClient(cl)
	if t, err := adm.ListTopics(ctx, o.topic); err == nil && t.Has(o.topic) {
		return nil
	}
	r, err := adm.CreateTopic(ctx, int32(o.partitions), int16(o.rf), nil, o.topic)
	if err != nil {
		return err
	}
	return r.Err
}

// payloads are random: a repeated one would measure somebody's compression.
func payloads(size int) [][]byte {
	rng := rand.New(rand.NewPCG(1, 2))
	out := make([][]byte, 4096)
	for i := range out {
		out[i] = make([]byte, size)
		for j := range out[i] {
			out[i][j] = byte(rng.Uint32())
		}
	}
	return out
}

// produce sends with acks=all and idempotence and prints throughput and the latency from Produce to acknowledgement.
func produce(ctx context.Context, o options) error {
	if err := ensureTopic(ctx, o); err != nil {
		return err
	}
	values := payloads(o.size)
	total := o.megabytes * 1_000_000 / int64(o.size)
	var next, failed, counted atomic.Int64
	lat := make([][]time.Duration, o.clients)
	begin := time.Now()
	warmUntil := begin.Add(o.warm)
	var wg sync.WaitGroup
	for c := range o.clients {
		cl, err := kgo.NewClient(o.seeds(), kgo.DefaultProduceTopic(o.topic), kgo.ProducerLinger(o.linger), kgo.ProducerBatchCompression(kgo.NoCompression()),
			kgo.MaxBufferedRecords(20_000), kgo.RecordPartitioner(kgo.UniformBytesPartitioner(64<<10, true, false, nil)))
		if err != nil {
			return err
		}
		wg.Go(func() {
			defer cl.Close()
			var mu sync.Mutex
			for i := next.Add(1); i <= total && ctx.Err() == nil; i = next.Add(1) {
				sent := time.Now()
				if o.rate > 0 { // the time at which the record is due, so that a stall counts for all that wait
					sent = begin.Add(time.Duration(float64(i) * float64(o.size) / o.rate * 1000))
					time.Sleep(time.Until(sent))
				}
				cl.Produce(ctx, &kgo.Record{Value: values[i%int64(len(values))]}, func(_ *kgo.Record, err error) {
					if err != nil {
						failed.Add(1)
						return
					}
					if now := time.Now(); now.After(warmUntil) {
						counted.Add(1)
						if i%16 == 0 {
							mu.Lock()
							lat[c] = append(lat[c], now.Sub(sent))
							mu.Unlock()
						}
					}
				})
			}
			if err := cl.Flush(ctx); err != nil {
				failed.Add(1)
			}
		})
	}
	wg.Wait()
	report("produce", o, counted.Load()*int64(o.size), time.Since(warmUntil), slices.Concat(lat...))
	if n := failed.Load(); n > 0 {
		return fmt.Errorf("%d records failed", n)
	}
	return nil
}

func report(what string, o options, bytes int64, took time.Duration, lat []time.Duration) {
	slices.Sort(lat)
	q := func(p float64) float64 {
		if len(lat) == 0 {
			return 0
		}
		return float64(lat[min(len(lat)-1, int(p*float64(len(lat))))].Microseconds()) / 1000
	}
	fmt.Printf("%s size=%d partitions=%d clients=%d rate=%g linger=%s MB=%d MB/s=%.1f p50_ms=%.2f p99_ms=%.2f p999_ms=%.2f max_ms=%.2f\n", what, o.size, o.partitions,
		o.clients, o.rate, o.linger, bytes/1_000_000, float64(bytes)/1e6/took.Seconds(), q(.5), q(.99), q(.999), q(1))
}

// consume reads the topic from the start with `clients` consumers, partitions divided among them, and checks that offsets have no gap.
func consume(ctx context.Context, o options) error {
	ends, err := endOffsets(ctx, o)
	if err != nil {
		return err
	}
	var bytes atomic.Int64
	var bad atomic.Int64
	begin := time.Now()
	var wg sync.WaitGroup
	for c := range o.clients {
		assign, left := map[int32]kgo.Offset{}, map[int32]int64{}
		for p, r := range ends {
			if int(p)%o.clients == c && r[1] > r[0] {
				assign[p], left[p] = kgo.NewOffset().At(r[0]), r[1]
			}
		}
		if len(assign) == 0 {
			continue
		}
		cl, err := kgo.NewClient(o.seeds(), kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{o.topic: assign}), kgo.FetchMaxBytes(50<<20), kgo.FetchMaxPartitionBytes(4<<20))
		if err != nil {
			return err
		}
		wg.Go(func() {
			defer cl.Close()
			next := map[int32]int64{}
			for p, r := range ends {
				next[p] = r[0]
			}
			for len(left) > 0 && ctx.Err() == nil {
				fs := cl.PollFetches(ctx)
				fs.EachRecord(func(r *kgo.Record) {
					if r.Offset != next[r.Partition] {
						bad.Add(1)
					}
					next[r.Partition] = r.Offset + 1
					bytes.Add(int64(len(r.Value)))
					if r.Offset+1 >= left[r.Partition] {
						delete(left, r.Partition)
					}
				})
			}
		})
	}
	wg.Wait()
	report("consume", o, bytes.Load(), time.Since(begin), nil)
	if bad.Load() > 0 || ctx.Err() != nil {
		return fmt.Errorf("%d gaps, %v", bad.Load(), ctx.Err())
	}
	return nil
}

func endOffsets(ctx context.Context, o options) (map[int32][2]int64, error) {
	cl, err := kgo.NewClient(o.seeds())
	if err != nil {
		return nil, err
	}
	defer cl.Close()
	adm := kadm.NewClient(cl)
	starts, err := adm.ListStartOffsets(ctx, o.topic)
	if err != nil {
		return nil, err
	}
	ends, err := adm.ListEndOffsets(ctx, o.topic)
	if err != nil {
		return nil, err
	}
	out := map[int32][2]int64{}
	ends.Each(func(e kadm.ListedOffset) {
		s, _ := starts.Lookup(o.topic, e.Partition)
		out[e.Partition] = [2]int64{s.Offset, e.Offset}
	})
	return out, nil
}

// first waits for the first acknowledged record of a broker that is being started.
func first(ctx context.Context, o options) error {
	begin := time.Now()
	for ctx.Err() == nil {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := one(try, o)
		cancel()
		if err == nil {
			fmt.Printf("first ms=%d\n", time.Since(begin).Milliseconds())
			return nil
		}
		time.Sleep(2 * time.Millisecond)
	}
	return ctx.Err()
}

func one(ctx context.Context, o options) error {
	if err := ensureTopic(ctx, o); err != nil {
		return err
	}
	cl, err := kgo.NewClient(o.seeds(), kgo.DefaultProduceTopic(o.topic))
	if err != nil {
		return err
	}
	defer cl.Close()
	return cl.ProduceSync(ctx, &kgo.Record{Value: []byte("first")}).FirstErr()
}

// minio runs MinIO until it is told to end, and prints what a shell needs to use it.
func minio(dir string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	s, err := localstack.StartMinIO(ctx, dir, false)
	if err != nil {
		return err
	}
	fmt.Printf("STORE_URL='%s'\n%s\n", s.URL("bench"), strings.Join(s.Env(), "\n"))
	<-ctx.Done()
	return s.Kill()
}
