package raftmeta

import (
	"context"
	"time"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// effectsMax bounds the effects of one proposal.
const effectsMax = 4096

const (
	// trimAhead effects may stay in the outbox while meta is led elsewhere.
	trimAhead = 64
	trimTime  = 2 * time.Second
)

// outboxLoop carries meta's effects to the shards that this node leads, and trims what they have applied.
func (h *Host) outboxLoop() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for {
		h.pokeMu.Lock()
		ch := h.poked
		h.pokeMu.Unlock()
		for _, g := range h.shardList() {
			if err := h.push(ctx, g); err != nil {
				h.cfg.Logger.Debug("pushing effects", "shard", g.id, "err", err)
			}
		}
		select {
		case <-ch:
		case <-h.stop:
			return
		}
	}
}

// push proposes what a shard lacks of its outbox and trims what it has.
func (h *Host) push(ctx context.Context, g *group) error {
	if g.leads.Load() == 0 {
		return nil
	}
	g.mu.RLock()
	cursor := g.shard.Cursor()
	g.mu.RUnlock()
	h.meta.mu.RLock()
	first, effects := h.meta.meta.Outbox(g.id, cursor)
	start, _ := h.meta.meta.Outbox(g.id, 0)
	h.meta.mu.RUnlock()
	if len(effects) > effectsMax {
		effects = effects[:effectsMax]
	}
	if len(effects) > 0 {
		if _, err := g.propose(ctx, state.MetaEffects{From: first, To: first + uint64(len(effects)) - 1, Effects: effects}); err != nil {
			return err
		}
		cursor = first + uint64(len(effects)) - 1
		h.poke()
	}
	if cursor < start || start == 0 || h.meta.leads.Load() == 0 && cursor-start < trimAhead { // another node's meta is not asked for every one
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
