package tiering

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/mem"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a catalog and a hot log of one shard, in memory. It judges as the real one does, and asserts what must hold at each step.
type fake struct {
	t      *testing.T
	bucket *mem.Bucket // as the store has it, without faults

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at every append
	parts   map[record.TopicPartition]*fakePart
	objects map[segment.Number]*segment.Object
	number  segment.Number
	commits int
	// distrust: nothing may expire. ahead is how far the shard's clock is before this node's.
	distrust bool
	ahead    time.Duration
	// pinned is what Pinned says; rehomed notes what was written again.
	pinned  int64
	rehomed []record.Offset
	order   []segment.Number // of commits
	// repair mends a damaged batch; nil: nobody has it whole.
	repair func(tp record.TopicPartition, at record.Offset)
	// fail is asked before (and, with the name + " done", after) each change; its error is returned.
	fail func(step string) error
}

type fakePart struct {
	batches               []record.Batch // all of them, in order: the truth
	logStart, sealed, end record.Offset
	runs                  []segment.Run
	retentionMs           int64
	class                 segment.Class
}

func newFake(t *testing.T) *fake {
	return &fake{t: t, bucket: mem.New(), changed: make(chan struct{}), parts: map[record.TopicPartition]*fakePart{}, objects: map[segment.Number]*segment.Object{},
		fail: func(string) error { return nil }}
}

// sleep lets time pass in a synctest bubble, and then everything happen that is due.
func sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

const shard = record.ShardID(1)

func partition(n byte) record.TopicPartition {
	return record.TopicPartition{Topic: record.TopicID{n}, Partition: int32(n)}
}

func (f *fake) part(tp record.TopicPartition) *fakePart {
	p := f.parts[tp]
	if p == nil {
		p = &fakePart{retentionMs: -1}
		f.parts[tp] = p
	}
	return p
}

// retain sets a partition's retention.
func (f *fake) retain(tp record.TopicPartition, ms int64, class segment.Class) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.part(tp).retentionMs, f.part(tp).class = ms, class
}

// appendAt adds a batch with a record for each timestamp.
func (f *fake) appendAt(tp record.TopicPartition, times ...record.Timestamp) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.part(tp)
	w := record.NewBuilder(record.CodecNone)
	for _, at := range times {
		w.Add(at, nil, []byte("v"))
	}
	b, err := w.Batch()
	if err != nil {
		f.t.Fatal(err)
	}
	record.PatchHeader(b, p.end, 1)
	p.batches = append(p.batches, b)
	p.end += record.Offset(len(times))
	close(f.changed)
	f.changed = make(chan struct{})
}

// append adds batches of about size bytes, two records each.
func (f *fake) append(tp record.TopicPartition, batches, size int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.part(tp)
	for range batches {
		w := record.NewBuilder(record.CodecNone)
		now := record.Timestamp(time.Now().UnixMilli())
		w.Add(now, nil, fmt.Appendf(nil, "%d", p.end))
		w.Add(now, nil, bytes.Repeat([]byte{byte(p.end)}, size))
		b, err := w.Batch()
		if err != nil {
			f.t.Fatal(err)
		}
		record.PatchHeader(b, p.end, 1)
		p.batches = append(p.batches, b)
		p.end += 2
	}
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fake) step(name string) error {
	f.mu.Lock()
	fail := f.fail
	f.mu.Unlock()
	return fail(name)
}

func (f *fake) failing(fail func(string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = fail
}

func (p *fakePart) hot() (out []record.Batch) {
	for _, b := range p.batches {
		if b.LastOffset() >= p.sealed { // the log start may lie within a batch
			out = append(out, b)
		}
	}
	return out
}

func sizeOf(bs []record.Batch) (n int64) {
	for _, b := range bs {
		n += int64(len(b))
	}
	return n
}

func (f *fake) Bounds(tp record.TopicPartition) (Bounds, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.parts[tp]
	if p == nil {
		return Bounds{}, false
	}
	return Bounds{LogStart: p.logStart, SealedEnd: p.sealed, HighWatermark: p.end, LastStable: p.end}, true
}

func (f *fake) ShardOf(record.TopicPartition) (record.ShardID, bool) { return shard, true }

func (f *fake) Runs(tp record.TopicPartition, from record.Offset, most int) (out []RunRef) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.part(tp).runs {
		if r.EndOffset >= from && len(out) < most {
			out = append(out, RunRef{r, *f.objects[r.Object]})
		}
	}
	return out
}

func (f *fake) Clock(record.ShardID) (record.Timestamp, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return record.Timestamp(time.Now().Add(f.ahead).UnixMilli()), !f.distrust
}

// distrusted says whether the shard's clock is not trusted.
func (f *fake) distrusted(d bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.distrust = d
}

func (f *fake) HotRange(tp record.TopicPartition) (HotRange, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.hotRange(tp)
}

func (f *fake) hotRange(tp record.TopicPartition) (HotRange, bool) {
	p := f.part(tp)
	hot := p.hot()
	if len(hot) == 0 {
		return HotRange{}, false
	}
	return HotRange{TP: tp, Start: p.sealed, End: p.end - 1, Bytes: sizeOf(hot), Class: p.class, Epochs: []segment.EpochStart{{Epoch: 1}}}, true
}

func (f *fake) Pinned(record.ShardID) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pinned
}

func (f *fake) HotBytes(record.ShardID) (n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.parts {
		n += sizeOf(p.hot())
	}
	return n
}

func (f *fake) WaitHot(ctx context.Context, s record.ShardID, n int64, until time.Time) error {
	t := time.NewTimer(time.Until(until))
	defer t.Stop()
	for {
		f.mu.Lock()
		changed := f.changed
		f.mu.Unlock()
		if f.HotBytes(s) >= n {
			return nil
		}
		select {
		case <-changed:
		case <-t.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (f *fake) sorted() []record.TopicPartition {
	return slices.SortedFunc(maps.Keys(f.parts), func(a, b record.TopicPartition) int { return cmp.Compare(a.Partition, b.Partition) })
}

func (f *fake) BeginRound(context.Context, record.ShardID) (out []HotRange, err error) {
	if err := f.step("round"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, tp := range f.sorted() {
		if r, ok := f.hotRange(tp); ok {
			out = append(out, r)
		}
	}
	return out, nil
}

func (f *fake) Batches(_ context.Context, _ record.ShardID, r HotRange, most int64) (out []HotBatch, err error) {
	if err := f.step("batches"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, b := range f.part(r.TP).batches {
		if b.LastOffset() < r.Start || b.LastOffset() > r.End || len(out) > 0 && most < int64(len(b)) {
			continue
		}
		most -= int64(len(b))
		h := HotBatch{Batch: segment.Batch{Size: int32(len(b))}, Index: uint64(r.TP.Partition), Pos: int64(i)}
		copy(h.Header[:], b)
		out = append(out, h)
	}
	return out, nil
}

func (f *fake) Payload(record.ShardID) PayloadSource { return fakePayload{f} }

type fakePayload struct{ f *fake }

func (p fakePayload) ReadBody(b *HotBatch, to []byte) error {
	if err := p.f.step("body"); err != nil {
		return err
	}
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	copy(to, p.f.part(partition(byte(b.Index))).batches[b.Pos][record.HeaderBytes:])
	return nil
}

func (fakePayload) Close() {}

func (f *fake) Prepare(_ context.Context, _ record.ShardID, p segment.Plan, ttl time.Duration) (segment.Object, error) {
	if err := f.step("prepare"); err != nil {
		return segment.Object{}, err
	}
	f.mu.Lock()
	f.number++
	now := record.Timestamp(time.Now().UnixMilli())
	o := &segment.Object{Shard: shard, Number: f.number, Plan: p, Term: 1, State: segment.Prepared, Since: now, ExpiresAt: now + record.Timestamp(ttl.Milliseconds())}
	f.objects[o.Number] = o
	out := *o
	f.mu.Unlock()
	return out, f.step("prepare done")
}

// Commit asserts that the object is in the bucket, whole, before anything refers to it.
func (f *fake) Commit(ctx context.Context, c segment.Object, runs []segment.PartitionRun) ([]Verdict, error) {
	if err := f.step("commit"); err != nil {
		return nil, err
	}
	info, err := f.bucket.Head(ctx, c.Key())
	if err != nil || info.Size != c.Size || *info.CRC32C != c.CRC32C {
		f.t.Errorf("commit of object %d, which the bucket has as %+v (%v)", c.Number, info, err)
	}
	f.mu.Lock()
	o := f.objects[c.Number]
	verdicts := make([]Verdict, len(runs))
	if o == nil || o.State == segment.Tombstoned {
		f.mu.Unlock()
		return verdicts, errors.New("stale")
	}
	repeated := o.State == segment.Committed
	*o = c
	o.State, o.Since = segment.Committed, record.Timestamp(time.Now().UnixMilli())
	for i, r := range runs {
		p := f.part(r.TP)
		switch {
		case repeated:
			verdicts[i] = Accepted
		case r.StartOffset <= p.sealed && r.EndOffset >= p.sealed && r.EndOffset < p.end:
			if verdicts[i] = Accepted; r.StartOffset < p.sealed {
				verdicts[i] = Trimmed
			}
			r.Run.StartOffset, r.Run.Object = p.sealed, c.Number
			p.runs, p.sealed = append(p.runs, r.Run), r.EndOffset+1
			o.LiveRuns++
		}
	}
	if o.LiveRuns = max(o.LiveRuns, 0); o.LiveRuns == 0 && !repeated {
		o.State = segment.Tombstoned
	}
	f.commits++
	f.order = append(f.order, c.Number)
	f.mu.Unlock()
	if err := f.step("commit done"); err != nil {
		return nil, err
	}
	return verdicts, nil
}

// Rehome notes the last offset of each batch.
func (f *fake) Rehome(_ context.Context, _ record.ShardID, _ record.TopicPartition, batches []HotBatch) error {
	if err := f.step("rehome"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range batches {
		f.rehomed = append(f.rehomed, record.Batch(batches[i].Header[:]).LastOffset())
	}
	f.pinned = 0
	return nil
}

func (f *fake) Repair(_ context.Context, _ record.ShardID, tp record.TopicPartition, at record.Offset) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.repair == nil {
		return errors.New("nobody has it whole")
	}
	f.repair(tp, at)
	return nil
}

func (f *fake) AdvanceLogStart(_ context.Context, tp record.TopicPartition, to record.Offset) error {
	if err := f.step("advance"); err != nil {
		return err
	}
	f.advance(tp, to)
	return f.step("advance done")
}

func (f *fake) advance(tp record.TopicPartition, to record.Offset) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.part(tp)
	p.logStart, p.sealed = to, max(p.sealed, to)
	for len(p.runs) > 0 && p.runs[0].EndOffset < to {
		o := f.objects[p.runs[0].Object]
		if o.LiveRuns--; o.LiveRuns == 0 {
			o.State, o.Since = segment.Tombstoned, record.Timestamp(time.Now().UnixMilli())
		}
		p.runs = p.runs[1:]
	}
}

func (f *fake) Partitions(record.ShardID) (out []PartitionStatus) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, tp := range f.sorted() {
		p := f.parts[tp]
		s := PartitionStatus{TP: tp, RetentionMs: p.retentionMs, RetentionBytes: -1, Class: p.class, Bounds: Bounds{p.logStart, p.sealed, p.end, p.end}, HotBytes: sizeOf(p.hot())}
		for _, r := range p.runs {
			s.SealedBytes += r.SizeBytes
		}
		if n := len(p.batches); n > 0 {
			s.MaxTimestamp = p.batches[n-1].MaxTimestamp()
		}
		out = append(out, s)
	}
	return out
}

func (f *fake) Sweep(context.Context, record.ShardID) error {
	if err := f.step("sweep"); err != nil {
		return err
	}
	f.sweep()
	return f.step("sweep done")
}

func (f *fake) sweep() {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := record.Timestamp(time.Now().UnixMilli())
	for _, o := range f.objects {
		if o.State == segment.Prepared && o.ExpiresAt < now {
			o.State, o.Since = segment.Tombstoned, now
		}
	}
}

func (f *fake) Doomed(record.ShardID) (out []segment.Object) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for n := range f.number {
		if o := f.objects[n+1]; o != nil && o.State == segment.Tombstoned {
			out = append(out, *o)
		}
	}
	return out
}

func (f *fake) Forget(_ context.Context, _ record.ShardID, numbers []segment.Number) error {
	if err := f.step("forget"); err != nil {
		return err
	}
	f.mu.Lock()
	for _, n := range numbers {
		delete(f.objects, n)
	}
	f.mu.Unlock()
	return f.step("forget done")
}

func (f *fake) ClusterUUID() [16]byte { return [16]byte{1} }

// ReadHot implements HotLog.
func (f *fake) ReadHot(_ context.Context, tp record.TopicPartition, from record.Offset, l Limits) (Result, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.part(tp)
	if from < p.sealed {
		return Result{}, ErrNotLocal
	}
	res := Result{Next: from}
	for _, b := range p.hot() {
		if b.LastOffset() < from || res.Bytes > 0 && res.Bytes+len(b) > l.MaxBytes {
			continue
		}
		res.Buffers, res.Bytes, res.Next = append(res.Buffers, b), res.Bytes+len(b), b.LastOffset()+1
	}
	return res, nil
}

// rig is a node's tiering over a fake.
type rig struct {
	*fake
	fault  *objstore.Fault
	tier   *Tiering
	reader *Reader
	stop   func()
}

func newRig(t *testing.T, f *fake, change func(*Config)) *rig {
	return newRigOver(t, f, func(b *objstore.Fault) objstore.Bucket { return b }, change)
}

// newRigOver is newRig with something between the tiering and the bucket that fails.
func newRigOver(t *testing.T, f *fake, over func(*objstore.Fault) objstore.Bucket, change func(*Config)) *rig {
	r := &rig{fake: f, fault: objstore.NewFault(f.bucket, 1)}
	cfg := Config{SealBytes: 1 << 20}
	if change != nil {
		change(&cfg)
	}
	r.tier = New(cfg, f, over(r.fault))
	r.reader = NewReader(r.tier, f)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { r.tier.Lead(ctx, shard) })
	r.stop = sync.OnceFunc(func() { cancel(); wg.Wait(); r.reader.Close() })
	t.Cleanup(r.stop)
	return r
}

// read reads a partition from its log start to its end, through all tiers, and compares with what was appended.
func (r *rig) check(t *testing.T, tp record.TopicPartition) {
	t.Helper()
	b, _ := r.Bounds(tp)
	var got []byte
	for at := b.LogStart; at < b.HighWatermark; {
		res, err := r.reader.Read(t.Context(), tp, at, Limits{MaxBytes: 1 << 20, AtLeastOne: true, UpTo: b.HighWatermark})
		if err != nil || res.Next == at {
			t.Fatalf("reading at %d of %d: next %d, %v", at, b.HighWatermark, res.Next, err)
		}
		got, at = append(got, bytes.Join(res.Buffers, nil)...), res.Next
	}
	var want []byte
	r.mu.Lock()
	for _, x := range r.part(tp).batches {
		if x.LastOffset() >= b.LogStart {
			want = append(want, x...)
		}
	}
	r.mu.Unlock()
	if !bytes.Equal(got, want) {
		t.Errorf("partition %d: %d bytes read, %d are right", tp.Partition, len(got), len(want))
	}
}

// keys are the objects in the bucket.
func (f *fake) keys() (out []string) {
	for i, err := range f.bucket.List(f.t.Context(), "", "") {
		if err != nil {
			f.t.Fatal(err)
		}
		out = append(out, i.Key)
	}
	return out
}

// live are the keys of the objects that runs refer to.
func (f *fake) live() (out []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, o := range f.objects {
		if o.State == segment.Committed {
			out = append(out, o.Key())
		}
	}
	slices.Sort(out)
	return out
}
