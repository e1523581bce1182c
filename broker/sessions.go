package broker

import (
	"container/list"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/estran/estran/tiering/record"
)

// sessionsMax bounds the fetch sessions of a broker; the longest unused one goes. sessionParts bounds the partitions of one, sessionPartsAll of all together: a client makes as many
// sessions as it likes, of partitions that need not exist.
const (
	sessionsMax     = 1000
	sessionParts    = 100_000
	sessionPartsAll = 1_000_000
)

// sessions are the incremental fetch sessions (KIP-227).
type sessions struct {
	mu    sync.Mutex
	limit int
	m     map[int32]*list.Element
	order *list.List // of *session, newest first
	most  int        // partitions of all together
	parts int        // so many there are
}

// session remembers what a client fetches and what it was told, so that later fetches name only changes. One request at a time uses it.
type session struct {
	id    int32
	epoch int32 // the next that is accepted
	byID  bool
	parts []*sessionPart // in the order in which they are read
	index map[partKey]*sessionPart
	full  bool // this request is a full one: everything is sent
	owner *conn
	count int // of its partitions, in sessions.parts; guarded by sessions.mu
}

type partKey struct {
	name      string
	id        record.TopicID
	partition int32
}

type sessionPart struct {
	fetchPart
	key         partKey
	sent        bool
	forgotten   bool
	high, start record.Offset // as last sent
}

func newSessions(limit, parts int) *sessions {
	return &sessions{limit: limit, most: parts, m: map[int32]*list.Element{}, order: list.New()}
}

func keyOf(p *fetchPart) partKey { return partKey{p.name, p.id, p.partition} }

// begin finds or makes the session of a request and returns the partitions to read. A nil session is sessionless.
func (s *sessions) begin(f *fetchRequest, byID bool, c *conn) (*session, []*fetchPart, int16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case f.epoch == -1:
		s.removeLocked(f.session)
		return nil, pointers(f.parts), codeNone
	case f.epoch == 0:
		s.removeLocked(f.session)
		if len(f.parts) > sessionParts {
			return nil, pointers(f.parts), codeNone
		}
		ses := s.makeLocked(byID, c)
		s.updateLocked(ses, f)
		ses.full = true
		return ses, ses.pointers(), codeNone
	}
	e := s.m[f.session]
	if e == nil {
		return nil, nil, codeFetchSessionNotFound
	}
	ses := e.Value.(*session)
	switch {
	case ses.owner != c || f.epoch != ses.epoch:
		return nil, nil, codeInvalidFetchSessionEpoch
	case ses.byID != byID:
		return nil, nil, codeInconsistentTopicID
	}
	s.order.MoveToFront(e)
	if ses.epoch++; ses.epoch <= 0 {
		ses.epoch = 1
	}
	ses.full = false
	s.updateLocked(ses, f)
	return ses, ses.pointers(), codeNone
}

func pointers(parts []fetchPart) []*fetchPart {
	out := make([]*fetchPart, len(parts))
	for i := range parts {
		out[i] = &parts[i]
	}
	return out
}

func (s *sessions) makeLocked(byID bool, c *conn) *session {
	id := int32(0)
	for id == 0 || s.m[id] != nil {
		id = rand.Int32()
	}
	ses := &session{id: id, epoch: 1, byID: byID, index: map[partKey]*sessionPart{}, owner: c}
	s.m[id] = s.order.PushFront(ses)
	for s.order.Len() > s.limit {
		s.removeLocked(s.order.Back().Value.(*session).id)
	}
	return ses
}

// updateLocked changes a session, which is the newest, and lets those go that there is no room for beside it.
func (s *sessions) updateLocked(ses *session, f *fetchRequest) {
	ses.update(f)
	s.parts += len(ses.parts) - ses.count
	ses.count = len(ses.parts)
	for s.parts > s.most && s.order.Len() > 1 {
		s.removeLocked(s.order.Back().Value.(*session).id)
	}
}

func (s *sessions) removeLocked(id int32) {
	if e := s.m[id]; e != nil {
		s.parts -= e.Value.(*session).count
		s.order.Remove(e)
		delete(s.m, id)
	}
}

// drop removes the sessions of a connection that has ended.
func (s *sessions) drop(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for e := s.order.Front(); e != nil; {
		next := e.Next()
		if ses := e.Value.(*session); ses.owner == c {
			s.removeLocked(ses.id)
		}
		e = next
	}
}

// update adds, changes and forgets partitions.
func (x *session) update(f *fetchRequest) {
	for i := range f.parts {
		p := f.parts[i]
		key := keyOf(&p)
		old := x.index[key]
		if old == nil {
			if len(x.parts) >= sessionParts {
				continue
			}
			old = &sessionPart{key: key}
			x.index[key] = old
			x.parts = append(x.parts, old)
		}
		old.epoch, old.offset, old.lastEpoch, old.maxBytes = p.epoch, p.offset, p.lastEpoch, p.maxBytes
		old.name, old.id, old.partition = p.name, p.id, p.partition
	}
	for i := range f.forgotten {
		key := keyOf(&f.forgotten[i])
		if old := x.index[key]; old != nil {
			old.forgotten = true
			delete(x.index, key)
		}
	}
	if len(f.forgotten) > 0 {
		x.parts = slices.DeleteFunc(x.parts, func(p *sessionPart) bool { return p.forgotten })
	}
}

func (x *session) pointers() []*fetchPart {
	out := make([]*fetchPart, len(x.parts))
	for i, p := range x.parts {
		out[i] = &p.fetchPart
	}
	return out
}

func (x *session) idOf() int32 {
	if x == nil {
		return 0
	}
	return x.id
}

// changed picks the partitions that an answer must contain: those with data, an error, or offsets that the client does not know yet. Without a session it is all.
func (x *session) changed(parts []*fetchPart) []*fetchPart {
	if x == nil {
		return parts
	}
	out := parts[:0:0]
	for _, p := range x.parts {
		if x.full || !p.sent || p.res.Bytes > 0 || p.code != codeNone || p.diverging != nil || p.fetchPart.high != p.high || p.logStart != p.start {
			out = append(out, &p.fetchPart)
			p.sent = p.code == codeNone
			p.high, p.start = p.fetchPart.high, p.logStart
		}
	}
	return out
}

// rotate moves partitions that gave data to the end, so that none starves behind those before it.
func (x *session) rotate() {
	k := 0
	for k < len(x.parts) && x.parts[k].res.Bytes > 0 {
		k++
	}
	if k > 0 && k < len(x.parts) {
		x.parts = append(x.parts[k:len(x.parts):len(x.parts)], x.parts[:k]...)
	}
}
