package raftmeta

import (
	"context"
	"maps"
	"slices"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// GroupShard is the shard whose leader coordinates a group; 0 while the group's slot is on its way to another.
func (h *Host) GroupShard(group string) record.ShardID {
	slot := state.GroupSlot(group)
	s := h.Cluster().SlotShard(slot)
	if g := h.shardByID(s); g == nil || g.released(slot) {
		return 0
	}
	return s
}

func (g *group) released(slot uint8) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.shard.Released(slot)
}

// settleSlots tells meta what has become of the slots that this shard was asked to let go.
func (g *group) settleSlots(ctx context.Context) error {
	moving := g.host.Cluster().Moving(g.id)
	if len(moving) == 0 {
		return nil
	}
	c := state.SettleSlots{Shard: g.id}
	g.mu.RLock()
	for _, slot := range slices.Sorted(maps.Keys(moving)) {
		switch {
		case g.shard.Cursor() < moving[slot]: // not asked yet
		case g.shard.Released(slot):
			c.Released = append(c.Released, int(slot))
		default:
			c.Kept = append(c.Kept, int(slot))
		}
	}
	g.mu.RUnlock()
	if len(c.Released)+len(c.Kept) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	_, err := g.host.propose(ctx, g.host.meta, c)
	return err
}

// Group returns a group's durable state, which must not be changed; nil if there is none.
func (h *Host) Group(group string) *state.Group {
	g := h.shardByID(h.GroupShard(group))
	if g == nil {
		return nil
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.shard.Group(group)
}

// Groups returns the groups of a shard, by ID.
func (h *Host) Groups(s record.ShardID) []*state.Group {
	g := h.shardByID(s)
	if g == nil {
		return nil
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	var out []*state.Group
	for x := range g.shard.Groups() {
		out = append(out, x)
	}
	return out
}

// ProposeGroup commits commands of a shard's coordinator, in order; done is called once, with the first error, and must not block.
func (h *Host) ProposeGroup(s record.ShardID, cmds []state.Command, done func(error)) {
	g := h.shardByID(s)
	if g == nil || len(cmds) == 0 {
		done(ErrNotLeader)
		return
	}
	if h.roomFor(g) < -groupReserve { // groups may go on for a while longer than batches, not for ever
		done(ErrBudget)
		return
	}
	var first error
	for i, c := range cmds {
		g.batcher.command(c, false, func(r state.Result, err error) { // one goroutine calls them, in order
			if err == nil {
				err = code(r.Code)
			}
			if first == nil {
				first = err
			}
			if i == len(cmds)-1 {
				done(first)
			}
		})
	}
}
