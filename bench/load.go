package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// load is what clients do in a run, the same to every system.
type load struct {
	partitions int // 0 = 12
	size       int // bytes of a record, its key of 8 among them; 0 = 1,024
	producers  int // 0 = 1
	consumers  int
	rate       float64 // MB/s of an open loop; 0 = as fast as it goes
	linger     time.Duration
	codec      string // none, lz4 or zstd
	letters    int    // of the values' alphabet; 0 = 256, which nothing compresses
	one        bool   // a producer has one record under way
	tails      int    // consumers that each follow everything while it is produced
	sealed     bool   // what is read has been sealed
	cold       bool   // and the nodes have been started again since, so that they do not know it as their latest
	spread     bool   // each record goes to the next partition
}

// job is a load on a topic.
type job struct {
	load
	seeds []string
	topic string
	rf    int
	total int64 // records; they end earlier after `during`, if that is not 0
	// during is how long records are sent.
	during time.Duration
	pool   pool
	begin  atomic.Int64 // of the sending, in ns since 1970
	// following are the consumers that have to get a first record before it begins.
	following sync.WaitGroup
	wire      wire
}

// pool are the values of records, random: a repeated one would measure somebody's compression. Record i has the value that is at(i).
type pool struct {
	values [][]byte
	sums   []uint32
}

const (
	poolSize  = 4096
	poolBytes = 64 << 20 // fewer values if they are large
	keySize   = 8
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func newPool(size, letters int) (p pool) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range max(1, min(poolSize, poolBytes/size)) {
		v := make([]byte, max(1, size-keySize))
		for j := range v {
			v[j] = byte(rng.IntN(letters))
		}
		p.values, p.sums = append(p.values, v), append(p.sums, crc32.Checksum(v, castagnoli))
	}
	return p
}

func (p pool) at(number int64) int64 { return number % int64(len(p.values)) }

// A record's key is its producer and its number, which counts from 1 over all producers of a job.
const numberBits = 40

func id(producer int, number int64) uint64 { return uint64(producer)<<numberBits | uint64(number) }

// wire counts what a job's clients send and get. It is a set of franz-go's hooks.
type wire struct{ sent, got, raw, packed atomic.Int64 }

func (w *wire) OnBrokerWrite(_ kgo.BrokerMetadata, _ int16, n int, _, _ time.Duration, _ error) {
	w.sent.Add(int64(n))
}

func (w *wire) OnBrokerRead(_ kgo.BrokerMetadata, _ int16, n int, _, _ time.Duration, _ error) {
	w.got.Add(int64(n))
}

func (w *wire) OnProduceBatchWritten(_ kgo.BrokerMetadata, _ string, _ int32, m kgo.ProduceBatchMetrics) {
	w.raw.Add(int64(m.UncompressedBytes))
	w.packed.Add(int64(m.CompressedBytes))
}

func (j *job) client(opts ...kgo.Opt) (*kgo.Client, error) {
	return kgo.NewClient(append(opts, kgo.SeedBrokers(j.seeds...), kgo.WithHooks(&j.wire))...)
}

func (j *job) producer() (*kgo.Client, error) {
	codec := map[string]kgo.CompressionCodec{"": kgo.NoCompression(), "lz4": kgo.Lz4Compression(), "zstd": kgo.ZstdCompression()}[j.codec]
	partitioner := kgo.UniformBytesPartitioner(64<<10, true, false, nil)
	if j.spread {
		partitioner = kgo.RoundRobinPartitioner()
	}
	return j.client(kgo.DefaultProduceTopic(j.topic), kgo.ProducerLinger(j.linger), kgo.ProducerBatchCompression(codec), kgo.MaxBufferedRecords(20_000), kgo.MaxBufferedBytes(32<<20),
		kgo.RecordPartitioner(partitioner))
}

// sent is what a job's producers had acknowledged, with the time from Produce to acknowledgement; in an open loop it counts from when the record was due, so that a stall counts for
// all that wait.
type sent struct {
	records int64
	rate    float64 // MB/s
	lat     []time.Duration
}

// due is when record i of an open loop is to be sent. The first of each producer come before.
func (j *job) due(i int64) time.Time {
	return time.Unix(0, j.begin.Load()).Add(time.Duration(float64(i-int64(j.producers)) * float64(j.size) / j.rate * 1000))
}

func (j *job) record(producer int, number int64) *kgo.Record {
	return &kgo.Record{Key: binary.BigEndian.AppendUint64(nil, id(producer, number)), Value: j.pool.values[j.pool.at(number)]}
}

// every is which part of the latencies is kept.
func (j *job) every() int64 {
	if j.one {
		return 1
	}
	return max(1, min(16, j.total/100_000))
}

// produce sends with acks=all and idempotence. One record that is not acknowledged is an error. Each producer's first record is not measured: with it come connections, metadata and a
// producer ID.
func (j *job) produce(ctx context.Context) (s sent, err error) {
	clients, errs := make([]*kgo.Client, j.producers), make([]error, j.producers)
	var first sync.WaitGroup
	for c := range clients {
		if clients[c], err = j.producer(); err != nil {
			return s, err
		}
		defer clients[c].Close()
		first.Go(func() { errs[c] = clients[c].ProduceSync(ctx, j.record(c, int64(c+1))).FirstErr() })
	}
	first.Wait()
	if err := errors.Join(errs...); err != nil {
		return s, err
	}
	j.following.Wait()
	var next, acked, failed atomic.Int64
	next.Store(int64(j.producers))
	every := j.every()
	lat := make([][]time.Duration, j.producers)
	begin := time.Now()
	j.begin.Store(begin.UnixNano())
	var wg sync.WaitGroup
	for c, cl := range clients {
		wg.Go(func() {
			var mu sync.Mutex
			for i := next.Add(1); i <= j.total && ctx.Err() == nil && (j.during == 0 || time.Since(begin) < j.during); i = next.Add(1) {
				at := time.Now()
				if j.rate > 0 {
					at = j.due(i)
					time.Sleep(time.Until(at))
				}
				var done chan struct{}
				if j.one {
					done = make(chan struct{})
				}
				cl.Produce(ctx, j.record(c, i), func(_ *kgo.Record, err error) {
					if done != nil {
						defer close(done)
					}
					if err != nil {
						failed.Add(1)
						return
					}
					acked.Add(1)
					if i%every == 0 {
						took := time.Since(at)
						mu.Lock()
						lat[c] = append(lat[c], took)
						mu.Unlock()
					}
				})
				if done != nil {
					<-done
				}
			}
			if cl.Flush(ctx) != nil {
				failed.Add(1)
			}
		})
	}
	wg.Wait()
	s = sent{acked.Load() + int64(j.producers), float64(acked.Load()*int64(j.size)) / 1e6 / time.Since(begin).Seconds(), slices.Concat(lat...)}
	if n := failed.Load(); n > 0 {
		return s, fmt.Errorf("%d records were not acknowledged: %w", n, context.Cause(ctx))
	}
	return s, nil
}

// check says whether what is read is what was acknowledged: each record once, its value unharmed, those of a producer in order within a partition, offsets without a gap. franz-go
// checks the CRC of each batch itself.
type check struct {
	pool   pool
	every  int64 // every how many values are compared; 0 = records have no numbers (another program sent them)
	seen   []atomic.Uint64
	places map[int32]*place
	n      atomic.Int64
	bad    atomic.Pointer[error]
}

// place is how far a partition was read.
type place struct {
	next int64
	last map[uint64]int64 // each producer's last number
}

func newCheck(p pool, total, every int64, from map[int32]int64) *check {
	c := &check{pool: p, every: every, seen: make([]atomic.Uint64, total/64+1), places: map[int32]*place{}}
	for p, o := range from {
		c.places[p] = &place{next: o, last: map[uint64]int64{}}
	}
	return c
}

// record takes a record; those of a partition come one after the other.
func (c *check) record(r *kgo.Record) {
	c.n.Add(1)
	p := c.places[r.Partition]
	if r.Offset != p.next {
		c.fail("partition %d: offset %d comes where %d should", r.Partition, r.Offset, p.next)
	}
	p.next = r.Offset + 1
	if c.every == 0 {
		return
	}
	if len(r.Key) != keySize {
		c.fail("partition %d, offset %d: a key of %d bytes", r.Partition, r.Offset, len(r.Key))
		return
	}
	k := binary.BigEndian.Uint64(r.Key)
	who, i := k>>numberBits, int64(k&(1<<numberBits-1))
	switch {
	case i < 1 || i/64 >= int64(len(c.seen)):
		c.fail("partition %d, offset %d: record %d was never sent", r.Partition, r.Offset, i)
	case c.seen[i/64].Or(1<<(i%64))&(1<<(i%64)) != 0:
		c.fail("partition %d, offset %d: record %d is there twice", r.Partition, r.Offset, i)
	case i <= p.last[who]:
		c.fail("partition %d, offset %d: record %d of producer %d comes behind %d", r.Partition, r.Offset, i, who, p.last[who])
	case i%c.every == 0 && crc32.Checksum(r.Value, castagnoli) != c.pool.sums[c.pool.at(i)]:
		c.fail("partition %d, offset %d: the value of record %d was changed", r.Partition, r.Offset, i)
	}
	p.last[who] = i
}

func (c *check) fail(format string, args ...any) {
	err := fmt.Errorf("WRONG: "+format, args...)
	c.bad.CompareAndSwap(nil, &err)
}

// end judges: want records must have come.
func (c *check) end(want int64) error {
	if err := c.bad.Load(); err != nil {
		return *err
	}
	if n := c.n.Load(); n != want {
		return fmt.Errorf("WRONG: %d records were read, %d acknowledged", n, want)
	}
	return nil
}

// admin is a client for what takes its time on clusters with many partitions.
func (j *job) admin() (*kadm.Client, error) {
	cl, err := j.client()
	if err != nil {
		return nil, err
	}
	adm := kadm.NewClient(cl)
	adm.SetTimeoutMillis(60_000)
	return adm, nil
}

// create makes the job's topic.
func (j *job) create(ctx context.Context) error {
	adm, err := j.admin()
	if err != nil {
		return err
	}
	defer adm.Close()
	r, err := adm.CreateTopic(ctx, int32(j.partitions), int16(j.rf), nil, j.topic)
	return errors.Join(err, r.Err)
}

func (j *job) remove(ctx context.Context) error {
	adm, err := j.admin()
	if err != nil {
		return err
	}
	defer adm.Close()
	r, err := adm.DeleteTopic(ctx, j.topic)
	return errors.Join(err, r.Err)
}

// ends are the partitions' ends. A new topic may have no leaders yet: that is asked again.
func (j *job) ends(ctx context.Context) (out map[int32]int64, err error) {
	adm, err := j.admin()
	if err != nil {
		return nil, err
	}
	defer adm.Close()
	var last error
	err = until(ctx, "leaders of all partitions of "+j.topic, func() bool {
		ends, err := adm.ListEndOffsets(ctx, j.topic)
		last = errors.Join(err, ends.Error())
		out = map[int32]int64{}
		ends.Each(func(e kadm.ListedOffset) { out[e.Partition] = e.Offset })
		return last == nil && len(out) == j.partitions
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %d of %d: %w", err, len(out), j.partitions, last)
	}
	return out, nil
}

func (j *job) consumer(from map[int32]int64, mine func(p int32) bool, among int) (*kgo.Client, error) {
	at := map[int32]kgo.Offset{}
	for p, o := range from {
		if mine(p) {
			at[p] = kgo.NewOffset().At(o)
		}
	}
	return j.client(kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{j.topic: at}), kgo.FetchMaxBytes(int32(max(1<<20, 50<<20/among))), kgo.FetchMaxPartitionBytes(4<<20))
}

// read hands what lies in [from, to) to each, partitions divided among consumers, and returns how many bytes that were.
func (j *job) read(ctx context.Context, from, to map[int32]int64, consumers int, each func(*kgo.Record)) (bytes int64, err error) {
	var sum atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, consumers)
	for c := range consumers {
		left := map[int32]int64{}
		for p, end := range to {
			if int(p)%consumers == c && end > from[p] {
				left[p] = end
			}
		}
		if len(left) == 0 {
			continue
		}
		cl, err := j.consumer(from, func(p int32) bool { return left[p] > 0 }, consumers)
		if err != nil {
			return 0, err
		}
		wg.Go(func() {
			defer cl.Close()
			for len(left) > 0 && ctx.Err() == nil {
				n := 0
				fs := cl.PollFetches(ctx)
				if err := fs.Err0(); err != nil {
					errs[c] = err
					return
				}
				fs.EachError(func(_ string, p int32, err error) { errs[c] = fmt.Errorf("partition %d: %w", p, err) })
				fs.EachRecord(func(r *kgo.Record) {
					end, ok := left[r.Partition]
					if !ok {
						return // behind the end
					}
					n += len(r.Key) + len(r.Value)
					each(r)
					if r.Offset+1 >= end {
						delete(left, r.Partition)
					}
				})
				sum.Add(int64(n))
				if errs[c] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return sum.Load(), errors.Join(append(errs, ctx.Err())...)
}

// tail follows all partitions until `total` records have come, and returns how long after they were due.
func (j *job) tail(ctx context.Context, cl *kgo.Client, c *check) (lat []time.Duration, err error) {
	every, there := j.every(), sync.OnceFunc(j.following.Done)
	defer there()
	for c.n.Load() < j.total {
		fs := cl.PollFetches(ctx)
		if err := fs.Err(); err != nil {
			return lat, err
		}
		now := time.Now()
		fs.EachRecord(func(r *kgo.Record) {
			c.record(r)
			if len(r.Key) != keySize {
				return
			}
			if i := int64(binary.BigEndian.Uint64(r.Key) & (1<<numberBits - 1)); i > int64(j.producers) && i%every == 0 {
				lat = append(lat, now.Sub(j.due(i)))
			}
		})
		if c.n.Load() > 0 {
			there()
		}
	}
	return lat, c.end(j.total)
}
