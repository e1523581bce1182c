package peer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Errors of a call.
var (
	// ErrTimeout: no answer in time; whether the peer has acted is unknown.
	ErrTimeout = errors.New("peer: no answer in time")
	// ErrClosed: this node is closing.
	ErrClosed = errors.New("peer: closed")
	errBroken = errors.New("peer: connection broken")
)

const (
	// writeMost is what goes into one write.
	writeMost = 1 << 20
	// answerBuffer is for reading answers, which are small.
	answerBuffer = 16 << 10
	// recordBytes is the most that a TLS record holds: shorter pieces of a message share one.
	recordBytes = 16 << 10
)

// times bound everything that waits for a peer.
type times struct {
	dial, hello, redial time.Duration
	// write bounds one write; body what is left of a frame that has begun to arrive.
	write, body time.Duration
	// call bounds a call: a peer's disk may stall for a while. beat and vote are for those that the peer answers at once. Whoever is silent for as long as a call takes has lost
	// its connection.
	call, beat, vote time.Duration
	// hold is how long an append that tells a peer nothing new may wait for one that does.
	hold time.Duration
	// silent is how long a leader may say nothing before it is not protected any more: several heartbeats, and less than any timer that makes a follower stand for election.
	silent time.Duration
	// contact is a leader's lease: whoever has not answered an append of the group for longer is not in contact. told is how long what a leader said of its contacts counts.
	contact, told time.Duration
	// rank lies between the elections that a leader's death sets off.
	rank time.Duration
	// catchUp is how long the log waits for a peer that is behind.
	catchUp time.Duration
	// state bounds the sending of a state to a follower. idle is after how long a feed says that there is nothing; a feed that says nothing for `dead` leads nowhere.
	state, idle, dead time.Duration
	// step bounds a piece of a snapshot, restore the last one, in which raft restores it.
	step, restore time.Duration
}

func defaultTimes() times {
	return times{dial: 2 * time.Second, hello: 3 * time.Second, redial: 50 * time.Millisecond, write: 10 * time.Second, body: 10 * time.Second,
		call: 10 * time.Second, beat: 2 * time.Second, vote: 2 * time.Second, hold: 50 * time.Millisecond, silent: 300 * time.Millisecond,
		contact: 500 * time.Millisecond, told: time.Second, rank: 50 * time.Millisecond, catchUp: 2 * time.Second, state: time.Minute, idle: time.Second, dead: 4 * time.Second, step: 10 * time.Second, restore: 2 * time.Minute}
}

// slower is for a simulation of days: whoever is written to so seldom may be silent for so much longer.
func (t times) slower(n int) times {
	for _, d := range []*time.Duration{&t.dial, &t.hello, &t.redial, &t.write, &t.body, &t.call, &t.beat, &t.vote, &t.hold, &t.silent, &t.contact, &t.told, &t.rank, &t.catchUp, &t.state, &t.idle, &t.dead, &t.step, &t.restore} {
		*d *= time.Duration(n)
	}
	return t
}

// call is a request that is on its way. done is called once, on whatever goroutine; it must not block.
type call struct {
	kind  kind
	group uint32
	meta  []byte
	bulk  net.Buffers
	size  int // of bulk
	done  func(answer []byte, err error)

	id    uint64
	sent  int    // bytes of the message that were written
	heard uint64 // answers of the link when it was begun
	timer *time.Timer
	over  bool
}

// link is the connection of one class to one peer. It is made when there is something to say and made again when it breaks.
type link struct {
	p      *Peers
	target string
	class  class

	mu      sync.Mutex
	cond    *sync.Cond
	queues  map[uint32][]*call // by group, oldest first
	turn    []uint32           // groups with something to write, in the order in which they are served
	pending map[uint64]*call   // written at least in part, not answered
	next    uint64
	conn    net.Conn
	heard   uint64 // answers
	closed  bool
}

func newLink(p *Peers, target string, cl class) *link {
	l := &link{p: p, target: target, class: cl, queues: map[uint32][]*call{}, pending: map[uint64]*call{}}
	l.cond = sync.NewCond(&l.mu)
	return l
}

// submit sends a call; it fails after limit.
func (l *link) submit(c *call, limit time.Duration) {
	l.mu.Lock()
	if l.closed {
		c.over = true
		l.mu.Unlock()
		c.done(nil, ErrClosed)
		return
	}
	l.next++
	c.id = l.next
	if len(l.queues[c.group]) == 0 {
		l.turn = append(l.turn, c.group)
	}
	l.queues[c.group] = append(l.queues[c.group], c)
	c.timer = time.AfterFunc(limit, func() { l.late(c, limit) })
	l.cond.Broadcast()
	l.mu.Unlock()
}

// late ends a call whose time is over. If nothing at all was heard since it was written, the connection leads nowhere: TCP might go on repeating for a quarter of an hour.
func (l *link) late(c *call, limit time.Duration) {
	l.mu.Lock()
	if c.sent > 0 && !c.over && c.heard == l.heard && l.conn != nil {
		_ = l.conn.Close() // its reader ends, then its writer
	}
	l.mu.Unlock()
	l.finish(c, nil, fmt.Errorf("%w: %s to %s after %s", ErrTimeout, c.kind, l.target, limit))
}

// ask is submit that waits.
func (l *link) ask(c *call, limit time.Duration) (answer []byte, err error) {
	return l.askUntil(c, limit, nil)
}

// askUntil also ends when closed does, whatever was submitted before or after.
func (l *link) askUntil(c *call, limit time.Duration, closed <-chan struct{}) (answer []byte, err error) {
	done := make(chan struct{})
	began := time.Now()
	c.done = func(a []byte, e error) { answer, err = a, e; close(done) }
	l.submit(c, limit)
	select {
	case <-done:
	case <-closed:
		l.finish(c, nil, ErrClosed)
		<-done
	}
	l.p.observe(l.target, c.kind, began, err)
	return answer, err
}

// finish ends a call, if nothing has.
func (l *link) finish(c *call, answer []byte, err error) {
	l.mu.Lock()
	over := c.over
	c.over = true
	delete(l.pending, c.id)
	if !over && c.sent == 0 { // it was never begun: it must not be
		l.dropLocked(c)
	}
	l.mu.Unlock()
	if over {
		return
	}
	c.timer.Stop()
	c.done(answer, err)
}

func (l *link) dropLocked(c *call) {
	q := l.queues[c.group]
	for i, x := range q {
		if x == c {
			l.queues[c.group] = append(q[:i:i], q[i+1:]...)
			break
		}
	}
	if len(l.queues[c.group]) == 0 {
		delete(l.queues, c.group)
		for i, g := range l.turn {
			if g == c.group {
				l.turn = append(l.turn[:i:i], l.turn[i+1:]...)
				break
			}
		}
	}
}

// run writes until close. What was begun on a connection that broke fails; what waits goes over the next one.
func (l *link) run() {
	for {
		l.mu.Lock()
		for len(l.turn) == 0 && !l.closed {
			l.cond.Wait()
		}
		closed := l.closed
		l.mu.Unlock()
		if closed {
			return
		}
		c, err := l.dial()
		if err != nil {
			l.p.cfg.Logger.Debug("no connection to a peer", "peer", l.target, "class", l.class, "err", err)
			if errors.Is(err, ErrGone) {
				l.giveUp(err, func(k kind) bool { return k == kindTerm || k == kindForward || k == kindReach || k == kindBytes })
			}
			if !l.p.pause(l.p.times.redial) { // calls wait for their time: raft backs off for seconds if they fail at once
				return
			}
			continue
		}
		var read sync.WaitGroup
		read.Go(func() { l.read(c) })
		err = l.write(c)
		_ = c.Close() // ends the reader
		read.Wait()
		l.broke(fmt.Errorf("%w: %w", errBroken, err))
	}
}

// giveUp fails what waits, of some kinds. To a server that is gone these are questions, whose asker waits; raft's own calls wait as ever, since raft backs off from errors.
func (l *link) giveUp(err error, which func(kind) bool) {
	l.mu.Lock()
	var waiting []*call
	for _, q := range l.queues {
		waiting = append(waiting, q...)
	}
	l.mu.Unlock()
	for _, c := range waiting {
		if which(c.kind) {
			l.finish(c, nil, err)
		}
	}
}

// pause waits; false = the node closes.
func (p *Peers) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-p.ctx.Done():
		return false
	}
}

func (l *link) dial() (net.Conn, error) {
	c, err := l.p.dial(l.target)
	if err != nil {
		return nil, err
	}
	if err := l.p.introduce(c, l.target, l.class); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errors.Join(ErrClosed, c.Close())
	}
	l.conn = c
	return c, nil
}

// dial connects to a peer, with TLS if there is to be, without a handshake of ours.
func (p *Peers) dial(target string) (net.Conn, error) {
	addr, ok := p.cfg.Resolve(target)
	if !ok {
		return nil, fmt.Errorf("peer: no address of %s", target)
	}
	ctx, cancel := context.WithTimeout(p.ctx, p.times.dial)
	defer cancel()
	return p.connect(ctx, addr)
}

func (p *Peers) connect(ctx context.Context, addr string) (net.Conn, error) {
	raw, err := p.cfg.Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	c, err := p.secure(ctx, raw, true)
	if err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return c, nil
}

// write sends what waits, group after group, a chunk of each at a time.
func (l *link) write(c net.Conn) error {
	heads := make([]byte, 0, frameHeader*(writeMost/chunkMax+8))
	var bufs net.Buffers
	records := recordsOf(c)
	for {
		heads, bufs = heads[:0], bufs[:0]
		l.mu.Lock()
		for len(l.turn) == 0 && !l.closed && l.conn == c {
			l.cond.Wait()
		}
		if l.closed || l.conn != c {
			l.mu.Unlock()
			return ErrClosed
		}
		for n := 0; n < writeMost && len(l.turn) > 0 && len(heads)+frameHeader <= cap(heads); {
			g := l.turn[0]
			x := l.queues[g][0]
			l.turn = l.turn[1:]
			if x.sent == 0 {
				l.pending[x.id], x.heard = x, l.heard
			}
			var k int
			heads, bufs, k = x.chunk(heads, bufs)
			n += k
			if x.sent == len(x.meta)+x.size {
				if l.queues[g] = l.queues[g][1:]; len(l.queues[g]) == 0 {
					delete(l.queues, g)
					continue
				}
			}
			l.turn = append(l.turn, g)
		}
		l.mu.Unlock()
		if err := l.p.flush(c, records, bufs); err != nil {
			return err
		}
	}
}

// recordsOf puts what is written to a TLS connection together; nil for another.
func recordsOf(c net.Conn) *bufio.Writer {
	if _, ok := c.(sealed); ok {
		return bufio.NewWriterSize(c, recordBytes)
	}
	return nil
}

// flush writes buffers: with one system call, or as few records.
func (p *Peers) flush(c net.Conn, records *bufio.Writer, bufs net.Buffers) error {
	if err := c.SetWriteDeadline(time.Now().Add(p.times.write)); err != nil {
		return err
	}
	if records == nil {
		_, err := bufs.WriteTo(c)
		return err
	}
	for _, b := range bufs {
		if _, err := records.Write(b); err != nil {
			return err
		}
	}
	return records.Flush()
}

// chunk appends the call's next frame.
func (c *call) chunk(heads []byte, bufs net.Buffers) ([]byte, net.Buffers, int) {
	total := len(c.meta) + c.size
	n := min(chunkMax, total-c.sent)
	h := header{kind: c.kind, length: uint32(n), group: c.group, id: c.id, total: uint32(total), meta: uint32(len(c.meta)), metaCRC: crcOf(c.meta)}
	if c.sent+n < total {
		h.flags |= flagMore
	}
	at := len(heads)
	heads = heads[:at+frameHeader]
	h.encode(heads[at:])
	bufs = append(bufs, heads[at:])
	left := n
	if c.sent < len(c.meta) {
		k := min(left, len(c.meta)-c.sent)
		bufs = append(bufs, c.meta[c.sent:c.sent+k])
		left -= k
	}
	for left > 0 {
		b := c.bulk[0]
		k := min(left, len(b))
		bufs = append(bufs, b[:k])
		if c.bulk[0] = b[k:]; k == len(b) {
			c.bulk = c.bulk[1:]
		}
		left -= k
	}
	c.sent += n
	return heads, bufs, n + frameHeader
}

// read takes answers until the connection breaks.
func (l *link) read(c net.Conn) {
	a := newAssembler(c, answerBuffer, l.p.times.body)
	for {
		m, err := a.next()
		if err == nil && m.flags&flagAnswer == 0 {
			err = fmt.Errorf("%w: not an answer", ErrFrame)
		}
		if err != nil {
			l.mu.Lock()
			if l.conn == c {
				l.conn = nil // ends the writer
			}
			l.cond.Broadcast()
			l.mu.Unlock()
			_ = c.Close()
			return
		}
		l.mu.Lock()
		l.heard++
		x := l.pending[m.id]
		l.mu.Unlock()
		if x == nil || x.kind != m.kind || x.group != m.group {
			continue // it came too late
		}
		body, err := m.answer()
		l.finish(x, body, err)
	}
}

// answer takes the status off an answer.
func (m *message) answer() ([]byte, error) {
	if len(m.body) == 0 {
		return nil, fmt.Errorf("%w: empty answer", ErrFrame)
	}
	if m.body[0] != statusOK {
		return nil, fmt.Errorf("%w: %s", ErrRefused, m.body[1:])
	}
	return m.body[1:], nil
}

// broke fails what was on its way.
func (l *link) broke(err error) {
	l.mu.Lock()
	l.conn = nil
	var gone []*call
	for _, c := range l.pending {
		gone = append(gone, c)
	}
	for _, q := range l.queues { // half written: the peer has dropped it
		if len(q) > 0 && q[0].sent > 0 {
			l.dropLocked(q[0])
		}
	}
	l.mu.Unlock()
	for _, c := range gone {
		l.finish(c, nil, err)
	}
}

// abort fails the calls of a group.
func (l *link) abort(group uint32) {
	l.mu.Lock()
	left := slices.Clone(l.queues[group])
	for _, c := range l.pending {
		if c.group == group {
			left = append(left, c)
		}
	}
	l.mu.Unlock()
	for _, c := range left {
		l.finish(c, nil, ErrClosed)
	}
}

// close fails everything.
func (l *link) close() {
	l.mu.Lock()
	l.closed = true
	if l.conn != nil {
		_ = l.conn.Close() // the writer and the reader end
	}
	var left []*call
	for _, q := range l.queues {
		left = append(left, q...)
	}
	for _, c := range l.pending {
		left = append(left, c)
	}
	l.cond.Broadcast()
	l.mu.Unlock()
	for _, c := range left {
		l.finish(c, nil, ErrClosed)
	}
}

// refused reports whether nobody listens where the peer was: its process is dead.
func refused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
