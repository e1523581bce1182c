package peer

import (
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// memory is how far each server has come in each group by what it has answered since this node started: a term that it has adopted, and the last entry that it holds and that was committed,
// so that no later leader may replace it. Both were durable when it answered. A server that is behind that has lost writes: its data directory is an old copy, or its disk has not kept what
// it said it had. It may have voted, and have made a majority, and know of neither any more.
type memory struct {
	mu sync.Mutex
	m  map[string]map[uint32]Standing
}

// note takes over what is higher than what is known.
func (m *memory) note(server string, group uint32, s Standing) {
	m.mu.Lock()
	defer m.mu.Unlock()
	of := m.m[server]
	if of == nil {
		if m.m == nil {
			m.m = map[string]map[uint32]Standing{}
		}
		of = map[uint32]Standing{}
		m.m[server] = of
	}
	old := of[group]
	if s.Term > old.Term || s.LastIndex > old.LastIndex {
		of[group] = Standing{max(s.Term, old.Term), max(s.LastIndex, old.LastIndex)}
	}
}

func (m *memory) of(server string) map[uint32]Standing {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.m[server])
}

// standingIn is what the answer to an append says of the server.
func standingIn(a *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) Standing {
	s := Standing{Term: resp.Term}
	if resp.Success && !isBeat(a) {
		s.LastIndex = min(a.PrevLogEntry+uint64(len(a.Entries)), a.LeaderCommitIndex)
	}
	return s
}

// Behind says what s, where a server stands, lacks of what is known of it; "" if nothing.
func (known Standing) Behind(s Standing) string {
	switch {
	case s.Term < known.Term:
		return fmt.Sprintf("it was in term %d, and is in term %d", known.Term, s.Term)
	case s.LastIndex < known.LastIndex:
		return fmt.Sprintf("it had %d entries that were committed, and has %d", known.LastIndex, s.LastIndex)
	}
	return ""
}

// askBack asks the peer that has connected what it remembers of this node, until it answers or its connection ends: followers do not connect to each other, nor to their leader.
func (x *inbound) askBack() {
	p := x.p
	for pause := p.times.redial; ; pause = min(2*pause, p.times.call) {
		if addr, ok := p.cfg.Resolve(x.from); ok {
			if _, err := p.Ask(p.ctx, addr); err == nil {
				return
			}
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-x.done:
			t.Stop()
			return
		case <-p.ctx.Done():
			t.Stop()
			return
		}
	}
}

// recall compares what a peer remembers of this node with where its groups stand; for a group that is not there yet, when it hears its first message.
func (p *Peers) recall(w *welcome) {
	for group, known := range w.Known {
		if t := p.group(group); t != nil {
			if there, _ := t.compare(w.Server, known); there {
				continue
			}
		}
		p.mu.Lock()
		of := p.recalled[group]
		if of == nil {
			of = map[string]Standing{}
			p.recalled[group] = of
		}
		of[w.Server] = known
		p.recalls.Store(int64(len(p.recalled)))
		p.mu.Unlock()
	}
}

// compare reports whether this instance is behind, and tells whoever wants to know; there is false while there is no instance.
func (t *Transport) compare(peer string, known Standing) (there, behind bool) {
	s, there := t.standing()
	why := known.Behind(s)
	if !there || why == "" {
		return there, false
	}
	if t.p.cfg.OnBehind != nil {
		t.p.cfg.OnBehind(t.g.ID, fmt.Sprintf("by what %s remembers %s", peer, why))
	}
	return true, true
}

// lateRecall does what recall could not; it reports whether this instance is behind, and must not answer.
func (t *Transport) lateRecall() (behind bool) {
	for peer, known := range t.p.take(t.g.ID) {
		_, b := t.compare(peer, known) // a message for an instance comes when it is there
		behind = behind || b
	}
	return behind
}

// take gives what peers have told of a group that was not there yet, once.
func (p *Peers) take(group uint32) map[string]Standing {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := p.recalled[group]
	delete(p.recalled, group)
	p.recalls.Store(int64(len(p.recalled)))
	return out
}

// Behind says what a group that is about to be opened at s lacks of what peers have told of it; "" if nothing.
func (p *Peers) Behind(group uint32, s Standing) string {
	for peer, known := range p.take(group) {
		if why := known.Behind(s); why != "" {
			return fmt.Sprintf("by what %s remembers %s", peer, why)
		}
	}
	return ""
}
