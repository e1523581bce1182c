package raftmeta

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

const (
	// repairPiece is what is asked for at once: a peer's answer has 64 KiB at most, and JSON makes bytes longer by a third.
	repairPiece = 40 << 10
	// repairTime bounds a repair that a read has asked for.
	repairTime = 10 * time.Second
)

// payloadAsked names bytes of an entry's payload that another voter is asked for: this node's copy is damaged.
type payloadAsked struct {
	Index, Term uint64
	From, Bytes int
}

// Repair implements tiering.Catalog: the batches of the entry that holds offset are fetched from another voter, checked, and appended again with their offsets.
func (h *Host) Repair(ctx context.Context, s record.ShardID, tp record.TopicPartition, offset record.Offset) error {
	g := h.shardByID(s)
	if g == nil {
		return ErrNotLeader
	}
	g.mu.RLock()
	refs := g.shard.HotRefs(tp, offset, 1, nil)
	handle := g.shard.Handle(tp)
	g.mu.RUnlock()
	if len(refs) == 0 || handle == 0 {
		return nil // it is no longer hot
	}
	ref := refs[0]
	all, where, err := g.directory(&ref)
	if err != nil {
		return err
	}
	var payload []byte
	slots, bases, base := make([]state.Slot, 0, ref.Count), make([]record.Offset, 0, ref.Count), ref.Base
	for i := ref.First; i < ref.First+ref.Count; i++ {
		slot := all.At(i)
		b, err := g.fetchBatch(ctx, &slot, uint64(ref.Index), uint64(ref.Term))
		if err != nil {
			return fmt.Errorf("repairing offset %d of %s, entry %d in %s: %w", base, tp, ref.Index, where, err)
		}
		slot.Handle, slot.Pos = handle, uint32(len(payload))
		payload, slots, bases = append(payload, b...), append(slots, slot), append(bases, base)
		base += slot.Offsets()
	}
	if err = g.rehome(ctx, slots, bases, payload); err == nil {
		g.log_.Warn("a damaged hot entry was repaired from another voter", "event", "hot.repaired", "partition", tp, "offset", ref.Base, "entry", ref.Index, "where", where)
	}
	return err
}

// directory reads the batches of a ref's entry, and where its payload lies. The entry's file is held no longer: others may take their time to answer.
func (g *group) directory(ref *state.HotRef) (all state.Slots, where string, err error) {
	e, err := g.log.Entry(uint64(ref.Index), uint64(ref.Term))
	if err != nil {
		return all, "", err
	}
	defer e.Release()
	all, err = state.DecodeSlots(e.Data)
	if err != nil || ref.First+ref.Count > all.Len() {
		return all, "", fmt.Errorf("%w: directory of entry %d (%v)", raftlog.ErrCorrupt, ref.Index, err)
	}
	return all, e.Where(), nil
}

// fetchBatch gets a batch from the first other voter that has it as its slot says.
func (g *group) fetchBatch(ctx context.Context, s *state.Slot, index, term uint64) ([]byte, error) {
	errs := []error{errors.New("no other voter has it")}
	for _, to := range g.voters() {
		if to == g.self {
			continue
		}
		b, err := g.fetchPayload(ctx, to, payloadAsked{index, term, int(s.Pos), int(s.Len)})
		if err == nil {
			if v := record.Batch(b); len(b) >= record.HeaderBytes && v.Size() == len(b) && v.CRC() == s.CRC && v.CheckCRC() == nil {
				return b, nil
			}
			err = fmt.Errorf("%w: batch checksum", raftlog.ErrCorrupt)
		}
		errs = append(errs, fmt.Errorf("%s: %w", to, err))
	}
	return nil, errors.Join(errs...)
}

func (g *group) fetchPayload(ctx context.Context, to string, a payloadAsked) (out []byte, err error) {
	for left := a.Bytes; left > 0; left = a.Bytes - len(out) {
		body, err := json.Marshal(forwarded{Payload: &payloadAsked{a.Index, a.Term, a.From + len(out), min(left, repairPiece)}})
		if err != nil {
			return nil, err
		}
		b, err := g.host.peers.Forward(ctx, to, uint32(g.id), body)
		if err != nil {
			return nil, err
		}
		var r forwardedResult
		if err := json.Unmarshal(b, &r); err != nil {
			return nil, err
		}
		if len(r.Payload) == 0 || len(r.Payload) > left {
			return nil, fmt.Errorf("%d of %d bytes: %s", len(r.Payload), left, r.Why)
		}
		out = append(out, r.Payload...)
	}
	return out, nil
}

// payloadFor answers a voter whose copy of an entry is damaged.
func (h *Host) payloadFor(group uint32, a payloadAsked) forwardedResult {
	g := h.shardByID(record.ShardID(group))
	if g == nil {
		return forwardedResult{Why: fmt.Sprintf("no group %d here", group)}
	}
	e, err := g.log.Entry(a.Index, a.Term)
	if err != nil {
		return forwardedResult{Why: err.Error()}
	}
	defer e.Release()
	if a.From < 0 || a.Bytes <= 0 || a.Bytes > repairPiece || a.From > e.PayloadLen-a.Bytes {
		return forwardedResult{Why: fmt.Sprintf("%d bytes at %d of %d", a.Bytes, a.From, e.PayloadLen)}
	}
	b := make([]byte, a.Bytes)
	if e.InMemory() {
		copy(b, e.Payload[a.From:])
	} else if err := e.ReadPayload(b, int64(a.From)); err != nil {
		return forwardedResult{Why: err.Error()}
	}
	return forwardedResult{Payload: b}
}

// single lets one thing at a time begin, and none any more once it is closed.
type single struct {
	mu           sync.Mutex
	busy, closed bool
}

// begin starts f, if it may, and counts it in wg: who waits for wg closes first.
func (s *single) begin(wg *sync.WaitGroup, f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy || s.closed {
		return
	}
	s.busy = true
	wg.Go(func() {
		defer s.end()
		f()
	})
}

func (s *single) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy = false
}

func (s *single) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
}

// mend repairs what a read has found damaged, one entry at a time: the reader's next attempt finds it.
func (g *group) mend(tp record.TopicPartition, offset record.Offset) {
	if g.leads.Load() == 0 {
		return
	}
	g.mending.begin(&g.wg, func() {
		ctx, cancel := context.WithTimeout(g.host.ctx, repairTime)
		defer cancel()
		if err := g.host.Repair(ctx, g.id, tp, offset); err != nil && ctx.Err() == nil {
			g.log_.Error("a damaged hot entry cannot be repaired", "partition", tp, "offset", offset, "err", err)
		}
	})
}
