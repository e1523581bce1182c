package peer

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"
)

// network lies between the nodes of a test: every connection goes through a proxy of two real TCP connections, each way of which can be cut, slowed down or broken.
type network struct {
	mu    sync.Mutex
	cond  *sync.Cond
	addrs map[string]string // by server
	ways  map[way]*rule
	wires map[*cable]struct{}
	wg    sync.WaitGroup
}

type way struct{ from, to string }

// rule is what happens to the bytes that go one way.
type rule struct {
	cut   bool // they wait, as they do when a network loses packets
	delay time.Duration
	// left is how many bytes pass before the connection is reset, or with hold before the way is cut; -1 = any number.
	left int
	hold bool
}

func newNetwork(t testing.TB) *network {
	n := &network{addrs: map[string]string{}, ways: map[way]*rule{}, wires: map[*cable]struct{}{}}
	n.cond = sync.NewCond(&n.mu)
	t.Cleanup(func() {
		n.change(func() {
			for w := range n.wires {
				w.over = true
				w.reset()
			}
		})
		n.wg.Wait()
	})
	return n
}

// change changes rules and wakes what waits.
func (n *network) change(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
	n.cond.Broadcast()
}

func (n *network) ruleLocked(w way) *rule {
	r := n.ways[w]
	if r == nil {
		r = &rule{left: -1}
		n.ways[w] = r
	}
	return r
}

// sever cuts or heals the way from one server to another.
func (n *network) sever(from, to string, cut bool) {
	n.change(func() { n.ruleLocked(way{from, to}).cut = cut })
}

// limit lets some more bytes pass from one server to another; then the connection is reset, or with hold the way is cut.
func (n *network) limit(from, to string, bytes int, hold bool) {
	n.change(func() { r := n.ruleLocked(way{from, to}); r.left, r.hold = bytes, hold })
}

// slow delays what goes from one server to another.
func (n *network) slow(from, to string, d time.Duration) {
	n.change(func() { n.ruleLocked(way{from, to}).delay = d })
}

// used reports whether the limit of a way was reached.
func (n *network) used(from, to string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ruleLocked(way{from, to}).left < 0
}

// forget makes the connections between two servers that exist lead nowhere, without a word to their ends; new ones are not concerned.
func (n *network) forget(a, b string) {
	n.change(func() {
		for w := range n.wires {
			if w.way == (way{a, b}) || w.way == (way{b, a}) {
				w.lost = true
			}
		}
	})
}

func (n *network) resolve(id string) (string, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	a, ok := n.addrs[id]
	return a, ok
}

// cable is one connection.
type cable struct {
	n        *network
	way      way
	near     net.Conn // to the dialer
	far      net.Conn // to the listener
	lost     bool
	over     bool
	resetOne sync.Once
}

// reset ends both connections as a crash would.
func (w *cable) reset() {
	w.resetOne.Do(func() {
		for _, c := range []net.Conn{w.near, w.far} {
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		}
	})
}

// dialer dials on behalf of a server. Nobody answers over a way that is cut; a server that is not there refuses.
func (n *network) dialer(from string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, addr string) (net.Conn, error) {
		w := &cable{n: n, way: way{from: from}}
		n.mu.Lock()
		for id, a := range n.addrs {
			if a == addr {
				w.way.to = id
			}
		}
		cut := n.ruleLocked(w.way).cut || n.ruleLocked(way{w.way.to, from}).cut
		n.mu.Unlock()
		if cut {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		var d net.Dialer
		var err error
		if w.far, err = d.DialContext(ctx, "tcp", addr); err != nil {
			return nil, err
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		c, err := d.DialContext(ctx, "tcp", l.Addr().String())
		if err != nil {
			return nil, err
		}
		if w.near, err = l.Accept(); err != nil {
			return nil, err
		}
		n.mu.Lock()
		n.wires[w] = struct{}{}
		n.mu.Unlock()
		n.wg.Go(func() { w.pump(w.near, w.far, w.way) })
		n.wg.Go(func() { w.pump(w.far, w.near, way{w.way.to, from}) })
		return c, nil
	}
}

// pump carries bytes one way until either end is gone.
func (w *cable) pump(src, dst net.Conn, way way) {
	defer w.n.change(func() { w.over = true; delete(w.n.wires, w) })
	defer w.reset()
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if err != nil {
			return
		}
		for b := buf[:n]; len(b) > 0; {
			k, end := w.pass(way, len(b))
			if _, err := dst.Write(b[:k]); err != nil || end {
				return
			}
			b = b[k:]
		}
	}
}

// pass waits until bytes may go and says how many; end = the connection breaks behind them.
func (w *cable) pass(way way, n int) (k int, end bool) {
	w.n.mu.Lock()
	defer w.n.mu.Unlock()
	r := w.n.ruleLocked(way)
	if d := r.delay; d > 0 {
		w.n.mu.Unlock()
		time.Sleep(d) // this is the network
		w.n.mu.Lock()
	}
	for (r.cut || w.lost) && !w.over {
		w.n.cond.Wait()
	}
	switch {
	case w.over:
		return 0, true
	case r.left < 0 || r.left > n:
		if r.left > 0 {
			r.left -= n
		}
		return n, false
	}
	k, r.left = r.left, -1
	r.cut = r.hold
	return k, !r.hold
}
