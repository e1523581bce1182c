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
	m     map[record.TopicPartition]*recentList
	order []*recentList // one per ref, oldest first
}

// recentList has a partition's refs by offset; each ends where the next begins.
type recentList struct {
	tp   record.TopicPartition
	refs []recentRef
	end  record.Offset
}

// recentRef is small: there are many. A term fits, since leader epochs are 31 bits; slots do, by state.SlotsMax.
type recentRef struct {
	index        uint64
	base         record.Offset
	term         uint32
	first, count uint16
}

func (l *recentList) endOf(i int) record.Offset {
	if i+1 < len(l.refs) {
		return l.refs[i+1].base
	}
	return l.end
}

// add remembers what was dropped, and forgets what the log has freed: entries up to index freed.
func (r *recentIndex) add(refs []state.DroppedRef, freed uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.m == nil {
		r.m = map[record.TopicPartition]*recentList{}
	}
	for _, d := range refs {
		l := r.m[d.TP]
		if l == nil || l.end != d.Base { // a gap: what lies before it is of no use
			l = &recentList{tp: d.TP}
			r.m[d.TP] = l
		}
		l.refs = append(l.refs, recentRef{uint64(d.Index), d.Base, uint32(d.Term), uint16(d.First), uint16(d.Count)})
		l.end = d.End
		r.order = append(r.order, l)
	}
	for len(r.order) > recentMax || len(r.order) > 0 && r.order[0].refs[0].index <= freed {
		l := r.order[0]
		r.order = r.order[1:]
		if l.refs = l.refs[1:]; len(l.refs) == 0 && r.m[l.tp] == l {
			delete(r.m, l.tp)
		}
	}
}

// clear forgets everything.
func (r *recentIndex) clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.m, r.order = nil, nil
}

// find returns up to max refs from the one that holds `from` on.
func (r *recentIndex) find(tp record.TopicPartition, from record.Offset, max int, out []state.HotRef) []state.HotRef {
	r.mu.RLock()
	defer r.mu.RUnlock()
	l := r.m[tp]
	if l == nil {
		return out
	}
	i := sort.Search(len(l.refs), func(i int) bool { return l.endOf(i) > from })
	if i == len(l.refs) || l.refs[i].base > from {
		return out
	}
	for ; i < len(l.refs) && max > 0; i++ {
		d := &l.refs[i]
		out = append(out, state.HotRef{Index: state.RaftIndex(d.index), Term: state.Term(d.term), Base: d.base, End: l.endOf(i), First: int(d.first), Count: int(d.count)})
		max--
	}
	return out
}
