package raftmeta

import (
	"sort"
	"sync"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// recentMax bounds the refs of one shard's recent index.
const recentMax = 128 << 10

// recentIndex remembers where batches that were sealed still lie in the local log, so that a consumer which is minutes behind costs no request
// to the object store. It is not replicated and is empty after a restart.
type recentIndex struct {
	mu    sync.RWMutex
	m     map[record.TopicPartition][]state.DroppedRef // by offset, contiguous
	order []record.TopicPartition                      // one per ref, oldest first
}

func (r *recentIndex) add(refs []state.DroppedRef) {
	if len(refs) == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.m == nil {
		r.m = map[record.TopicPartition][]state.DroppedRef{}
	}
	for _, d := range refs {
		list := r.m[d.TP]
		if n := len(list); n > 0 && list[n-1].End != d.Base {
			list = nil // a gap: what lies before it is of no use
		}
		r.m[d.TP] = append(list, d)
		r.order = append(r.order, d.TP)
	}
	for len(r.order) > recentMax {
		tp := r.order[0]
		r.order = r.order[1:]
		if list := r.m[tp]; len(list) > 1 {
			r.m[tp] = list[1:]
		} else {
			delete(r.m, tp)
		}
	}
}

// find returns up to max refs from the one that holds `from` on.
func (r *recentIndex) find(tp record.TopicPartition, from record.Offset, max int, out []state.HotRef) []state.HotRef {
	r.mu.RLock()
	defer r.mu.RUnlock()
	list := r.m[tp]
	i := sort.Search(len(list), func(i int) bool { return list[i].End > from })
	if i == len(list) || list[i].Base > from {
		return out
	}
	for ; i < len(list) && max > 0; i++ {
		d := &list[i]
		out = append(out, state.HotRef{Index: d.Index, Term: d.Term, Base: d.Base, End: d.End, First: d.First, Count: d.Count})
		max--
	}
	return out
}
