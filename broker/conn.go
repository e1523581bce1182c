package broker

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/estran/estran/tiering/record"
)

func cores() int { return runtime.GOMAXPROCS(0) }

const (
	// inFlightMax bounds the requests of a connection that are not answered yet.
	inFlightMax = 64
	readBuffer  = 4 << 10
	// smallFrame is the limit for every key but Produce.
	smallFrame = 8 << 20
	headerMin  = 8 // key, version, correlation ID
)

// conn is one client's connection. Its reader handles one request at a time, but for Produce, which is answered later: so clients with several
// requests in flight do not wait for one another's commit. Answers leave in the order of the requests.
type conn struct {
	s    *Server
	c    net.Conn
	ip   string
	in   *bufio.Reader
	name string // client software, from ApiVersions

	mu     sync.Mutex
	cond   *sync.Cond
	queue  []*answer // in request order
	closed bool
	busy   bool // the reader is inside a request
}

// answer is the slot of one request's answer.
type answer struct {
	bufs    net.Buffers
	ready   bool
	silent  bool // acks=0: nothing is sent
	close   bool // after it the connection is closed
	dropped bool // the connection has ended without it
	release func()
	began   time.Time
	api     *api
}

// request is what a handler gets.
type request struct {
	reader
	s       *Server
	c       *conn
	api     *api
	version int16
	corr    int32
	client  string
	slot    *answer
	frame   []byte
	held    int64 // of the frame budget
	answer  int64 // of the budget of answers
	fresh   bool  // current has succeeded
}

func newConn(s *Server, c net.Conn, ip string) *conn {
	x := &conn{s: s, c: c, ip: ip, in: bufio.NewReaderSize(c, readBuffer)}
	x.cond = sync.NewCond(&x.mu)
	return x
}

func (c *conn) serve() {
	var w sync.WaitGroup
	w.Go(c.write)
	err := c.readLoop()
	c.mu.Lock()
	c.closed = true
	c.cond.Broadcast()
	c.mu.Unlock()
	w.Wait()
	_ = c.c.Close() // reading or writing has failed, or the client has gone
	c.s.session.drop(c)
	c.s.forget(c)
	if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
		c.s.cfg.Logger.Debug("connection closed", "component", "broker", "client", c.ip, "software", c.name, "err", err)
	}
}

// abort makes reader and writer end, also those that wait for an answer which nobody gives any more.
func (c *conn) abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.abortLocked()
}

func (c *conn) abortLocked() {
	_ = c.c.Close()
	c.closed = true
	c.cond.Broadcast()
}

// closeIfIdle closes the connection if nothing is in flight on it.
func (c *conn) closeIfIdle() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.queue) > 0 || c.busy {
		return false
	}
	c.abortLocked()
	return true
}

func (c *conn) readLoop() error {
	for {
		if err := c.c.SetReadDeadline(time.Now().Add(c.s.cfg.IdleTimeout)); err != nil {
			return err
		}
		var size [4]byte
		if _, err := io.ReadFull(c.in, size[:]); err != nil {
			return err
		}
		if err := c.one(int32(binary.BigEndian.Uint32(size[:]))); err != nil {
			return err
		}
	}
}

// one reads and handles one request.
func (c *conn) one(size int32) error {
	s := c.s
	if size < headerMin || size > s.cfg.RequestMaxBytes {
		s.m.badFrames.Inc()
		return fmt.Errorf("frame of %d bytes, at most %d", size, s.cfg.RequestMaxBytes)
	}
	if err := c.c.SetReadDeadline(time.Now().Add(s.cfg.HeaderTimeout)); err != nil {
		return err
	}
	head, err := c.in.Peek(headerMin)
	if err != nil {
		return err
	}
	key, version := int16(binary.BigEndian.Uint16(head)), int16(binary.BigEndian.Uint16(head[2:]))
	a := s.apis[key]
	if a == nil || version < a.served() || version > a.max {
		if key != keyAPIVersions {
			s.m.unsupported.Inc()
			if s.firstOfItsKind(key, version) {
				s.cfg.Logger.Warn("unsupported request; the next ones are only counted", "component", "broker", "key", key, "version", version, "client", c.ip, "software", c.name)
			}
			return fmt.Errorf("API key %d version %d is not served", key, version)
		}
	}
	if key != keyProduce && size > smallFrame {
		return fmt.Errorf("frame of %d bytes for API key %d, at most %d", size, key, smallFrame)
	}
	r := &request{s: s, c: c, api: a, version: version, held: min(int64(size), s.cfg.FrameBudget)}
	if err := s.frames.acquire(s.ctx, r.held); err != nil {
		return err
	}
	r.frame = record.GetBuffer(int(size))
	if err := c.readFrame(r.frame); err != nil {
		r.drop()
		return err
	}
	return c.handle(r)
}

// readFrame reads a frame, for which memory has been taken.
func (c *conn) readFrame(b []byte) error {
	x := c.s.frames.transfer(len(b), c.s.cfg.HeaderTimeout)
	for n := 0; n < len(b); {
		if err := c.c.SetReadDeadline(x.next()); err != nil {
			return err
		}
		m, err := c.in.Read(b[n:])
		n += m
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if n < len(b) && !x.goesOn(n) {
			c.s.m.slow.WithLabelValues("frame").Inc()
			return fmt.Errorf("%w: %d of a frame's %d bytes", errSlow, n, len(b))
		}
	}
	return nil
}

func (c *conn) handle(r *request) error {
	r.b = r.frame[4:]
	r.corr = r.i32()
	if id := r.nstr(); id != nil { // not compact, also in flexible headers
		r.client = *id
	}
	r.flex = r.api != nil && r.version >= r.api.flex && r.version <= r.api.max
	r.tags()
	slot := &answer{began: time.Now(), api: r.api}
	r.slot = slot
	if !c.enqueue(slot) {
		r.drop()
		return net.ErrClosed
	}
	if r.err == nil {
		r.err = r.api.handle(r)
	}
	r.drop()
	if r.err != nil {
		c.s.m.badFrames.Inc()
		return fmt.Errorf("%s v%d: %w", r.api.name, r.version, r.err)
	}
	if r.api.key == keyProduce {
		c.mu.Lock()
		c.busy = false
		c.mu.Unlock()
		return nil
	}
	return c.await(slot)
}

// enqueue takes a place in the order of answers. It waits while too many requests are in flight.
func (c *conn) enqueue(a *answer) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.queue) >= inFlightMax && !c.closed {
		c.cond.Wait()
	}
	if c.closed {
		return false
	}
	c.queue = append(c.queue, a)
	c.busy = true
	return true
}

// await waits until the answer is there: as in Kafka, the next request of a connection begins after it.
func (c *conn) await(a *answer) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !a.ready && !c.closed {
		c.cond.Wait()
	}
	c.busy = false
	if c.closed {
		return net.ErrClosed
	}
	return nil
}

// drop gives the frame back: nothing may alias it any more.
func (r *request) drop() {
	if r.frame != nil {
		record.PutBuffer(r.frame)
		r.frame, r.b = nil, nil
		r.s.frames.Release(r.held)
	}
}

// answerWith hands over the answer. It may be called from any goroutine, once.
func (r *request) answerWith(bufs net.Buffers, release func()) {
	c := r.c
	c.mu.Lock()
	dropped := r.slot.dropped
	r.slot.bufs, r.slot.release, r.slot.ready = bufs, release, true
	c.cond.Broadcast()
	c.mu.Unlock()
	if dropped && release != nil {
		release()
	}
}

// silence ends a request without an answer; closing also ends the connection.
func (r *request) silence(closing bool) {
	c := r.c
	c.mu.Lock()
	r.slot.silent, r.slot.close, r.slot.ready = true, closing, true
	c.cond.Broadcast()
	c.mu.Unlock()
}

// respond begins an answer: length (filled in by finish), correlation ID, and in flexible versions the header's tags.
func (r *request) respond(size int) *writer {
	w := &writer{b: make([]byte, 4, 64+size), flex: r.version >= r.api.flex}
	w.i32(r.corr)
	if w.flex && r.api.key != keyAPIVersions {
		w.b = append(w.b, 0)
	}
	return w
}

// finish sends an answer that is one buffer.
func (r *request) finish(w *writer) {
	binary.BigEndian.PutUint32(w.b, uint32(len(w.b)-4))
	r.answerWith(net.Buffers{w.b}, nil)
}

// timeout returns a context for work that a request waits for, ended by the server's close too.
func (r *request) timeout(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(r.s.ctx, d)
}

// coalesce bounds what goes into one write.
const coalesce = 256 << 10

// write sends answers in order; those that are ready together leave in one call.
func (c *conn) write() {
	var bufs net.Buffers
	var batch []*answer
	for {
		c.mu.Lock()
		for !c.closed && (len(c.queue) == 0 || !c.queue[0].ready) {
			c.cond.Wait()
		}
		if c.closed {
			left := c.queue
			c.queue = nil
			for _, a := range left {
				a.dropped = !a.ready // who answers it later releases what it holds
			}
			c.mu.Unlock()
			for _, a := range left {
				if !a.dropped {
					c.done(a)
				}
			}
			return
		}
		n := 0
		bufs, batch = bufs[:0], batch[:0]
		for len(c.queue) > 0 && c.queue[0].ready && n < coalesce {
			a := c.queue[0]
			c.queue = c.queue[1:]
			batch = append(batch, a)
			for _, b := range a.bufs {
				bufs = append(bufs, b)
				n += len(b)
			}
			if a.close {
				break
			}
		}
		c.cond.Broadcast()
		c.mu.Unlock()
		var err error
		if n > 0 {
			err = c.writeAll(bufs, n)
		}
		for _, a := range batch {
			c.done(a)
			if a.close {
				err = net.ErrClosed
			}
		}
		clear(bufs[:cap(bufs)])
		if err != nil {
			c.abort() // the reader ends, and then this loop
		}
	}
}

// writeAll sends answers of size bytes; fetches have taken memory for theirs.
func (c *conn) writeAll(bufs net.Buffers, size int) error {
	x := c.s.answers.transfer(size, c.s.cfg.WriteTimeout)
	for n := 0; ; {
		if err := c.c.SetWriteDeadline(x.next()); err != nil {
			return err
		}
		m, err := bufs.WriteTo(c.c) // which takes from them what was sent
		n += int(m)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if !x.goesOn(n) {
			c.s.m.slow.WithLabelValues("answer").Inc()
			return fmt.Errorf("%w: %d of an answer's %d bytes", errSlow, n, size)
		}
	}
}

func (c *conn) done(a *answer) {
	if a.release != nil {
		a.release()
	}
	if a.api != nil {
		c.s.m.observe(a)
	}
}
