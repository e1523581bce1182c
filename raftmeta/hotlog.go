package raftmeta

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"
	"sync"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

const (
	// readRefs bounds the entries that one read visits.
	readRefs = 64
	// copyBelow: smaller batches are copied behind one another instead of being sent as a buffer each.
	copyBelow = 2048
	// The pieces of a read's own memory double from arenaFirst to arenaMax bytes; a larger batch has a piece for itself.
	arenaFirst = 16 << 10
	arenaMax   = 1 << 20
)

// hotRead is the pooled memory of one read.
type hotRead struct {
	refs  []state.HotRef
	bufs  [][]byte
	arena []byte   // where take goes on
	spent [][]byte // full ones before it
}

var hotReads = sync.Pool{New: func() any { return &hotRead{} }}

// ReadHot implements tiering.HotLog.
func (h *Host) ReadHot(ctx context.Context, tp record.TopicPartition, from record.Offset, l tiering.Limits) (tiering.Result, error) {
	g := h.groupOf(tp)
	if g == nil {
		return tiering.Result{}, tiering.ErrUnknownPartition
	}
	return g.readHot(ctx, tp, from, l, g.opens, g.mends)
}

// opener gives the entry that a ref points to, open for reading; ErrGone if it is not to be had, as what was sealed need not be.
type opener func(ctx context.Context, ref *state.HotRef, sealed bool) (raftlog.Entry, error)

func (g *group) openEntry(_ context.Context, ref *state.HotRef, _ bool) (raftlog.Entry, error) {
	return g.log.Entry(uint64(ref.Index), uint64(ref.Term))
}

// readHot reads batches from the entries that open gives; mend is told of one that is damaged.
func (v *view) readHot(ctx context.Context, tp record.TopicPartition, from record.Offset, l tiering.Limits, open opener, mend func(record.TopicPartition, record.Offset)) (tiering.Result, error) {
	r := hotReads.Get().(*hotRead)
	res := tiering.Result{Next: from, Release: func() { r.put() }}
	v.mu.RLock()
	r.refs = v.shard.HotRefs(tp, from, readRefs, r.refs[:0])
	epochs := v.shard.Epochs(tp)
	hotFrom := v.shard.HotStart(tp)
	v.mu.RUnlock()
	sealed := from < hotFrom
	if sealed {
		if r.refs = v.recent.find(tp, from, readRefs, r.refs[:0]); len(r.refs) == 0 {
			r.put()
			return tiering.Result{}, tiering.ErrNotLocal
		}
	}
	for i := range r.refs {
		more, err := r.readRef(ctx, open, &r.refs[i], sealed, epochs, l, &res)
		if err != nil {
			if res.Bytes > 0 { // what was read is good; the next read meets the fault again
				break
			}
			base := r.refs[i].Base
			r.put()
			if errors.Is(err, errFetching) {
				return tiering.Result{Next: from}, nil
			}
			if errors.Is(err, raftlog.ErrGone) {
				return tiering.Result{}, tiering.ErrNotLocal
			}
			if errors.Is(err, raftlog.ErrCorrupt) {
				mend(tp, max(base, from))
			}
			return tiering.Result{}, fmt.Errorf("%w: %w", tiering.ErrStorage, err)
		}
		if !more {
			break
		}
	}
	res.Buffers = r.bufs
	return res, nil
}

// put gives everything back: nothing may refer to what was read any more.
func (r *hotRead) put() {
	for _, b := range append(r.spent, r.arena) {
		record.PutBuffer(b)
	}
	clear(r.bufs)
	clear(r.spent)
	r.refs, r.bufs, r.arena, r.spent = r.refs[:0], r.bufs[:0], nil, r.spent[:0]
	hotReads.Put(r)
}

// readRef adds the batches of one ref; more is false when a limit was reached.
func (r *hotRead) readRef(ctx context.Context, open opener, ref *state.HotRef, sealed bool, epochs []segment.EpochStart, l tiering.Limits, res *tiering.Result) (more bool, err error) {
	e, err := open(ctx, ref, sealed)
	if err != nil {
		return false, err
	}
	defer e.Release()
	slots, err := state.DecodeSlots(e.Data)
	if err != nil {
		return false, err
	}
	if ref.First+ref.Count > slots.Len() {
		return false, fmt.Errorf("entry %d has %d slots, slot %d is wanted", ref.Index, slots.Len(), ref.First+ref.Count-1)
	}
	base := ref.Base
	for i := ref.First; i < ref.First+ref.Count; i++ {
		s := slots.At(i)
		next := base + s.Offsets()
		if next <= res.Next { // before the offset that was asked for
			base = next
			continue
		}
		if base >= l.UpTo || res.Bytes+int(s.Len) > l.MaxBytes && (res.Bytes > 0 || !l.AtLeastOne) {
			return false, nil
		}
		if err := r.add(&e, &s, base, epochAt(epochs, base)); err != nil {
			return false, fmt.Errorf("batch at offset %d of entry %d in %s: %w", base, ref.Index, e.Where(), err)
		}
		res.Bytes += int(s.Len)
		res.Next, base = next, next
		if !e.InMemory() {
			res.Tier = max(res.Tier, tiering.TierDisk)
		}
	}
	return true, nil
}

func epochAt(epochs []segment.EpochStart, offset record.Offset) record.LeaderEpoch {
	i := sort.Search(len(epochs), func(i int) bool { return epochs[i].Start > offset })
	if i == 0 {
		return 0
	}
	return epochs[i-1].Epoch
}

// add appends one batch: from memory the header is copied and patched and the body is shared; from disk it is read whole and checked.
func (r *hotRead) add(e *raftlog.Entry, s *state.Slot, base record.Offset, epoch record.LeaderEpoch) error {
	size, pos := int(s.Len), int(s.Pos)
	if size < record.HeaderBytes || pos+size > e.PayloadLen {
		return fmt.Errorf("%w: %d bytes at %d of a payload of %d", raftlog.ErrCorrupt, size, pos, e.PayloadLen)
	}
	share := e.InMemory() && size >= copyBelow
	n := size
	if share {
		n = record.HeaderBytes
	}
	b := r.take(n)
	if e.InMemory() {
		copy(b, e.Payload[pos:pos+n])
	} else {
		if err := e.ReadPayload(b, int64(pos)); err != nil {
			return err
		}
		if v := record.Batch(b); v.Size() != size || v.CRC() != s.CRC || v.CheckCRC() != nil {
			return fmt.Errorf("%w: batch checksum", raftlog.ErrCorrupt)
		}
	}
	record.PatchHeader(b, base, epoch)
	if share {
		r.bufs = append(r.bufs, e.Payload[pos+n:pos+size])
	}
	return nil
}

// take returns n bytes of the read's own memory; pieces that lie behind one another become one buffer.
func (r *hotRead) take(n int) []byte {
	if cap(r.arena)-len(r.arena) < n {
		if cap(r.arena) > 0 {
			r.spent = append(r.spent, r.arena)
		}
		r.arena = record.GetBuffer(max(n, min(2*cap(r.arena), arenaMax), arenaFirst))[:0]
	}
	at := len(r.arena)
	r.arena = r.arena[:at+n]
	b := r.arena[at : at+n]
	if k := len(r.bufs); k > 0 && at > 0 {
		if last := r.bufs[k-1]; cap(last) > len(last) && &last[:len(last)+1][len(last)] == &b[0] {
			r.bufs[k-1] = last[:len(last)+n]
			return b
		}
	}
	r.bufs = append(r.bufs, b[:n:cap(r.arena)-at])
	return b
}

// headerOf makes the final header of a slot's batch.
func headerOf(s *state.Slot, base record.Offset, epoch record.LeaderEpoch) (h [record.HeaderBytes]byte) {
	be := binary.BigEndian
	record.PatchHeader(h[:], base, epoch)
	be.PutUint32(h[8:], s.Len-12)
	h[16] = 2
	be.PutUint32(h[17:], s.CRC)
	be.PutUint16(h[21:], uint16(s.Attributes))
	be.PutUint32(h[23:], uint32(s.LastOffsetDelta))
	be.PutUint64(h[27:], uint64(s.BaseTimestamp))
	be.PutUint64(h[35:], uint64(s.MaxTimestamp))
	be.PutUint64(h[43:], uint64(s.ProducerID))
	be.PutUint16(h[51:], uint16(s.ProducerEpoch))
	be.PutUint32(h[53:], uint32(s.BaseSequence))
	be.PutUint32(h[57:], uint32(s.Count))
	return h
}
