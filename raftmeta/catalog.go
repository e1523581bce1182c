package raftmeta

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"slices"
	"time"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

var (
	_ tiering.HotLog  = (*Host)(nil)
	_ tiering.Catalog = (*Host)(nil)
)

// Bounds implements tiering.Catalog.
func (h *Host) Bounds(tp record.TopicPartition) (tiering.Bounds, bool) {
	g := h.groupOf(tp)
	if g == nil {
		return tiering.Bounds{}, false
	}
	return g.bounds(tp)
}

// ShardOf implements tiering.Catalog.
func (h *Host) ShardOf(tp record.TopicPartition) (record.ShardID, bool) {
	g := h.groupOf(tp)
	if g == nil {
		return 0, false
	}
	return g.id, true
}

func boundsOf(i *state.PartitionInfo) tiering.Bounds {
	return tiering.Bounds{LogStart: i.LogStart, SealedEnd: i.SealedEnd, HighWatermark: i.HighWatermark, LastStable: i.LastStableOffset}
}

// Runs implements tiering.Catalog.
func (h *Host) Runs(tp record.TopicPartition, from record.Offset, max int) []tiering.RunRef {
	g := h.groupOf(tp)
	if g == nil {
		return nil
	}
	return g.runs(tp, from, max)
}

// Clock implements tiering.Catalog: the replicated clock, or this node's where that stands still because nothing was written.
func (h *Host) Clock(s record.ShardID) (record.Timestamp, bool) {
	g := h.shardByID(s)
	if g == nil {
		return 0, false
	}
	now := g.stamp()
	return now, now != 0
}

// HotRange implements tiering.Catalog.
func (h *Host) HotRange(tp record.TopicPartition) (tiering.HotRange, bool) {
	g := h.groupOf(tp)
	if g == nil {
		return tiering.HotRange{}, false
	}
	return g.hotRangeOf(tp)
}

// Pinned implements tiering.Catalog.
func (h *Host) Pinned(s record.ShardID) int64 {
	g := h.shardByID(s)
	if g == nil {
		return 0
	}
	_, unfree := g.log.Bytes()
	return unfree
}

// HotBytes implements tiering.Catalog.
func (h *Host) HotBytes(s record.ShardID) int64 {
	g := h.shardByID(s)
	if g == nil {
		return 0
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.shard.HotBytes()
}

// WaitHot implements tiering.Catalog.
func (h *Host) WaitHot(ctx context.Context, s record.ShardID, bytes int64, until time.Time) error {
	g := h.shardByID(s)
	if g == nil {
		return ErrNotLeader
	}
	t := time.NewTimer(time.Until(until))
	defer t.Stop()
	for {
		if h.HotBytes(s) >= bytes {
			return nil
		}
		select {
		case <-g.changed:
		case <-t.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// BeginRound implements tiering.Catalog: the snapshot comes first, so that the commits of this round make it installable.
func (h *Host) BeginRound(_ context.Context, s record.ShardID) ([]tiering.HotRange, error) {
	g := h.shardByID(s)
	if g == nil {
		return nil, ErrNotLeader
	}
	if err := g.snapshot(); err != nil {
		g.log_.Warn("snapshot failed", "err", err) // sealing does not depend on it
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	var out []tiering.HotRange
	for p := range g.shard.Partitions() {
		if r, ok := g.hotRange(&p); ok {
			r.Producers = g.shard.Producers(p.TP)
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b tiering.HotRange) int {
		if c := slices.Compare(a.TP.Topic[:], b.TP.Topic[:]); c != 0 {
			return c
		}
		return cmp.Compare(a.TP.Partition, b.TP.Partition)
	})
	return out, nil
}

// Batches implements tiering.Catalog.
func (h *Host) Batches(ctx context.Context, s record.ShardID, r tiering.HotRange, maxBytes int64) ([]tiering.HotBatch, error) {
	g := h.shardByID(s)
	if g == nil {
		return nil, ErrNotLeader
	}
	return g.batches(ctx, r, maxBytes, g.opens)
}

// batches lists the batches of a range; open gives their entries.
func (v *view) batches(ctx context.Context, r tiering.HotRange, maxBytes int64, open opener) ([]tiering.HotBatch, error) {
	var out []tiering.HotBatch
	var refs []state.HotRef
	total, from := int64(0), r.Start
	for from <= r.End {
		v.mu.RLock()
		refs = v.shard.HotRefs(r.TP, from, readRefs, refs[:0])
		v.mu.RUnlock()
		if len(refs) == 0 || refs[0].Base > from {
			return out, nil // sealed or deleted meanwhile
		}
		for i := range refs {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			next, done, err := describe(ctx, open, &refs[i], r, maxBytes, &total, &out)
			if err != nil {
				return nil, err
			}
			if done {
				return out, nil
			}
			from = next
		}
	}
	return out, nil
}

// describe appends the batches of a ref from r.Start on.
func describe(ctx context.Context, open opener, ref *state.HotRef, r tiering.HotRange, maxBytes int64, total *int64, out *[]tiering.HotBatch) (next record.Offset, done bool, err error) {
	e, err := open(ctx, ref, false)
	if err != nil {
		return 0, false, err
	}
	defer e.Release()
	slots, err := state.DecodeSlots(e.Data)
	if err != nil {
		return 0, false, err
	}
	base := ref.Base
	for i := ref.First; i < ref.First+ref.Count && i < slots.Len(); i++ {
		s := slots.At(i)
		next := base + s.Offsets()
		if next > r.Start {
			if base > r.End || *total > 0 && *total+int64(s.Len) > maxBytes {
				return base, true, nil
			}
			*out = append(*out, tiering.HotBatch{Batch: segment.Batch{Header: headerOf(&s, base, epochAt(r.Epochs, base)), Size: int32(s.Len)},
				Index: uint64(ref.Index), Term: uint64(ref.Term), Pos: int64(s.Pos)})
			*total += int64(s.Len)
		}
		base = next
	}
	return base, false, nil
}

// payloadCache bounds the entries that one PayloadSource keeps open.
const payloadCache = 256

// payloads reads bodies for the sealer. It keeps entries open, since the batches of one partition lie in many of them.
type payloads struct {
	log  *raftlog.Log
	open map[uint64]*raftlog.Entry
}

// Payload implements tiering.Catalog.
func (h *Host) Payload(s record.ShardID) tiering.PayloadSource {
	return &payloads{h.shardByID(s).log, map[uint64]*raftlog.Entry{}}
}

// ReadBody implements tiering.PayloadSource.
func (p *payloads) ReadBody(b *tiering.HotBatch, dst []byte) error {
	e := p.open[b.Index]
	if e == nil {
		if len(p.open) >= payloadCache {
			p.Close()
		}
		x, err := p.log.Entry(b.Index, b.Term)
		if err != nil {
			return err
		}
		if x.InMemory() { // not kept: it would hold memory that the tail has given up
			return x.ReadPayload(dst, b.Pos+record.HeaderBytes)
		}
		e = &x
		e.Data = nil
		p.open[b.Index] = e
	}
	return e.ReadPayload(dst, b.Pos+record.HeaderBytes)
}

// Close implements tiering.PayloadSource.
func (p *payloads) Close() {
	for i, e := range p.open {
		e.Release()
		delete(p.open, i)
	}
}

// Prepare implements tiering.Catalog.
func (h *Host) Prepare(ctx context.Context, s record.ShardID, p segment.Plan, ttl time.Duration) (segment.Object, error) {
	g := h.shardByID(s)
	if g == nil {
		return segment.Object{}, ErrNotLeader
	}
	r, err := g.propose(ctx, state.Prepare{Plan: p, Term: state.Term(g.leads.Load()), TTLMs: ttl.Milliseconds()})
	if err != nil {
		return segment.Object{}, err
	}
	if err := code(r.Code); err != nil {
		return segment.Object{}, err
	}
	return r.Value.(segment.Object), nil
}

// Commit implements tiering.Catalog.
func (h *Host) Commit(ctx context.Context, o segment.Object, runs []segment.PartitionRun) ([]tiering.Verdict, error) {
	g := h.shardByID(o.Shard)
	if g == nil {
		return nil, ErrNotLeader
	}
	r, err := g.propose(ctx, state.Commit{Number: o.Number, Size: o.Size, CRC32C: o.CRC32C, FooterLen: o.FooterLen, UploadedAt: o.UploadedAt, Runs: runs})
	if err != nil {
		return nil, err
	}
	verdicts, _ := r.Value.([]state.Verdict)
	out := make([]tiering.Verdict, len(runs))
	for i := range verdicts {
		out[i] = tiering.Verdict(verdicts[i])
	}
	return out, code(r.Code)
}

// Rehome implements tiering.Catalog.
func (h *Host) Rehome(ctx context.Context, s record.ShardID, tp record.TopicPartition, batches []tiering.HotBatch) error {
	g := h.shardByID(s)
	if g == nil {
		return ErrNotLeader
	}
	g.mu.RLock()
	handle := g.shard.Handle(tp)
	g.mu.RUnlock()
	if handle == 0 {
		return ErrUnknownPartition
	}
	src := h.Payload(s)
	defer src.Close()
	var payload []byte
	slots, bases := make([]state.Slot, 0, len(batches)), make([]record.Offset, 0, len(batches))
	for i := range batches {
		b := &batches[i]
		at := len(payload)
		payload = append(payload, b.Header[:]...)
		payload = append(payload, make([]byte, int(b.Size)-record.HeaderBytes)...)
		v := record.Batch(payload[at:])
		if err := src.ReadBody(b, v[record.HeaderBytes:]); err != nil {
			return err
		}
		if err := v.CheckCRC(); err != nil {
			return fmt.Errorf("rehoming offset %d of %s: %w", v.BaseOffset(), tp, err)
		}
		slot := state.SlotOf(v)
		slot.Handle, slot.Pos = handle, uint32(at)
		slots, bases = append(slots, slot), append(bases, v.BaseOffset())
	}
	return g.rehome(ctx, slots, bases, payload)
}

// rehome appends batches again, with their offsets, and returns when that has been applied.
func (g *group) rehome(ctx context.Context, slots []state.Slot, bases []record.Offset, payload []byte) error {
	ch := make(chan error, 1)
	g.batcher.rehome(slots, bases, payload, func(err error) { ch <- err })
	select {
	case err := <-ch:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// AdvanceLogStart implements tiering.Catalog.
func (h *Host) AdvanceLogStart(ctx context.Context, tp record.TopicPartition, to record.Offset) error {
	_, err := h.DeleteRecords(ctx, tp, to)
	return err
}

// Partitions implements tiering.Catalog.
func (h *Host) Partitions(s record.ShardID) []tiering.PartitionStatus {
	g := h.shardByID(s)
	if g == nil {
		return nil
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	var out []tiering.PartitionStatus
	for p := range g.shard.Partitions() {
		out = append(out, tiering.PartitionStatus{TP: p.TP, RetentionMs: p.Config.RetentionMs, RetentionBytes: p.Config.RetentionBytes, Compact: p.Config.Compact,
			Class: p.Config.Class, Bounds: boundsOf(&p), SealedBytes: p.SealedBytes, HotBytes: p.HotBytes, MaxTimestamp: p.MaxTimestamp})
	}
	return out
}

// producerExpiry is Kafka's producer.id.expiration.ms.
const producerExpiry = 24 * time.Hour

// Sweep implements tiering.Catalog.
func (h *Host) Sweep(ctx context.Context, s record.ShardID) error {
	g := h.shardByID(s)
	if g == nil {
		return ErrNotLeader
	}
	now, trusted := h.Clock(s)
	if !trusted {
		return nil
	}
	g.mu.RLock()
	due := g.shard.SweepDue(now, producerExpiry.Milliseconds(), h.cfg.OffsetsRetention.Milliseconds())
	g.mu.RUnlock()
	if !due {
		return nil
	}
	_, err := g.propose(ctx, state.Sweep{ProducerMs: producerExpiry.Milliseconds(), OffsetsMs: h.cfg.OffsetsRetention.Milliseconds()})
	return err
}

// Doomed implements tiering.Catalog.
func (h *Host) Doomed(s record.ShardID) []segment.Object {
	g := h.shardByID(s)
	if g == nil {
		return nil
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.shard.Doomed()
}

// Forget implements tiering.Catalog.
func (h *Host) Forget(ctx context.Context, s record.ShardID, numbers []segment.Number) error {
	g := h.shardByID(s)
	if g == nil {
		return ErrNotLeader
	}
	_, err := g.propose(ctx, state.Forget{Numbers: numbers})
	return err
}

// ClusterUUID implements tiering.Catalog.
func (h *Host) ClusterUUID() (out [16]byte) {
	id := h.identity.ClusterID
	if b, err := base64.RawURLEncoding.DecodeString(id); err == nil && len(b) == 16 {
		copy(out[:], b)
		return out
	}
	sum := sha256.Sum256([]byte(id))
	copy(out[:], sum[:])
	return out
}
