package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"
	"sync/atomic"
	"time"

	"github.com/estran/estran/localstack/check"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	topic      = "faults"
	partitions = 6
	producers  = 2
	readers    = 2
	members    = 2
	inFlight   = 500 // records of one producer
)

// workload is the clients, and the history of what they saw.
type workload struct {
	brokers []string
	begun   time.Time
	value   atomic.Uint64
	acked   [partitions]atomic.Int64
	unacked atomic.Int64
	mu      sync.Mutex
	ops     []check.Op
	wg      sync.WaitGroup
	end     context.CancelFunc
}

func (w *workload) now() int64 { return time.Since(w.begun).Nanoseconds() }

func (w *workload) record(o check.Op) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ops = append(w.ops, o)
}

func (w *workload) count() (n int64) {
	for p := range w.acked {
		n += w.acked[p].Load()
	}
	return n
}

func (w *workload) client(opts ...kgo.Opt) (*kgo.Client, error) {
	return kgo.NewClient(append([]kgo.Opt{kgo.SeedBrokers(w.brokers...), kgo.MetadataMinAge(100 * time.Millisecond), kgo.DialTimeout(time.Second), kgo.RequestTimeoutOverhead(2 * time.Second),
		kgo.ProduceRequestTimeout(2 * time.Second), kgo.UnknownTopicRetries(-1), kgo.RetryBackoffFn(func(int) time.Duration { return 50 * time.Millisecond })}, opts...)...)
}

// start makes the topic and starts all clients.
func start(ctx context.Context, brokers []string) (*workload, error) {
	w := &workload{brokers: brokers, begun: time.Now()}
	cl, err := w.client()
	if err != nil {
		return nil, err
	}
	defer cl.Close()
	made, err := kadm.NewClient(cl).CreateTopic(ctx, partitions, 3, nil, topic)
	if err := errors.Join(err, made.Err); err != nil {
		return nil, err
	}
	ctx, w.end = context.WithCancel(ctx)
	for i := range producers {
		w.run(func(cl *kgo.Client) { w.produce(ctx, cl, int32(i)) }, kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.RecordRetries(1<<30), kgo.MaxBufferedRecords(inFlight), kgo.ProducerLinger(5*time.Millisecond))
	}
	for i := range readers {
		w.run(func(cl *kgo.Client) { w.read(ctx, cl, int32(100+i)) }, kgo.ConsumePartitions(fromStart()), kgo.FetchMaxWait(200*time.Millisecond))
	}
	w.wg.Go(func() { w.readAgain(ctx, 150) })
	for i := range members {
		w.run(func(cl *kgo.Client) { w.join(ctx, cl, int32(200+i)) }, kgo.ConsumerGroup("g"), kgo.ConsumeTopics(topic), kgo.DisableAutoCommit(), kgo.BlockRebalanceOnPoll(),
			kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.FetchMaxWait(200*time.Millisecond), kgo.SessionTimeout(6*time.Second), kgo.HeartbeatInterval(time.Second))
	}
	return w, nil
}

// leader is the broker that leads partition 0.
func (w *workload) leader(ctx context.Context) (leader int32, err error) {
	cl, err := w.client()
	if err != nil {
		return 0, err
	}
	defer cl.Close()
	if !until(func() bool {
		m, e := kadm.NewClient(cl).Metadata(ctx, topic)
		if err = e; err == nil {
			leader = m.Topics[topic].Partitions[0].Leader
		}
		return leader > 0
	}) {
		return 0, fmt.Errorf("%w: nobody leads partition 0: %w", errStuck, err)
	}
	return leader, nil
}

func fromStart() map[string]map[int32]kgo.Offset {
	all := map[int32]kgo.Offset{}
	for p := range int32(partitions) {
		all[p] = kgo.NewOffset().At(0)
	}
	return map[string]map[int32]kgo.Offset{topic: all}
}

func (w *workload) run(f func(*kgo.Client), opts ...kgo.Opt) {
	w.wg.Go(func() {
		cl, err := w.client(opts...)
		if err != nil {
			panic(err) // options that contradict one another
		}
		defer cl.Close()
		f(cl)
	})
}

// encode makes a record's bytes: its number, a checksum, and filling that both determine.
func encode(v uint64) []byte {
	b := make([]byte, 12+v%200)
	binary.BigEndian.PutUint64(b, v)
	for i := 12; i < len(b); i++ {
		b[i] = byte(v >> (i % 8 * 8))
	}
	binary.BigEndian.PutUint32(b[8:], crc32.ChecksumIEEE(b[12:])^uint32(v))
	return b
}

// decode is 0 for bytes that nobody wrote.
func decode(b []byte) uint64 {
	if len(b) >= 12 {
		if v := binary.BigEndian.Uint64(b); string(encode(v)) == string(b) {
			return v
		}
	}
	return 0
}

func (w *workload) produce(ctx context.Context, cl *kgo.Client, process int32) {
	for i := process; ctx.Err() == nil; i++ {
		v, p, began := w.value.Add(1), i%partitions, w.now()
		w.unacked.Add(1)
		b := encode(v)
		cl.Produce(context.Background(), &kgo.Record{Topic: topic, Partition: p, Value: b}, func(r *kgo.Record, err error) {
			w.unacked.Add(-1)
			o := check.Op{Process: process, Kind: check.Send, Outcome: check.OK, Start: began, End: w.now(), Records: []check.Record{{Key: p, Offset: r.Offset, Value: v, Hash: crc32.ChecksumIEEE(b)}}}
			if err != nil {
				o.Outcome, o.Records[0].Offset = check.Info, -1
			} else {
				w.acked[p].Add(1)
			}
			w.record(o)
		})
	}
	flush, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_ = cl.Flush(flush) // what is left is unknown
}

// polled makes an operation of an answer; a record is read where Kafka's client gives it out.
func polled(process int32, began, now int64, fs kgo.Fetches) check.Op {
	o := check.Op{Process: process, Kind: check.Poll, Outcome: check.OK, Start: began, End: now}
	fs.EachPartition(func(p kgo.FetchTopicPartition) {
		if p.Err == nil {
			o.Marks = append(o.Marks, check.Mark{Key: p.Partition, LogStart: p.LogStartOffset, Stable: p.LastStableOffset, High: p.HighWatermark})
		}
		for _, r := range p.Records {
			o.Records = append(o.Records, check.Record{Key: r.Partition, Offset: r.Offset, Value: decode(r.Value), Hash: crc32.ChecksumIEEE(r.Value)})
		}
	})
	return o
}

func (w *workload) read(ctx context.Context, cl *kgo.Client, process int32) {
	w.record(check.Op{Process: process, Kind: check.Assign, Outcome: check.OK, Start: w.now(), End: w.now()})
	for ctx.Err() == nil {
		began := w.now()
		w.record(polled(process, began, w.now(), cl.PollFetches(ctx)))
	}
}

// coldRecords is how much of the start is read again each time: it is sealed by then.
const coldRecords = 2000

// readAgain reads the start of the topic, again and again: from objects, once there are any.
func (w *workload) readAgain(ctx context.Context, process int32) {
	for ctx.Err() == nil {
		cl, err := w.client(kgo.ConsumePartitions(fromStart()), kgo.FetchMaxWait(200*time.Millisecond), kgo.FetchMaxPartitionBytes(64<<10))
		if err != nil {
			panic(err) // options that contradict one another
		}
		w.record(check.Op{Process: process, Kind: check.Assign, Outcome: check.OK, Start: w.now(), End: w.now()})
		for n := 0; n < coldRecords && ctx.Err() == nil; {
			began := w.now()
			fs := cl.PollRecords(ctx, coldRecords)
			w.record(polled(process, began, w.now(), fs))
			n += fs.NumRecords()
		}
		cl.Close()
		select { // one that takes all it can get would take the processors too
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// join reads in the group and commits what it has read, before another may get it.
func (w *workload) join(ctx context.Context, cl *kgo.Client, process int32) {
	w.record(check.Op{Process: process, Kind: check.Subscribe, Outcome: check.OK, Group: 1, Start: w.now(), End: w.now()})
	for ctx.Err() == nil {
		began := w.now()
		fs := cl.PollFetches(ctx)
		w.record(polled(process, began, w.now(), fs))
		o := check.Op{Process: process, Kind: check.Commit, Outcome: check.OK, Group: 1, Start: w.now()}
		for p, at := range cl.UncommittedOffsets()[topic] {
			o.Records = append(o.Records, check.Record{Key: p, Offset: at.Offset})
		}
		limit, cancel := context.WithTimeout(ctx, 3*time.Second)
		if err := cl.CommitUncommittedOffsets(limit); err != nil {
			o.Outcome = check.Info
		}
		cancel()
		if o.End = w.now(); len(o.Records) > 0 {
			w.record(o)
		}
		cl.AllowRebalance()
	}
}

// finish stops the clients and reads everything with a new one, to the end.
func (w *workload) finish(ctx context.Context) ([]check.Op, error) {
	w.end()
	w.wg.Wait()
	cl, err := w.client(kgo.ConsumePartitions(fromStart()))
	if err != nil {
		return nil, err
	}
	defer cl.Close()
	var ends kadm.ListedOffsets
	if !until(func() bool {
		ends, err = kadm.NewClient(cl).ListEndOffsets(ctx, topic)
		err = errors.Join(err, ends.Error())
		return err == nil
	}) {
		return w.ops, fmt.Errorf("the ends after all faults: %w", err)
	}
	next := map[int32]int64{}
	done := func() bool {
		for p := range int32(partitions) {
			if e, _ := ends.Lookup(topic, p); next[p] < e.Offset {
				return false
			}
		}
		return true
	}
	for !done() {
		began := w.now()
		fs := cl.PollFetches(ctx)
		if ctx.Err() != nil {
			return w.ops, fmt.Errorf("reading everything after all faults: %w, at %v", ctx.Err(), next)
		}
		w.record(polled(300, began, w.now(), fs))
		fs.EachRecord(func(r *kgo.Record) { next[r.Partition] = r.Offset + 1 })
	}
	return w.ops, nil
}
