package tiering

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/objstore"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// Tiering seals, keeps retention and deletes for the shards that this node leads.
type Tiering struct {
	cfg     Config
	cat     Catalog
	bucket  objstore.Bucket
	m       *metrics
	uploads chan struct{} // one token per upload in flight
	failing atomic.Int32  // uploads that are being repeated
}

// New returns a Tiering over the cluster's part of a bucket.
func New(cfg Config, cat Catalog, bucket objstore.Bucket) *Tiering {
	cfg.defaults()
	return &Tiering{cfg: cfg, cat: cat, bucket: bucket, m: newMetrics(cfg.Registerer), uploads: make(chan struct{}, cfg.UploadConcurrency)}
}

// Degraded reports whether uploads fail at the moment.
func (t *Tiering) Degraded() bool { return t.failing.Load() > 0 }

// Lead does a leader's work for one shard until ctx ends.
func (t *Tiering) Lead(ctx context.Context, s record.ShardID) {
	var wg sync.WaitGroup
	wg.Go(func() { t.sealLoop(ctx, s) })
	wg.Go(func() { t.housekeep(ctx, s) })
	wg.Wait()
}

// sealLoop runs a round whenever the shard has enough to seal or has waited long enough.
func (t *Tiering) sealLoop(ctx context.Context, s record.ShardID) {
	for ctx.Err() == nil {
		if err := t.cat.WaitHot(ctx, s, 1, time.Now().Add(24*time.Hour)); err != nil {
			return
		}
		aged := time.Now().Add(t.cfg.SealAge)
		for ctx.Err() == nil && t.cat.HotBytes(s) > 0 {
			if err := t.cat.WaitHot(ctx, s, t.cfg.SealBytes, aged); err != nil {
				return
			}
			old := !time.Now().Before(aged)
			sealed := t.round(ctx, s, old)
			if old {
				break
			}
			if !sealed { // what is there belongs to small partitions that still wait for their time
				if err := t.cat.WaitHot(ctx, s, t.cat.HotBytes(s)+t.cfg.SealBytes/4, aged); err != nil {
					return
				}
			}
		}
	}
}

// task is an object to be made: ranges of one class.
type task struct {
	class  segment.Class
	own    bool
	ranges []HotRange
}

// round seals what is due; all means everything that is hot. It reports whether anything was.
func (t *Tiering) round(ctx context.Context, s record.ShardID, all bool) bool {
	ranges, err := t.cat.BeginRound(ctx, s)
	if err != nil {
		if ctx.Err() == nil {
			t.cfg.Logger.Warn("cannot begin a seal round", "component", "tier", "shard", s, "err", err)
		}
		return false
	}
	tasks, waiting := t.plan(ranges, all)
	if len(waiting) > 0 && t.cat.Pinned(s) > t.cfg.RehomeBytes {
		t.rehome(ctx, s, waiting)
	}
	var wg sync.WaitGroup
	before := make(chan struct{}) // closed when the task before has been committed
	close(before)
	for _, k := range tasks {
		select {
		case t.uploads <- struct{}{}:
		case <-ctx.Done():
			wg.Wait()
			return false
		}
		after := make(chan struct{})
		prev := before
		wg.Go(func() {
			defer close(after)
			t.seal(ctx, s, k, prev, func() { <-t.uploads })
		})
		before = after
	}
	wg.Wait()
	return len(tasks) > 0
}

// plan divides what is hot into objects: a large partition has its own, all others of one class share. waiting is what is left for later.
func (t *Tiering) plan(ranges []HotRange, all bool) (tasks []task, waiting []HotRange) {
	shared := map[segment.Class][]HotRange{}
	var classes []segment.Class
	total := map[segment.Class]int64{}
	for _, r := range ranges {
		if r.Bytes >= t.cfg.SealBytes {
			tasks = append(tasks, task{r.Class, true, []HotRange{r}})
			continue
		}
		if shared[r.Class] == nil {
			classes = append(classes, r.Class)
		}
		shared[r.Class] = append(shared[r.Class], r)
		total[r.Class] += r.Bytes
	}
	for _, c := range classes {
		if !all && total[c] < t.cfg.SealBytes {
			waiting = append(waiting, shared[c]...)
			continue
		}
		k, size := task{class: c}, int64(0)
		for _, r := range shared[c] {
			if size > 0 && size+r.Bytes > 2*t.cfg.SealBytes {
				tasks = append(tasks, k)
				k, size = task{class: c}, 0
			}
			k.ranges, size = append(k.ranges, r), size+r.Bytes
		}
		tasks = append(tasks, k)
	}
	return tasks, waiting
}

// seal makes and commits one task's objects; a large partition takes several. done is called when nothing is uploaded any more.
func (t *Tiering) seal(ctx context.Context, s record.ShardID, k task, before <-chan struct{}, done func()) {
	defer done()
	pause := t.cfg.RetryFirst
	failing := false
	defer func() {
		if failing {
			t.m.storeDown.Set(float64(t.failing.Add(-1)))
		}
	}()
	for len(k.ranges) > 0 && ctx.Err() == nil {
		up, rest, err := t.upload(ctx, s, k)
		if err == nil && up != nil {
			select {
			case <-before:
			case <-ctx.Done():
				return
			}
			err = t.commit(ctx, up)
		}
		var body *segment.BodyError
		switch {
		case errors.As(err, &body): // this partition cannot be sealed here; the others must not wait for it
			t.m.corruption.WithLabelValues("log").Inc()
			if err = t.cat.Repair(ctx, s, body.TP, body.Offset); err == nil {
				if !wait(ctx, pause) { // should it not have helped, the next look says so
					return
				}
				continue
			}
			t.cfg.Logger.Error("a hot batch is damaged and cannot be sealed", "component", "tier", "partition", body.TP, "offset", body.Offset, "err", errors.Join(body.Err, err))
			k.ranges = without(k.ranges, body.TP)
			continue
		case err != nil:
			t.m.uploads.WithLabelValues("failed").Inc()
			if ctx.Err() != nil {
				return
			}
			if !failing {
				failing = true
				t.m.storeDown.Set(float64(t.failing.Add(1)))
				t.cfg.Logger.Warn("sealing failed, it is repeated until it succeeds", "component", "tier", "shard", s, "err", err)
			}
			if !wait(ctx, time.Duration(mrand.Int64N(int64(pause))+int64(pause)/2)) {
				return
			}
			pause = min(2*pause, t.cfg.RetryLast)
			continue
		}
		if failing {
			failing, pause = false, t.cfg.RetryFirst
			t.m.storeDown.Set(float64(t.failing.Add(-1)))
			t.cfg.Logger.Info("sealing goes on", "component", "tier", "shard", s)
		}
		k.ranges = rest
	}
}

func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func without(ranges []HotRange, tp record.TopicPartition) []HotRange {
	var out []HotRange
	for _, r := range ranges {
		if r.TP != tp {
			out = append(out, r)
		}
	}
	return out
}

// uploaded is an object that is in the bucket and not yet committed.
type uploaded struct {
	object segment.Object
	runs   []segment.PartitionRun
	until  time.Time // after this the sweep may have it: it must not be committed
}

// bodies gives segment.Build the bodies of hot batches.
type bodies struct {
	src  PayloadSource
	runs [][]HotBatch
}

// ReadBody implements segment.Source.
func (b *bodies) ReadBody(run, batch int, p []byte) error {
	return b.src.ReadBody(&b.runs[run][batch], p)
}

// upload makes one object of a task's ranges and puts it. rest is what did not go into it.
func (t *Tiering) upload(ctx context.Context, s record.ShardID, k task) (up *uploaded, rest []HotRange, err error) {
	src := &bodies{src: t.cat.Payload(s)}
	defer src.src.Close()
	inputs, rest, err := t.collect(ctx, s, k, src)
	if err != nil || len(inputs) == 0 {
		return nil, rest, err
	}
	plan := segment.Plan{Class: k.class, Owner: segment.Owner{Shared: true}}
	if k.own {
		bs := inputs[0].Batches
		first, last := record.Batch(bs[0].Header[:]), record.Batch(bs[len(bs)-1].Header[:])
		plan.Owner = segment.Owner{TP: inputs[0].TP, First: first.BaseOffset(), Last: last.LastOffset()}
	}
	_, _ = rand.Read(plan.UUID[:]) // never fails
	until := time.Now().Add(t.cfg.PrepareTTL / 2)
	o, err := t.cat.Prepare(ctx, s, plan, t.cfg.PrepareTTL)
	if err != nil {
		return nil, nil, fmt.Errorf("preparing an upload: %w", err)
	}
	if now, trusted := t.cat.Clock(s); trusted { // never this node's own clock: a class ends by it
		o.UploadedAt = now
	}
	built, err := segment.Build(segment.Meta{Cluster: t.cat.ClusterUUID(), Shard: s, Number: o.Number, Term: o.Term, UUID: plan.UUID, Class: plan.Class, Written: o.UploadedAt}, inputs, src)
	if err != nil {
		return nil, nil, err
	}
	o.Size, o.CRC32C, o.FooterLen = built.Size, built.CRC32C, built.FooterLen
	if err := t.put(ctx, &o, built, until); err != nil && !planted.On(planted.PutUnchecked) {
		return nil, nil, err
	}
	return &uploaded{o, built.Runs, until}, rest, nil
}

// collect lists the batches of a task: all of it, or of a large partition as much as one object takes.
func (t *Tiering) collect(ctx context.Context, s record.ShardID, k task, src *bodies) (inputs []segment.RunInput, rest []HotRange, err error) {
	for _, r := range k.ranges {
		limit := t.cfg.SealBytes
		if !k.own {
			limit = 4 * t.cfg.SealBytes
		}
		hot, err := t.cat.Batches(ctx, s, r, limit)
		if err != nil {
			return nil, nil, fmt.Errorf("listing the batches of %s: %w", r.TP, err)
		}
		if len(hot) == 0 {
			continue
		}
		in := segment.RunInput{TP: r.TP, Epochs: r.Epochs, Producers: r.Producers, Batches: make([]segment.Batch, len(hot))}
		for i := range hot {
			in.Batches[i] = hot[i].Batch
		}
		inputs, src.runs = append(inputs, in), append(src.runs, hot)
		last := record.Batch(hot[len(hot)-1].Header[:])
		if end := last.LastOffset(); end < r.End {
			r.Start = end + 1
			rest = append(rest, r)
		}
	}
	return inputs, rest, nil
}

// put uploads an object and makes sure that the store has it whole.
func (t *Tiering) put(ctx context.Context, o *segment.Object, built *segment.Built, until time.Time) error {
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	began := time.Now()
	key := o.Key()
	info, err := t.bucket.Put(ctx, key, objstore.Body{R: built, Size: built.Size}, objstore.PutOptions{IfAbsent: true, CRC32C: &built.CRC32C, WriterID: o.Plan.UUID.String()})
	if err != nil {
		return fmt.Errorf("uploading %s: %w", key, err)
	}
	if info.CRC32C == nil || info.Size != built.Size {
		if info, err = t.bucket.Head(ctx, key); err != nil {
			return fmt.Errorf("checking the upload of %s: %w", key, err)
		}
	}
	if planted.On(planted.CRCSkipped) {
		return nil
	}
	if info.Size != built.Size || info.CRC32C != nil && *info.CRC32C != built.CRC32C {
		return fmt.Errorf("the store has %s with %d bytes, %d were sent: %w", key, info.Size, built.Size, objstore.ErrCorrupt)
	}
	t.m.upload.Observe(time.Since(began).Seconds())
	t.m.segmentBytes.Observe(float64(built.Size))
	return nil
}

// commit makes an upload part of the manifests. Its outcome may be unknown: it is repeated, which is safe, until it is known or too late.
func (t *Tiering) commit(ctx context.Context, up *uploaded) error {
	for pause := t.cfg.RetryFirst; ; pause = min(2*pause, t.cfg.RetryLast) {
		if !time.Now().Before(up.until) {
			return fmt.Errorf("object %d: too late to commit", up.object.Number)
		}
		verdicts, err := t.cat.Commit(ctx, up.object, up.runs)
		if err == nil {
			t.m.uploads.WithLabelValues("committed").Inc()
			for i, v := range verdicts {
				if v == Rejected {
					t.cfg.Logger.Debug("a run was not accepted", "component", "tier", "object", up.object.Number, "partition", up.runs[i].TP, "start", up.runs[i].StartOffset)
				}
			}
			t.cfg.Logger.Debug("sealed", "event", "segment.sealed", "component", "tier", "object", up.object.Number, "bytes", up.object.Size, "runs", len(up.runs))
			return nil
		}
		if ctx.Err() != nil || len(verdicts) > 0 { // refused, not unknown
			return fmt.Errorf("committing object %d: %w", up.object.Number, err)
		}
		if !wait(ctx, pause) {
			return ctx.Err()
		}
	}
}

const (
	// rehomeEntry bounds the bytes of one rehoming entry.
	rehomeEntry = 1 << 20
	// rehomeMax: a partition with more than this is sealed early instead.
	rehomeMax = 4 << 20
)

// rehome writes small batches again that keep a busy neighbour's log from being freed.
func (t *Tiering) rehome(ctx context.Context, s record.ShardID, waiting []HotRange) {
	for _, r := range waiting {
		if r.Bytes > rehomeMax {
			continue
		}
		for r.Start <= r.End && ctx.Err() == nil {
			batches, err := t.cat.Batches(ctx, s, r, rehomeEntry)
			if err == nil && len(batches) > 0 {
				err = t.cat.Rehome(ctx, s, r.TP, batches)
			}
			if err != nil {
				t.cfg.Logger.Warn("rehoming failed", "component", "tier", "partition", r.TP, "err", err)
				break
			}
			if len(batches) == 0 {
				break
			}
			t.m.rehomed.Add(float64(len(batches)))
			last := record.Batch(batches[len(batches)-1].Header[:])
			r.Start = last.LastOffset() + 1
		}
	}
}
