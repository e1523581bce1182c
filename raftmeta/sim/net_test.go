package sim

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// network carries connections between nodes in memory. What is sent is there at once; a pair that is cut loses nothing that was sent before it is healed, as TCP would not, and
// connects to nobody.
type network struct {
	mu        sync.Mutex
	listeners map[string]*listener
	pipes     map[*pipe]struct{}
	cut       map[[2]string]bool // from, to
}

func newNetwork() *network {
	return &network{listeners: map[string]*listener{}, pipes: map[*pipe]struct{}{}, cut: map[[2]string]bool{}}
}

// set says which directions are cut from now on.
func (n *network) set(cut map[[2]string]bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = cut
	for p := range n.pipes {
		p.mu.Lock()
		p.wakeLocked()
		p.mu.Unlock()
	}
}

func (n *network) isCut(from, to string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut[[2]string{from, to}]
}

type listener struct {
	n    *network
	addr addr
	ch   chan net.Conn
	done chan struct{}
	once sync.Once
}

type addr string

func (addr) Network() string  { return "sim" }
func (a addr) String() string { return string(a) }

func (n *network) listen(at string) *listener {
	l := &listener{n: n, addr: addr(at), ch: make(chan net.Conn), done: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listeners[at] = l
	return l
}

func (l *listener) Addr() net.Addr { return l.addr }

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ch:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.done)
		l.n.mu.Lock()
		defer l.n.mu.Unlock()
		if l.n.listeners[string(l.addr)] == l {
			delete(l.n.listeners, string(l.addr))
		}
	})
	return nil
}

// dialer gives the way from one node to the others.
func (n *network) dialer(from string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, to string) (net.Conn, error) {
		failed := func(err error) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Net: "sim", Addr: addr(to), Err: err}
		}
		if n.isCut(from, to) || n.isCut(to, from) {
			<-ctx.Done()
			return failed(ctx.Err())
		}
		n.mu.Lock()
		l := n.listeners[to]
		n.mu.Unlock()
		if l == nil {
			return failed(os.NewSyscallError("connect", syscall.ECONNREFUSED))
		}
		there, back := n.pipe(from, to), n.pipe(to, from)
		near, far := &conn{in: back, out: there, at: addr(from), peer: addr(to)}, &conn{in: there, out: back, at: addr(to), peer: addr(from)}
		select {
		case l.ch <- far:
			return near, nil
		case <-l.done:
			return failed(os.NewSyscallError("connect", syscall.ECONNREFUSED))
		case <-ctx.Done():
			return failed(ctx.Err())
		}
	}
}

// pipe is one direction of a connection.
type pipe struct {
	n        *network
	from, to string

	mu       sync.Mutex
	data     []byte
	ended    bool // the writer has closed: seen once all was read, if the way is free
	left     bool // the reader has closed
	deadline time.Time
	wake     chan struct{} // closed and renewed when anything changes
}

func (n *network) pipe(from, to string) *pipe {
	p := &pipe{n: n, from: from, to: to, wake: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pipes[p] = struct{}{}
	return p
}

func (p *pipe) wakeLocked() {
	close(p.wake)
	p.wake = make(chan struct{})
}

func (p *pipe) write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended || p.left {
		return 0, io.ErrClosedPipe
	}
	p.data = append(p.data, b...)
	p.wakeLocked()
	return len(b), nil
}

func (p *pipe) read(b []byte) (int, error) {
	for {
		cut := p.n.isCut(p.from, p.to)
		p.mu.Lock()
		n, ended, left, deadline, wake := 0, p.ended, p.left, p.deadline, p.wake
		if !cut {
			n = copy(b, p.data)
			p.data = p.data[n:]
		}
		p.mu.Unlock()
		switch {
		case left:
			return 0, net.ErrClosed
		case n > 0:
			return n, nil
		case ended && !cut:
			return 0, io.EOF
		case !deadline.IsZero() && !time.Now().Before(deadline):
			return 0, os.ErrDeadlineExceeded
		}
		if deadline.IsZero() {
			<-wake
			continue
		}
		t := time.NewTimer(time.Until(deadline))
		select {
		case <-wake:
		case <-t.C:
		}
		t.Stop()
	}
}

func (p *pipe) close(reader bool) {
	p.mu.Lock()
	if reader {
		p.left = true
	} else {
		p.ended = true
	}
	over := p.left && p.ended
	p.wakeLocked()
	p.mu.Unlock()
	if over {
		p.n.mu.Lock()
		delete(p.n.pipes, p)
		p.n.mu.Unlock()
	}
}

// conn is one end of a connection.
type conn struct {
	in, out  *pipe
	at, peer addr
}

func (c *conn) Read(b []byte) (int, error)  { return c.in.read(b) }
func (c *conn) Write(b []byte) (int, error) { return c.out.write(b) }
func (c *conn) LocalAddr() net.Addr         { return c.at }
func (c *conn) RemoteAddr() net.Addr        { return c.peer }

func (c *conn) Close() error {
	c.in.close(true)
	c.out.close(false)
	return nil
}

func (c *conn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

func (c *conn) SetReadDeadline(t time.Time) error {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	c.in.deadline = t
	c.in.wakeLocked()
	return nil
}

// SetWriteDeadline has nothing to bound: a write never waits.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }
