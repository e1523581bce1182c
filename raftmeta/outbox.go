package raftmeta

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// effectsMax bounds the effects of one proposal.
const effectsMax = 4096

const (
	// trimAhead effects may stay in the outbox: meta is not asked for every one.
	trimAhead = 64
	trimTime  = 2 * time.Second
)

// carry takes meta's effects to a shard while this node leads it, and trims what it has applied, until the host closes. Neither waits for another shard, nor a push for a trim.
func (h *Host) carry(g *group) {
	var wg sync.WaitGroup
	wg.Go(func() { h.whenPoked("pushing effects", g, func() error { return h.push(h.ctx, g) }) })
	wg.Go(func() { h.whenPoked("trimming effects", g, func() error { return h.trim(h.ctx, g) }) })
	wg.Wait()
}

// whenPoked does something for a shard that this node leads, whenever something was applied.
func (h *Host) whenPoked(what string, g *group, do func() error) {
	for {
		ch := h.bell.listen()
		if g.leads.Load() > 0 {
			if err := do(); err != nil {
				h.cfg.Logger.Debug(what, "shard", g.id, "err", err)
			}
		}
		select {
		case <-ch:
		case <-h.stop:
			return
		}
	}
}

// push proposes what a shard lacks of its outbox.
func (h *Host) push(ctx context.Context, g *group) error {
	g.mu.RLock()
	cursor := g.shard.Cursor()
	g.mu.RUnlock()
	var first uint64
	var effects []state.Effect
	h.meta.mu.RLock()
	if h.meta.meta.OutboxEnd(g.id) > cursor {
		first, effects = h.meta.meta.Outbox(g.id, cursor)
	}
	h.meta.mu.RUnlock()
	for part := range slices.Chunk(effects, effectsMax) {
		if _, err := g.propose(ctx, state.MetaEffects{From: first, To: first + uint64(len(part)) - 1, Effects: part}); err != nil {
			return err
		}
		first += uint64(len(part))
		g.tell()
	}
	return nil
}

// trim drops what a shard has applied from its outbox, once that is some.
func (h *Host) trim(ctx context.Context, g *group) error {
	g.mu.RLock()
	cursor := g.shard.Cursor()
	g.mu.RUnlock()
	h.meta.mu.RLock()
	start := h.meta.meta.OutboxStart(g.id)
	h.meta.mu.RUnlock()
	if start == 0 || cursor < start+trimAhead {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, trimTime)
	defer cancel()
	_, err := h.propose(ctx, h.meta, state.TrimOutbox{Shard: g.id, To: cursor})
	return err
}

// settle waits until every shard has applied what meta decided up to now.
func (h *Host) settle(ctx context.Context) error {
	want := map[record.ShardID]uint64{}
	h.meta.mu.RLock()
	for _, g := range h.shardList() {
		want[g.id] = h.meta.meta.OutboxEnd(g.id)
	}
	h.meta.mu.RUnlock()
	return h.await(ctx, "the shards to apply the change", func() bool {
		for _, g := range h.shardList() {
			g.mu.RLock()
			behind := g.shard.Cursor() < want[g.id]
			g.mu.RUnlock()
			if behind {
				return false
			}
		}
		return true
	})
}
