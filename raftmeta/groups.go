package raftmeta

import (
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// GroupShard is the shard whose leader coordinates a group.
func (h *Host) GroupShard(group string) record.ShardID { return h.Cluster().SlotShard(slotOf(group)) }

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
	if h.FreeBudget() == 0 { // groups may go on for a while longer than batches, not for ever
		over := -h.cfg.HotMaxBytes - groupReserve
		for _, x := range h.shardList() {
			_, unfree := x.log.Bytes()
			over += unfree
		}
		if over > 0 {
			done(ErrBudget)
			return
		}
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
