package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// feedBytes of the newest entries' Data wait for the slowest follower of a group: who is further behind is cut off. feedPayload of the newest payload wait with them: older
	// entries go without.
	feedBytes   = 8 << 20
	feedPayload = 16 << 20
	// feedEntries bounds the entries that wait.
	feedEntries = 1 << 16
	// feedWrite is what goes into one write.
	feedWrite = 1 << 20
	// statesMax bounds the states that are being sent.
	statesMax = 4
	// feedsMax bounds the connections of followers, queriesMax the questions of all of them that are being answered, answersMax the bytes of answers to one that it has not taken.
	feedsMax   = 512
	queriesMax = 64
	answersMax = 16 << 20
)

// Why a follower's feed was ended.
var (
	errSlow     = errors.New("peer: the follower is too slow")
	errReplaced = errors.New("peer: the state was replaced by a snapshot")
	errNoFeed   = errors.New("no group of that number here")
)

// Source is where the feed of a group comes from.
type Source interface {
	// Publisher is where the group's entries are published.
	Publisher() *Publisher
	// Begin calls mark with the position of the state at a moment at which nothing is applied, and returns how whoever stands at `from` gets to that position.
	Begin(from Position, mark func(at Position)) (Start, error)
	// Reach is how far the group is; see the type.
	Reach(ctx context.Context) Reach
	// Bytes reads from an entry at most as many bytes as are asked for.
	Bytes(a BytesAsked) (EntryBytes, error)
}

// Start is how a follower gets to where its subscription begins: by a state, or, if that is nil, by entries.
type Start struct {
	State   io.WriterTo
	Entries []FeedEntry
}

// Publisher gives a group's entries to its followers. What waits for them is there once, however many they are.
type Publisher struct {
	group uint32

	mu      sync.Mutex
	subs    map[*subscription]struct{}
	at      Position // of the newest item
	items   []*item  // only while there are followers
	first   uint64   // number of items[0]
	plain   uint64   // number of the first item that may hold its payload
	data    int      // bytes of Data in items
	payload int
}

// item is an entry that waits. Its frames are made when the first follower takes it.
type item struct {
	FeedEntry
	bare *frameSet // without the payload
	full *frameSet // nil if there is none, or it has been given up
}

type frameSet struct {
	once sync.Once
	bufs net.Buffers
	size int
}

func (f *frameSet) of(group uint32, e *FeedEntry) *frameSet {
	f.once.Do(func() {
		f.bufs = encodeEntry(group, e)
		for _, b := range f.bufs {
			f.size += len(b)
		}
	})
	return f
}

// subscription is a follower's place.
type subscription struct {
	p       *Publisher
	payload bool
	next    uint64 // number of the item that it has not taken
	waits   bool
	woken   chan struct{}
	err     error
}

// NewPublisher returns the publisher of a group.
func NewPublisher(group uint32) *Publisher {
	return &Publisher{group: group, subs: map[*subscription]struct{}{}}
}

// Publish takes a command that was applied. Calls are in the order of the log, and none runs beside Source.Begin's mark.
func (p *Publisher) Publish(e FeedEntry) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.subs) == 0 {
		return
	}
	p.at = Position{e.Index, e.Chain}
	x := &item{FeedEntry: e, bare: &frameSet{}}
	if len(e.Payload) > 0 {
		x.full = &frameSet{}
		p.payload += len(e.Payload)
	}
	p.items = append(p.items, x)
	p.data += len(e.Data)
	p.trimLocked()
	for s := range p.subs {
		if s.next < p.first {
			p.endLocked(s, errSlow)
		} else if s.waits {
			s.waits = false
			s.woken <- struct{}{}
		}
	}
}

// trimLocked gives up what is beyond the limits; the newest item stays.
func (p *Publisher) trimLocked() {
	end := p.first + uint64(len(p.items))
	for ; p.payload > feedPayload && p.plain < end-1; p.plain++ {
		if x := p.items[p.plain-p.first]; x.full != nil {
			p.payload -= len(x.Payload)
			bare := *x // whoever is about to write the old one goes on with it
			bare.full, bare.Payload = nil, nil
			p.items[p.plain-p.first] = &bare
		}
	}
	for len(p.items) > 1 && (p.data > feedBytes || len(p.items) > feedEntries) {
		p.dropLocked()
	}
}

func (p *Publisher) dropLocked() {
	x := p.items[0]
	p.items[0] = nil
	p.items = p.items[1:]
	p.first++
	p.plain = max(p.plain, p.first)
	p.data -= len(x.Data)
	if x.full != nil {
		p.payload -= len(x.Payload)
	}
}

// Reset ends all feeds: the state is another from now on.
func (p *Publisher) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.subs {
		p.endLocked(s, errReplaced)
	}
}

// Followers is how many there are.
func (p *Publisher) Followers() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.subs)
}

// subscribe adds a follower that has all up to a position, the newest.
func (p *Publisher) subscribe(at Position, payload bool) *subscription {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &subscription{p: p, payload: payload, woken: make(chan struct{}, 1), next: p.first + uint64(len(p.items))}
	p.subs[s] = struct{}{}
	p.at = at
	return s
}

func (s *subscription) close() {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.p.endLocked(s, ErrClosed)
}

func (p *Publisher) endLocked(s *subscription, err error) {
	if s.err != nil {
		return
	}
	s.err = err
	delete(p.subs, s)
	if s.waits {
		s.waits = false
		s.woken <- struct{}{}
	}
	for len(p.items) > 0 && p.takenLocked() {
		p.dropLocked()
	}
}

// takenLocked reports whether every follower has the oldest item.
func (p *Publisher) takenLocked() bool {
	for s := range p.subs {
		if s.next <= p.first {
			return false
		}
	}
	return true
}

// take returns the next frames, or where the feed stands if there are none for longer than idle.
func (s *subscription) take(ctx context.Context, idle time.Duration, bufs net.Buffers) (net.Buffers, error) {
	timer := time.NewTimer(idle)
	defer timer.Stop()
	for {
		items, at, err := s.waiting()
		if err != nil {
			return nil, err
		}
		for _, f := range items {
			bufs = append(bufs, f.bufs...)
		}
		if len(items) > 0 {
			return bufs, nil
		}
		select {
		case <-s.woken:
		case <-timer.C:
			s.p.mu.Lock()
			s.waits = false
			select { // it was woken at the same moment
			case <-s.woken:
			default:
			}
			none := s.err == nil && s.next == s.p.first+uint64(len(s.p.items))
			s.p.mu.Unlock()
			if none {
				return append(bufs, encodeIdle(s.p.group, at)...), nil
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// waiting takes entries up to about feedWrite; with none the follower waits, and `at` is where it stands.
func (s *subscription) waiting() (sets []*frameSet, at Position, err error) {
	p := s.p
	p.mu.Lock()
	if s.err != nil {
		p.mu.Unlock()
		return nil, at, s.err
	}
	var items []*item
	for n := 0; s.next < p.first+uint64(len(p.items)) && n < feedWrite; s.next++ {
		x := p.items[s.next-p.first]
		if n += len(x.Data) + entryPartMeta; s.payload {
			n += len(x.Payload)
		}
		items = append(items, x)
	}
	s.waits = len(items) == 0
	at = p.at
	for len(p.items) > 0 && p.takenLocked() {
		p.dropLocked()
	}
	p.mu.Unlock()
	for _, x := range items { // not under the lock: whoever comes first makes the frames
		if s.payload && x.full != nil {
			sets = append(sets, x.full.of(p.group, &x.FeedEntry))
			continue
		}
		bare := x.FeedEntry
		bare.Payload = nil
		sets = append(sets, x.bare.of(p.group, &bare))
	}
	return sets, at, nil
}

// feed serves a follower's connection: one group, until either side ends it.
func (x *inbound) feed() error {
	p := x.p
	a := newAssembler(x.c, answerBuffer, p.times.body)
	a.late(p.times.hello)
	m, err := a.next()
	if err != nil {
		return err
	}
	a.late(0)
	if m.kind != kindFollow || m.flags != 0 {
		return fmt.Errorf("%w: %s on a connection for a feed", ErrFrame, m.kind)
	}
	from, payload, err := decodeFollow(m.body)
	if err != nil {
		return err
	}
	p.follows(x, m.group)
	src := p.source(m.group)
	if src == nil {
		return errors.Join(errNoFeed, x.put(net.Buffers{appendAnswer(nil, &m.header, nil, errNoFeed)}))
	}
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	p.wg.Go(func() { // the other side says nothing more
		defer cancel()
		if _, err := a.next(); err == nil {
			p.cfg.Logger.Warn("a follower speaks where it should listen", "component", "peer", "peer", x.from)
		}
		x.abort()
	})
	switch err = x.begin(ctx, m, src, from, payload); {
	case errors.Is(err, errSlow):
		p.m.feedResets.WithLabelValues("slow").Inc()
	case errors.Is(err, errReplaced):
		p.m.feedResets.WithLabelValues("snapshot").Inc()
	}
	return err
}

// follows ends an older feed of the same follower and group: what its end has forgotten.
func (p *Peers) follows(x *inbound, group uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	x.group = group
	for o := range p.in {
		if o != x && o.cl == classFeed && o.from == x.from && o.group == group && o.c != nil {
			p.wg.Go(o.abort)
		}
	}
}

func (p *Peers) source(group uint32) Source {
	if p.cfg.Source == nil {
		return nil
	}
	return p.cfg.Source(group)
}

// begin sends what lies before the subscription, and then what comes.
func (x *inbound) begin(ctx context.Context, m *message, src Source, from Position, payload bool) error {
	select {
	case x.p.states <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	sub, err := x.lead(m, src, from, payload)
	<-x.p.states
	if err != nil {
		return err
	}
	defer sub.close()
	var bufs net.Buffers
	for idle := time.Duration(0); ; idle = x.p.times.idle { // at once where it stands, if nothing follows
		if bufs, err = sub.take(ctx, idle, bufs[:0]); err != nil {
			return err
		}
		if err := x.put(bufs); err != nil {
			return err
		}
	}
}

// lead sends how the follower gets to where its subscription begins.
func (x *inbound) lead(m *message, src Source, from Position, payload bool) (sub *subscription, err error) {
	var at Position
	start, err := src.Begin(from, func(p Position) { at, sub = p, src.Publisher().subscribe(p, payload) })
	if err != nil {
		if sub != nil {
			sub.close()
		}
		return nil, errors.Join(err, x.put(net.Buffers{appendAnswer(nil, &m.header, nil, err)}))
	}
	how := byte(followGoesOn)
	if start.State != nil {
		how = followState
	}
	if err = x.put(net.Buffers{appendAnswer(nil, &m.header, []byte{statusOK, how}, nil)}); err == nil {
		err = x.catchUp(m.group, at, &start)
	}
	if err != nil {
		sub.close()
		return nil, err
	}
	return sub, nil
}

func (x *inbound) catchUp(group uint32, at Position, start *Start) error {
	if start.State != nil {
		w := &stateWriter{x: x, group: group, of: at, until: time.Now().Add(x.p.times.state)}
		if _, err := start.State.WriteTo(w); err != nil {
			return err
		}
		return w.piece(nil, true)
	}
	for i := range start.Entries {
		if err := x.put(encodeEntry(group, &start.Entries[i])); err != nil {
			return err
		}
	}
	return nil
}

// stateWriter sends a state in pieces.
type stateWriter struct {
	x     *inbound
	group uint32
	of    Position
	at    uint64
	until time.Time
}

// Write implements io.Writer.
func (w *stateWriter) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		k := min(len(b)-n, chunkMax-stateMeta)
		err = w.piece(b[n:n+k], false)
		n += k
	}
	return n, err
}

func (w *stateWriter) piece(b []byte, last bool) error {
	if time.Now().After(w.until) {
		return errSlow
	}
	bufs := encodeState(w.group, w.of, w.at, last, b)
	w.at += uint64(len(b))
	return w.x.put(bufs)
}

// put writes buffers, which it leaves as they are: others may be about to write them too.
func (x *inbound) put(bufs net.Buffers) error {
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	x.fed.Add(float64(n))
	x.scratch = append(x.scratch[:0], bufs...)
	return x.p.flush(x.c, x.records, x.scratch)
}

// query answers a follower's question, beside others: it may take a majority, or the disk.
func (x *inbound) query(m *message) error {
	select {
	case x.p.queries <- struct{}{}:
	default:
		x.answer(m, nil, errors.New("too many questions"))
		return nil
	}
	x.p.wg.Go(func() {
		defer func() { <-x.p.queries }()
		b, err := x.reply(m)
		x.fed.Add(float64(frameHeader + len(b)))
		x.answer(m, b, err)
		x.mu.Lock()
		stuck := len(x.out) > answersMax
		x.mu.Unlock()
		if stuck {
			x.abort()
		}
	})
	return nil
}

func (x *inbound) reply(m *message) ([]byte, error) {
	src := x.p.source(m.group)
	if src == nil {
		return nil, errNoFeed
	}
	if m.kind == kindReach {
		ctx, cancel := context.WithTimeout(x.p.ctx, x.p.times.vote)
		defer cancel()
		return encodeReach(src.Reach(ctx)), nil
	}
	a, err := decodeBytesAsked(m.body)
	if err != nil {
		return nil, err
	}
	a.Len = min(a.Len, bytesMax)
	e, err := src.Bytes(a)
	if err != nil {
		return nil, err
	}
	return encodeBytes(&e), nil
}

func nodeLabel(server string) string {
	node, _, _ := cutServer(server)
	return node
}
