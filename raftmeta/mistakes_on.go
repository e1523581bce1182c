//go:build planted

package raftmeta

import (
	"time"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/raftmeta/state"
)

// mistakeBefore is what planted mistakes need to know before an entry is proposed: the results that are due, in the directory's order, and the last index of the log.
func (g *group) mistakeBefore(e *openEntry, data []byte) (due []state.AppendResult, last uint64) {
	if g.shard == nil || len(e.batches) == 0 || !planted.On(planted.AckBeforeCommit) && !planted.On(planted.AckAfterOwnFsync) && !planted.On(planted.OffsetBeforeApply) {
		return nil, 0
	}
	g.mu.RLock()
	due = g.shard.Due(data)
	g.mu.RUnlock()
	last, _ = g.log.LastIndex() // 0 only makes the mistake earlier
	return due, last
}

// mistakeAnswer gives the answers that are due to all who wait for e, before it is committed.
func (g *group) mistakeAnswer(e *openEntry, perm []int32, due []state.AppendResult, last uint64) {
	if due == nil || !planted.On(planted.AckBeforeCommit) && !planted.On(planted.AckAfterOwnFsync) {
		return
	}
	for planted.On(planted.AckAfterOwnFsync) && g.leads.Load() > 0 {
		if now, err := g.log.LastIndex(); err != nil || now > last {
			break
		}
		time.Sleep(time.Millisecond)
	}
	for i, p := range e.batches {
		p.call.results[p.at] = g.appendResult(due[perm[i]])
		p.call.finish(1)
	}
	e.batches = nil
}
