package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/estran/estran/localstack/check"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Two topics: what is in one must stay, the other keeps so little that its start moves all the time.
const (
	kept, expiring = "kept", "expiring"
	partitions     = 9         // of both
	keptPartitions = 6         // the first of them
	expiringBytes  = 128 << 10 // of a partition
)

const (
	producers = 3 // the last gives an answer half a second, and so finds a new leader while the old one still believes
	readers   = 2
	consumers = 2
	inFlight  = 500 // records of one producer
	badMost   = 100 // answers that cannot be read; a client asks again at once
	perMs     = 3   // records of one producer in a ms, at most: more would only make histories long
)

// workload is the clients, and the history of what they saw.
type workload struct {
	brokers []string
	begun   time.Time
	value   atomic.Uint64
	acked   [partitions]atomic.Int64
	next    [partitions]atomic.Int64 // the offset behind the last that was acknowledged
	unacked atomic.Int64
	others  atomic.Int64 // acknowledged to other clients than franz-go
	mu      sync.Mutex
	ops     []check.Op
	asked   []check.Metadata
	bad     []check.Anomaly // answers that cannot be read
	wg      sync.WaitGroup
	ctx     context.Context // of the load
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
		kgo.ProduceRequestTimeout(2 * time.Second), kgo.UnknownTopicRetries(-1),
		kgo.DisableFetchCRCValidation(), // the checker is to see what is served: each record has a checksum of its own
		kgo.RetryBackoffFn(func(int) time.Duration { return 50 * time.Millisecond })}, opts...)...)
}

// start makes the topic and starts all clients.
func start(ctx context.Context, brokers []string, seed uint64) (*workload, error) {
	w := &workload{brokers: brokers, begun: time.Now()}
	cl, err := w.client()
	if err != nil {
		return nil, err
	}
	defer cl.Close()
	limit, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if !until(ctx, func() bool { err = makeTopics(limit, cl); return err == nil }) {
		return nil, fmt.Errorf("%w: making topics: %w", errStuck, err)
	}
	ctx, w.end = context.WithCancel(ctx)
	w.ctx = ctx
	for i := range producers {
		opts := []kgo.Opt{kgo.ProducerBatchCompression([]kgo.CompressionCodec{kgo.NoCompression(), kgo.SnappyCompression()}[i%2]), kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.RecordRetries(1 << 30),
			kgo.MaxBufferedRecords(inFlight), kgo.ProducerLinger(5 * time.Millisecond)}
		if i == producers-1 {
			opts = append(opts, kgo.ProduceRequestTimeout(500*time.Millisecond), kgo.RequestTimeoutOverhead(500*time.Millisecond))
		}
		w.run(func(cl *kgo.Client) { w.produce(ctx, cl, int32(i)) }, opts...)
	}
	for i := range readers {
		w.run(func(cl *kgo.Client) { w.read(ctx, cl, int32(100+i)) }, kgo.ConsumePartitions(fromStart()), kgo.FetchMaxWait(200*time.Millisecond))
	}
	w.wg.Go(func() { w.readAgain(ctx, 10_000, rand.New(rand.NewPCG(seed, 300))) })
	w.wg.Go(func() { w.goOn(ctx, 20_000) })
	for i := range consumers {
		w.wg.Go(func() { w.rejoin(ctx, int32(30_000*(i+1)), rand.New(rand.NewPCG(seed, uint64(100+i)))) })
	}
	w.wg.Go(func() { w.deleteRecords(ctx, rand.New(rand.NewPCG(seed, 200))) })
	for i := range admins {
		w.wg.Go(func() { w.administer(ctx, i, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	w.wg.Go(func() { w.lookUp(ctx, 400) })
	for i := range int32(len(brokers)) {
		w.wg.Go(func() { w.ask(ctx, 600+i, i+1, prompt, rand.New(rand.NewPCG(seed, 400+uint64(i)))) })
		w.wg.Go(func() { w.ask(ctx, 650+i, i+1, late, rand.New(rand.NewPCG(seed, 450+uint64(i)))) })
	}
	return w, nil
}

// makeTopics asks for both at once; what an answer that was lost has made is there.
func makeTopics(ctx context.Context, cl *kgo.Client) error {
	q := kmsg.NewPtrCreateTopicsRequest()
	for _, t := range []struct {
		name       string
		partitions int32
		key, value string
	}{{kept, keptPartitions, "retention.ms", "3600000"}, {expiring, partitions - keptPartitions, "retention.bytes", fmt.Sprint(expiringBytes)}} {
		topic, config := kmsg.NewCreateTopicsRequestTopic(), kmsg.NewCreateTopicsRequestTopicConfig()
		topic.Topic, topic.NumPartitions, topic.ReplicationFactor = t.name, t.partitions, 3
		config.Name, config.Value = t.key, &t.value
		topic.Configs = append(topic.Configs, config)
		q.Topics = append(q.Topics, topic)
	}
	resp, err := q.RequestWith(ctx, cl)
	if err != nil {
		return err
	}
	for _, t := range resp.Topics {
		if err := kerr.ErrorForCode(t.ErrorCode); err != nil && !errors.Is(err, kerr.TopicAlreadyExists) {
			return fmt.Errorf("topic %s: %w", t.Topic, err)
		}
	}
	return nil
}

// leader is the broker that leads partition 0.
func (w *workload) leader(ctx context.Context) (leader int32, err error) {
	cl, err := w.client()
	if err != nil {
		return 0, err
	}
	defer cl.Close()
	if !until(ctx, func() bool {
		m, e := kadm.NewClient(cl).Metadata(ctx, kept)
		if err = e; err == nil {
			leader = m.Topics[kept].Partitions[0].Leader
		}
		return leader > 0
	}) {
		return 0, fmt.Errorf("%w: nobody leads partition 0: %w", errStuck, err)
	}
	return leader, nil
}

func fromStart() map[string]map[int32]kgo.Offset {
	all := map[string]map[int32]kgo.Offset{kept: {}, expiring: {}}
	for key := range int32(partitions) {
		t, p := partitionOf(key)
		all[t][p] = kgo.NewOffset().At(0)
	}
	return all
}

// partitionOf a key of the history, and keyOf a partition.
func partitionOf(key int32) (topic string, partition int32) {
	if key < keptPartitions {
		return kept, key
	}
	return expiring, key - keptPartitions
}

func keyOf(topic string, partition int32) int32 {
	if topic == kept {
		return partition
	}
	return keptPartitions + partition
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
	wait, giveUp := context.WithCancel(context.Background()) // for records that nobody takes there is no room in the client, for ever
	defer giveUp()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(flushTime, giveUp) })()
	pace, sent := time.Now(), 0
	for i := process; ctx.Err() == nil; i++ {
		if sent++; sent == perMs*10 {
			sleep(ctx, time.Until(pace.Add(10*time.Millisecond)))
			pace, sent = time.Now(), 0
		}
		w.lull(ctx)
		v, key, began := w.value.Add(1), i%partitions, w.now()
		topic, p := partitionOf(key)
		w.unacked.Add(1)
		b := encode(v)
		cl.Produce(wait, &kgo.Record{Topic: topic, Partition: p, Value: b}, func(r *kgo.Record, err error) {
			w.unacked.Add(-1)
			o := check.Op{Process: process, Kind: check.Send, Outcome: check.OK, Start: began, End: w.now(), Records: []check.Record{{Key: key, Offset: r.Offset, Value: v, Hash: crc32.ChecksumIEEE(b)}}}
			if err != nil {
				o.Outcome, o.Records[0].Offset = check.Info, -1
			} else {
				w.acknowledge(key, r.Offset)
			}
			w.record(o)
		})
	}
	_ = cl.Flush(wait) // what is left is unknown
}

// Nobody writes at the end of every lullEvery: groups are idle for a moment, with whatever they are at.
const (
	lullEvery = 3 * time.Second
	lullTime  = 400 * time.Millisecond
)

// lull returns when such a moment is over.
func (w *workload) lull(ctx context.Context) {
	if at := time.Since(w.begun) % lullEvery; at > lullEvery-lullTime {
		sleep(ctx, lullEvery-at)
	}
}

// acknowledge counts a record that was acknowledged at an offset.
func (w *workload) acknowledge(key int32, offset int64) {
	w.acked[key].Add(1)
	for next := &w.next[key]; ; {
		if was := next.Load(); was > offset || next.CompareAndSwap(was, offset+1) {
			return
		}
	}
}

// polled notes an answer; a record is read where Kafka's client gives it out.
func (w *workload) polled(process int32, began int64, fs kgo.Fetches) {
	o := check.Op{Process: process, Kind: check.Poll, Outcome: check.OK, Start: began, End: w.now()}
	fs.EachError(func(topic string, partition int32, err error) {
		if unreadable(err) {
			w.mu.Lock()
			defer w.mu.Unlock()
			if len(w.bad) == badMost {
				return
			}
			w.bad = append(w.bad, check.Anomaly{Rule: "unreadable", Text: fmt.Sprintf("client %d: %v", process, err), Key: keyOf(topic, partition)})
		}
	})
	fs.EachPartition(func(p kgo.FetchTopicPartition) {
		if p.Err == nil {
			o.Marks = append(o.Marks, check.Mark{Key: keyOf(p.Topic, p.Partition), LogStart: p.LogStartOffset, Stable: p.LastStableOffset, High: p.HighWatermark})
		}
		for _, r := range p.Records {
			o.Records = append(o.Records, check.Record{Key: keyOf(r.Topic, r.Partition), Offset: r.Offset, Value: decode(r.Value), Hash: crc32.ChecksumIEEE(r.Value)})
		}
	})
	w.record(o)
}

// unreadable tells an answer that makes no sense, or says that records are gone, from those that a client has to expect: refusals, lost connections and lost sessions.
func unreadable(err error) bool {
	var refused *kerr.Error
	var network net.Error
	var session *kgo.ErrGroupSession
	var begun *kgo.ErrFirstReadEOF
	for _, expected := range []error{context.Canceled, context.DeadlineExceeded, kgo.ErrClientClosed, io.EOF, net.ErrClosed} {
		if errors.Is(err, expected) {
			return false
		}
	}
	return !errors.As(err, &refused) && !errors.As(err, &network) && !errors.As(err, &session) && !errors.As(err, &begun)
}

func (w *workload) read(ctx context.Context, cl *kgo.Client, process int32) {
	w.record(check.Op{Process: process, Kind: check.Assign, Outcome: check.OK, Start: w.now(), End: w.now()})
	for ctx.Err() == nil {
		began := w.now()
		w.polled(process, began, cl.PollFetches(ctx))
	}
}

// coldRecords is how much is read from a place each time: it is sealed by then.
const coldRecords = 2000

// readAgain reads anywhere in what was acknowledged, again and again: mostly from objects. Each time it is another client, which has not heard of the last one's leaders.
func (w *workload) readAgain(ctx context.Context, process int32, rng *rand.Rand) {
	for ; ctx.Err() == nil; process++ {
		at := fromStart()
		for p := range int32(keptPartitions) {
			at[kept][p] = kgo.NewOffset().At(rng.Int64N(w.acked[p].Load() + 1))
		}
		cl, err := w.client(kgo.ConsumePartitions(at), kgo.FetchMaxWait(200*time.Millisecond), kgo.FetchMaxPartitionBytes(64<<10))
		if err != nil {
			panic(err) // options that contradict one another
		}
		w.assign(process, at)
		for n := 0; n < coldRecords && ctx.Err() == nil; {
			began := w.now()
			fs := cl.PollRecords(ctx, coldRecords)
			w.polled(process, began, fs)
			n += fs.NumRecords()
		}
		cl.Close()
		sleep(ctx, 100*time.Millisecond) // one that takes all it can get would take the processors too
	}
}

// assign notes where a client begins.
func (w *workload) assign(process int32, at map[string]map[int32]kgo.Offset) {
	o := check.Op{Process: process, Kind: check.Assign, Outcome: check.OK, Start: w.now(), End: w.now()}
	for topic, all := range at {
		for p, from := range all {
			o.Records = append(o.Records, check.Record{Key: keyOf(topic, p), Offset: from.EpochOffset().Offset})
		}
	}
	w.record(o)
}

// goOn reads for a moment and leaves the rest to a new client, which begins where it has stopped, as one does that keeps its own positions. It knows of no leader but what it is told.
func (w *workload) goOn(ctx context.Context, process int32) {
	at := fromStart()
	for ; ctx.Err() == nil; process++ {
		cl, err := w.client(kgo.ConsumePartitions(at), kgo.FetchMaxWait(200*time.Millisecond))
		if err != nil {
			panic(err) // options that contradict one another
		}
		w.assign(process, at)
		limit, cancel := context.WithTimeout(ctx, time.Second)
		for limit.Err() == nil {
			began := w.now()
			fs := cl.PollFetches(limit)
			w.polled(process, began, fs)
			fs.EachRecord(func(r *kgo.Record) { at[r.Topic][r.Partition] = kgo.NewOffset().At(r.Offset + 1) })
		}
		cancel()
		cl.Close()
	}
}

// deleteRecords moves the log starts of what expires, before retention does.
func (w *workload) deleteRecords(ctx context.Context, rng *rand.Rand) {
	cl, err := w.client()
	if err != nil {
		panic(err) // options that contradict one another
	}
	defer cl.Close()
	for ; ctx.Err() == nil; sleep(ctx, 300*time.Millisecond) {
		var o kadm.Offsets
		o.Add(kadm.Offset{Topic: expiring, Partition: int32(rng.IntN(partitions - keptPartitions)), At: -1})
		_, _ = kadm.NewClient(cl).DeleteRecords(ctx, o) // what becomes of it is seen by those who read
	}
}

// rejoin is one member of the group after the other, each for a few seconds.
func (w *workload) rejoin(ctx context.Context, process int32, rng *rand.Rand) {
	for ; ctx.Err() == nil; process++ {
		cl, err := w.client(kgo.ConsumerGroup("g"), kgo.ConsumeTopics(kept, expiring), kgo.DisableAutoCommit(), kgo.BlockRebalanceOnPoll(),
			kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.FetchMaxWait(200*time.Millisecond), kgo.SessionTimeout(6*time.Second), kgo.HeartbeatInterval(time.Second))
		if err != nil {
			panic(err) // options that contradict one another
		}
		limit, cancel := context.WithTimeout(ctx, time.Duration(2000+rng.IntN(6000))*time.Millisecond)
		w.join(limit, cl, process)
		cancel()
		cl.Close()
	}
}

// join reads in the group and commits what it has read, before another may get it.
func (w *workload) join(ctx context.Context, cl *kgo.Client, process int32) {
	w.record(check.Op{Process: process, Kind: check.Subscribe, Outcome: check.OK, Group: 1, Start: w.now(), End: w.now()})
	for ctx.Err() == nil {
		began := w.now()
		fs := cl.PollFetches(ctx)
		w.polled(process, began, fs)
		o := check.Op{Process: process, Kind: check.Commit, Outcome: check.OK, Group: 1, Start: w.now()}
		_, o.Generation = cl.GroupMetadata()
		for topic, all := range cl.UncommittedOffsets() {
			for p, at := range all {
				o.Records = append(o.Records, check.Record{Key: keyOf(topic, p), Offset: at.Offset})
			}
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
	var starts, ends kadm.ListedOffsets
	if !until(ctx, func() bool {
		var err2 error
		starts, err = kadm.NewClient(cl).ListStartOffsets(ctx, kept, expiring)
		ends, err2 = kadm.NewClient(cl).ListEndOffsets(ctx, kept, expiring)
		err = errors.Join(err, err2, starts.Error(), ends.Error())
		return err == nil
	}) {
		return w.ops, fmt.Errorf("the ends after all faults: %w", err)
	}
	next := map[int32]int64{}
	for key := range int32(partitions) { // of one that holds nothing there is nothing to read
		s, _ := starts.Lookup(partitionOf(key))
		next[key] = s.Offset
	}
	done := func() bool {
		for key := range int32(partitions) {
			if e, _ := ends.Lookup(partitionOf(key)); next[key] < e.Offset {
				return false
			}
		}
		return true
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	nothing := time.AfterFunc(patience, stop)
	defer nothing.Stop()
	for !done() {
		began := w.now()
		fs := cl.PollFetches(ctx)
		if ctx.Err() != nil {
			return w.ops, fmt.Errorf("reading everything after all faults, nothing more in %v: %w, at %v", patience, ctx.Err(), next)
		}
		w.polled(300, began, fs)
		if fs.NumRecords() > 0 {
			nothing.Reset(patience)
		}
		fs.EachRecord(func(r *kgo.Record) { next[keyOf(r.Topic, r.Partition)] = r.Offset + 1 })
	}
	return w.ops, nil
}
