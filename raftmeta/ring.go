package raftmeta

import "sync"

// entryBytes is a committed entry as a follower holds it; its bytes must not be changed.
type entryBytes struct {
	index, term   uint64
	data, payload []byte
	whole         bool // the payload is here, or there is none
}

// ring holds the newest entries that were put into it, up to a number of bytes: a buffer that an entry aliases counts once, with what it holds.
type ring struct {
	limit int64

	mu    sync.RWMutex
	m     map[uint64]*entryBytes
	order []*entryBytes // oldest first
	bytes int64
}

func newRing(limit int64) *ring { return &ring{limit: limit, m: map[uint64]*entryBytes{}} }

// entryCost is what an entry needs beside its bytes.
const entryCost = 200

func (e *entryBytes) size() int64 { return int64(len(e.data)+len(e.payload)) + entryCost }

// put adds an entry, in the place of one with its index; the oldest make room. It returns the index of the oldest that is left.
func (r *ring) put(e *entryBytes) (oldest uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.m[e.index] = e
	r.order = append(r.order, e)
	r.bytes += e.size()
	for r.bytes > r.limit && len(r.order) > 1 {
		x := r.order[0]
		r.order[0] = nil
		r.order = r.order[1:]
		r.bytes -= x.size()
		if r.m[x.index] == x {
			delete(r.m, x.index)
		}
	}
	return r.order[0].index
}

// get returns the entry with this index and term; nil if it is not here.
func (r *ring) get(index, term uint64) *entryBytes {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if e := r.m[index]; e != nil && e.term == term {
		return e
	}
	return nil
}

// clear empties the ring.
func (r *ring) clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.m)
	r.order, r.bytes = nil, 0
}
