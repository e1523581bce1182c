package raftmeta

import (
	"context"
	"errors"
	"fmt"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/raftmeta/state"
	"github.com/hashicorp/raft"
)

const (
	// goOnEntries, goOnLook and goOnBytes bound what a follower that comes back is sent of the log instead of the state: commands, all entries that are looked at, and bytes of Data.
	goOnEntries = 4096
	goOnLook    = 16384
	goOnBytes   = 4 << 20
)

// errAhead: a follower has more than this node. It must not go back.
var errAhead = errors.New("this node is behind")

var _ peer.Source = (*group)(nil)

// source is where the followers of this node get a group's feed from.
func (h *Host) source(id uint32) peer.Source {
	if !h.serving.Load() {
		return nil
	}
	if id == 0 {
		return h.meta
	}
	if list := h.shardList(); int(id) <= len(list) {
		return list[id-1]
	}
	return nil
}

// publish gives a command that was applied to the followers. mu is held.
func (g *group) publish(prev uint64, l *raft.Log) {
	at := g.machine.position()
	e := peer.FeedEntry{Prev: prev, Index: at.Index, Term: l.Term, Chain: at.Chain, Data: l.Data, PayloadCRC: payloadCRC(l.Data)}
	if h, ok := raftlog.ParseEntryHeader(l.Data); ok && len(l.Extensions) == int(h.PayloadLen) { // here only where it was proposed: other nodes have given its memory back
		e.Payload = l.Extensions
	}
	g.pub.Publish(e)
}

func payloadCRC(data []byte) uint32 {
	if h, ok := raftlog.ParseEntryHeader(data); ok && h.Place == raftlog.PlaceInline {
		return h.PayloadCRC
	}
	return 0
}

// Publisher implements peer.Source.
func (g *group) Publisher() *peer.Publisher { return g.pub }

// Begin implements peer.Source: who was here a moment ago gets the entries since then, everybody else the state.
func (g *group) Begin(from peer.Position, mark func(peer.Position)) (peer.Start, error) {
	now, _, err := g.standing(false, func(peer.Position) {})
	if err != nil {
		return peer.Start{}, err
	}
	if from.Index > now.Index {
		return peer.Start{}, fmt.Errorf("%w: at %d, the follower at %d", errAhead, now.Index, from.Index)
	}
	es, ok := g.between(from, now, nil)
	if ok {
		at, _, err := g.standing(false, mark)
		if err != nil {
			return peer.Start{}, err
		}
		if es, ok = g.between(now, at, es); !ok {
			return peer.Start{}, fmt.Errorf("entries %d to %d were freed, or replaced", now.Index, at.Index)
		}
		return peer.Start{Entries: es}, nil
	}
	_, f, err := g.standing(true, mark)
	if err != nil {
		return peer.Start{}, err
	}
	return peer.Start{State: f}, nil
}

// standing calls mark with where the state is, and gives the state itself, if it is wanted.
func (g *group) standing(freeze bool, mark func(peer.Position)) (at peer.Position, f frozen, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.refused != nil {
		return at, nil, g.refused
	}
	if freeze {
		f = g.machine.freeze()
	}
	at = g.machine.position()
	mark(at)
	return at, f, nil
}

// between appends the commands between two positions to es, if the log has them, they are few, and they lead from the one to the other.
func (g *group) between(from, to peer.Position, es []peer.FeedEntry) ([]peer.FeedEntry, bool) {
	if from == to {
		return es, true
	}
	if base, _ := g.log.Base(); from.Index == 0 || from.Index < base || to.Index-from.Index > goOnLook {
		return nil, false
	}
	bytes := 0
	for i := from.Index + 1; i <= to.Index; i++ {
		var l raft.Log
		if err := g.log.GetLog(i, &l); err != nil {
			return nil, false
		}
		if l.Type != raft.LogCommand {
			continue
		}
		if bytes += len(l.Data); bytes > goOnBytes || len(es) >= goOnEntries {
			return nil, false
		}
		at := peer.Position{Index: i, Chain: state.ChainHash(from.Chain, state.RaftIndex(i), state.Term(l.Term), l.Data)}
		es = append(es, peer.FeedEntry{Prev: from.Index, Index: i, Term: l.Term, Chain: at.Chain, Data: l.Data, PayloadCRC: payloadCRC(l.Data)})
		from = at
	}
	return es, from == to
}

// Reach implements peer.Source.
func (g *group) Reach(ctx context.Context) peer.Reach {
	r := peer.Reach{Proven: g.host.prove(ctx, g) == nil, Leader: g.leaderServer()}
	g.mu.RLock()
	defer g.mu.RUnlock()
	r.Index = g.machine.position().Index
	return r
}

// Bytes implements peer.Source.
func (g *group) Bytes(a peer.BytesAsked) (peer.EntryBytes, error) {
	e, err := g.log.Entry(a.Index, a.Term)
	if errors.Is(err, raftlog.ErrGone) {
		g.mu.RLock()
		at := g.machine.position() // behind it: what is freed is not hot there any more
		g.mu.RUnlock()
		if a.Index > at.Index {
			return peer.EntryBytes{}, fmt.Errorf("%w: at %d", errAhead, at.Index)
		}
		return peer.EntryBytes{Gone: true, Applied: at.Index}, nil
	}
	if err != nil {
		return peer.EntryBytes{}, err
	}
	defer e.Release()
	total := len(e.Data)
	if a.Place == peer.PlacePayload {
		total = e.PayloadLen
	}
	if int64(a.From) > int64(total) {
		return peer.EntryBytes{}, fmt.Errorf("byte %d of %d", a.From, total)
	}
	out := peer.EntryBytes{Total: uint32(total)}
	n := min(int(a.Len), total-int(a.From))
	if a.Place == peer.PlaceData {
		out.Bytes = e.Data[a.From : int(a.From)+n]
		return out, nil
	}
	out.Bytes = make([]byte, n)
	return out, e.ReadPayload(out.Bytes, int64(a.From))
}
