package peer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// waitingMax bounds the messages of a group that wait for its raft: more than any window.
	waitingMax   = 256
	waitingBytes = 64 << 20
	readBuffer   = 64 << 10
)

// inbound is a connection that a peer has made. Its reader never waits for a group.
type inbound struct {
	p    *Peers
	raw  net.Conn // as it was accepted
	c    net.Conn // raw, or TLS around it; set before anything is answered
	from string   // with cl, written under p.mu
	cl   class
	// Of a follower's: what it gets is counted and, on a feed, put together here; group is whose feed it is, under p.mu.
	group   uint32
	fed     prometheus.Counter
	records *bufio.Writer
	scratch net.Buffers
	done    chan struct{}
	once    sync.Once

	mu    sync.Mutex
	cond  *sync.Cond
	queue map[uint32]*inQueue
	out   []byte // answers that wait for the writer
}

// inQueue is what one group has been sent.
type inQueue struct {
	waiting []*message
	bytes   int
	busy    bool
}

func newInbound(p *Peers, c net.Conn) *inbound {
	x := &inbound{p: p, raw: c, done: make(chan struct{}), queue: map[uint32]*inQueue{}}
	x.cond = sync.NewCond(&x.mu)
	return x
}

func (x *inbound) abort() {
	x.once.Do(func() {
		close(x.done)
		_ = x.raw.Close()
		x.mu.Lock()
		x.cond.Broadcast()
		x.mu.Unlock()
	})
}

func (x *inbound) serve() {
	err := x.run()
	x.abort()
	p := x.p
	p.mu.Lock()
	delete(p.in, x)
	p.knownLocked(x)
	p.mu.Unlock()
	if p.ctx.Err() != nil {
		return
	}
	p.cfg.Logger.Debug("a peer's connection ended", "component", "peer", "peer", x.from, "class", x.cl, "addr", x.raw.RemoteAddr().String(), "err", err)
	if x.from != "" && !x.cl.follows() && !errors.Is(err, ErrFrame) && !errors.Is(err, ErrVersion) {
		p.lost(x.from)
	}
}

// prove finds out who has made the connection; from stays "" if nobody is to be heard on it.
func (x *inbound) prove() error {
	ctx, cancel := context.WithTimeout(x.p.ctx, x.p.times.hello)
	defer cancel()
	c, err := x.p.secure(ctx, x.raw, false)
	if err != nil {
		return err
	}
	from, cl, err := x.p.receive(c)
	if err != nil || cl == classAsk {
		return err
	}
	x.p.mu.Lock()
	x.c, x.from, x.cl = c, from, cl
	x.p.mu.Unlock()
	return x.p.proven(x)
}

func (x *inbound) run() (err error) {
	if err := x.prove(); err != nil || x.from == "" {
		return err
	}
	if x.cl.follows() {
		x.fed = x.p.m.feedBytes.WithLabelValues(nodeLabel(x.from))
	}
	if x.cl == classFeed {
		x.records = recordsOf(x.c)
		return x.feed()
	}
	x.p.wg.Go(x.write)
	a := newAssembler(x.c, readBuffer, x.p.times.body)
	a.get = x.p.cfg.GetBuffer
	for {
		m, err := a.next()
		if err != nil {
			return err
		}
		if m.flags&flagAnswer != 0 {
			return fmt.Errorf("%w: an answer to nothing", ErrFrame)
		}
		if err := x.dispatch(m); err != nil {
			return err
		}
	}
}

// dispatch hands a message to its group's goroutine. What is answered outside raft is answered here.
func (x *inbound) dispatch(m *message) error {
	if asks := m.kind == kindReach || m.kind == kindBytes; asks != (x.cl == classQuery) || m.kind == kindFollow || m.kind == kindPart {
		return fmt.Errorf("%w: %s on a connection of class %s", ErrFrame, m.kind, x.cl)
	} else if asks {
		return x.query(m)
	}
	if m.kind == kindTerm {
		x.answer(m, x.p.standingOf(m.group), nil)
		return nil
	}
	if m.kind == kindForward {
		return x.forward(m)
	}
	if m.kind == kindAppend { // before it waits for raft, which may be waiting for the disk
		if g := x.p.group(m.group); g != nil {
			g.contact.spoke(x.from)
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	q := x.queue[m.group]
	if q == nil {
		if x.p.group(m.group) == nil {
			x.answerLocked(m, nil, fmt.Errorf("no group %d here", m.group))
			return nil
		}
		q = &inQueue{}
		x.queue[m.group] = q
	}
	if x.cl == classBeat && len(q.waiting) > 0 { // whoever sent the older ones has given them up
		q.waiting, q.bytes = q.waiting[:0], 0
	}
	q.waiting, q.bytes = append(q.waiting, m), q.bytes+len(m.body)
	if len(q.waiting) > waitingMax || q.bytes > waitingBytes {
		return fmt.Errorf("%w: %d messages of %d bytes wait for group %d", ErrFrame, len(q.waiting), q.bytes, m.group)
	}
	if !q.busy {
		q.busy = true
		x.p.wg.Go(func() { x.work(m.group, q) })
	}
	return nil
}

// forward does what a peer asks for on behalf of its clients. It may take long, so nothing waits behind it.
func (x *inbound) forward(m *message) error {
	if x.p.cfg.OnForward == nil {
		x.answer(m, nil, errors.New("nothing is forwarded here"))
		return nil
	}
	select {
	case x.p.forwards <- struct{}{}:
	default:
		x.answer(m, nil, errors.New("too much is being forwarded"))
		return nil
	}
	x.p.wg.Go(func() {
		defer func() { <-x.p.forwards }()
		ctx, cancel := context.WithTimeout(x.p.ctx, forwardTime)
		defer cancel()
		b, err := x.p.cfg.OnForward(ctx, m.group, m.body)
		x.answer(m, append([]byte{statusOK}, b...), err)
	})
	return nil
}

// work handles a group's messages in order, until none waits.
func (x *inbound) work(group uint32, q *inQueue) {
	for {
		x.mu.Lock()
		if len(q.waiting) == 0 {
			q.busy = false
			x.mu.Unlock()
			return
		}
		m := q.waiting[0]
		q.waiting, q.bytes = q.waiting[1:], q.bytes-len(m.body)
		x.mu.Unlock()
		var answer []byte
		err := errors.New("the group is closed")
		if g := x.p.group(group); g != nil {
			answer, err = g.handle(x, m)
			if m.lent && m.idle {
				x.p.cfg.PutBuffer(m.body)
				m.body = nil
			}
		}
		select {
		case <-x.done:
			return
		default:
			x.answer(m, answer, err)
		}
	}
}

func (x *inbound) answer(m *message, body []byte, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.answerLocked(m, body, err)
}

func (x *inbound) answerLocked(m *message, body []byte, err error) {
	x.out = appendAnswer(x.out, &m.header, body, err)
	x.cond.Broadcast()
}

// appendAnswer appends the frame that answers a request: with body, or with why there is none.
func appendAnswer(out []byte, asked *header, body []byte, err error) []byte {
	if err == nil && len(body) > int(asked.kind.most(true)) {
		err = fmt.Errorf("an answer of %d bytes", len(body))
	}
	if err != nil {
		body = append([]byte{statusRefused}, err.Error()...)
		body = body[:min(len(body), 1000)]
	}
	n := uint32(len(body))
	h := header{kind: asked.kind, flags: flagAnswer, length: n, group: asked.group, id: asked.id, total: n, meta: n, metaCRC: crcOf(body)}
	at := len(out)
	out = append(out, make([]byte, frameHeader)...)
	h.encode(out[at:])
	return append(out, body...)
}

// write sends answers; those that are ready together leave in one write.
func (x *inbound) write() {
	var b []byte
	for {
		x.mu.Lock()
		for len(x.out) == 0 && !x.ended() {
			x.cond.Wait()
		}
		b, x.out = x.out, b[:0]
		x.mu.Unlock()
		if x.ended() {
			return
		}
		err := x.c.SetWriteDeadline(time.Now().Add(x.p.times.write))
		if err == nil {
			_, err = x.c.Write(b)
		}
		if err != nil {
			x.abort()
			return
		}
	}
}

func (x *inbound) ended() bool {
	select {
	case <-x.done:
		return true
	default:
		return false
	}
}

var _ io.Closer = (*Peers)(nil)
