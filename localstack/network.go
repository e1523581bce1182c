package localstack

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Network lies between voters: each reaches each of the others through a proxy of that pair's own. What one sends to another, on whichever of the two's connections, is
// one way; the ways fail apart from one another.
type Network struct {
	mu    sync.Mutex
	ways  map[[2]int]*way
	pipes map[*pipe]struct{}
	doors []net.Listener
	wg    sync.WaitGroup
	shut  bool
	host  string // where the proxies listen
	hits  int    // chunks that met a fault
}

// Fault is what happens to the bytes of a way.
type Fault int

// Faults of a way.
const (
	// Open: they arrive.
	Open Fault = iota
	// Held: they wait and arrive when the way is open again, as TCP repeats them: whoever gets them may have heard newer things over other connections.
	Held
	// Swallowed: they are lost, the connections stay as they are. When the way is open again those that have lost bytes are reset.
	Swallowed
)

func (f Fault) String() string { return [...]string{"open", "held", "swallowed"}[f] }

// way is what one voter sends to another.
type way struct {
	n       *Network
	fault   Fault
	delay   time.Duration
	changed chan struct{} // closed and renewed with every change
}

// pipe is one direction of one connection.
type pipe struct {
	way     *way
	in, out net.Conn
	lost    bool // bytes, so that it must end before the way is open again; under Network.mu
	stop    chan struct{}
}

// NewNetwork makes a network in which everything arrives.
func NewNetwork() *Network {
	return &Network{ways: map[[2]int]*way{}, pipes: map[*pipe]struct{}{}, host: "127.0.0.1"}
}

// Proxy returns the address at which `from` reaches `to`, whose listener is at target.
func (n *Network) Proxy(from, to int, target string) (addr string, err error) {
	l, err := net.Listen("tcp", net.JoinHostPort(n.host, "0"))
	if err != nil {
		return "", fmt.Errorf("localstack: %w", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.doors = append(n.doors, l)
	there, back := n.wayLocked(from, to), n.wayLocked(to, from)
	n.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.wg.Go(func() { n.connect(c, target, there, back) })
		}
	})
	return l.Addr().String(), nil
}

func (n *Network) wayLocked(from, to int) *way {
	k := [2]int{from, to}
	if n.ways[k] == nil {
		n.ways[k] = &way{n: n, changed: make(chan struct{})}
	}
	return n.ways[k]
}

// connect carries a connection until either end closes it. One to a process that is dead is reset: a proxy cannot refuse it.
func (n *Network) connect(c net.Conn, target string, there, back *way) {
	t, err := net.Dial("tcp", target)
	if err != nil {
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = c.Close()
		return
	}
	stop := make(chan struct{})
	a, b := &pipe{way: there, in: c, out: t, stop: stop}, &pipe{way: back, in: t, out: c, stop: stop}
	end := sync.OnceFunc(func() {
		close(stop)
		_, _ = c.Close(), t.Close()
	})
	n.mu.Lock()
	if n.shut {
		end()
	}
	n.pipes[a], n.pipes[b] = struct{}{}, struct{}{}
	n.mu.Unlock()
	var both sync.WaitGroup
	for _, p := range []*pipe{a, b} {
		both.Go(func() {
			defer end()
			p.run()
		})
	}
	both.Wait()
	n.mu.Lock()
	delete(n.pipes, a)
	delete(n.pipes, b)
	n.mu.Unlock()
}

// chunk is what was read at once, and when.
type chunk struct {
	data []byte
	at   time.Time
}

// run carries bytes one way. Reader and writer are apart so that a delay delays everything alike and takes no throughput.
func (p *pipe) run() {
	queue := make(chan chunk, 64) // at most 64 x 64 KiB are under way
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(queue)
		for {
			b := make([]byte, 64<<10)
			k, err := p.in.Read(b)
			if k > 0 {
				select {
				case queue <- chunk{b[:k], time.Now()}:
				case <-p.stop:
					return
				}
			}
			if err != nil {
				return
			}
		}
	})
	for c := range queue {
		pass, ok := p.wait(c.at)
		if !ok {
			break
		}
		if !pass {
			continue
		}
		if _, err := p.out.Write(c.data); err != nil {
			break
		}
	}
	_, _ = p.in.Close(), p.out.Close()
	for range queue { // the reader ends
	}
	wg.Wait()
}

// wait returns when the bytes that came at `at` may go on, or are lost; ok is false if the connection ends.
func (p *pipe) wait(at time.Time) (pass, ok bool) {
	n := p.way.n
	for {
		n.mu.Lock()
		fault, changed := p.way.fault, p.way.changed
		if fault != Open {
			n.hits++
		}
		left := time.Until(at.Add(p.way.delay))
		if fault == Swallowed {
			p.lost = true
		}
		lost := p.lost
		n.mu.Unlock()
		switch {
		case fault == Swallowed:
			return false, true
		case lost: // bytes have been lost and the way is open: the stream is broken
			return false, false
		case fault == Open && left <= 0:
			return true, true
		}
		var due <-chan time.Time
		if fault == Open {
			due = time.After(left)
		}
		select {
		case <-due:
		case <-changed:
		case <-p.stop:
			return false, false
		}
	}
}

// Set makes what `from` sends to `to` suffer a fault from now on.
func (n *Network) Set(from, to int, f Fault) {
	n.change(from, to, func(w *way) { w.fault = f })
}

// Delay makes what `from` sends to `to` arrive so much later.
func (n *Network) Delay(from, to int, d time.Duration) {
	n.change(from, to, func(w *way) { w.delay = d })
}

func (n *Network) change(from, to int, f func(*way)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := n.wayLocked(from, to)
	f(w)
	close(w.changed)
	w.changed = make(chan struct{})
	if w.fault == Open { // what has lost bytes is of no use any more
		for p := range n.pipes {
			if p.way == w && p.lost {
				_, _ = p.in.Close(), p.out.Close()
			}
		}
	}
}

// Hits counts what was held or swallowed so far.
func (n *Network) Hits() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.hits
}

// Heal opens every way.
func (n *Network) Heal() {
	n.mu.Lock()
	var all [][2]int
	for k := range n.ways {
		all = append(all, k)
	}
	n.mu.Unlock()
	for _, k := range all {
		n.change(k[0], k[1], func(w *way) { w.fault, w.delay = Open, 0 })
	}
}

// Close ends every connection and waits for it.
func (n *Network) Close() error {
	n.mu.Lock()
	n.shut = true
	var errs []error
	for _, l := range n.doors {
		errs = append(errs, l.Close())
	}
	for p := range n.pipes {
		_, _ = p.in.Close(), p.out.Close()
	}
	for _, w := range n.ways {
		w.fault, w.delay = Open, 0
		close(w.changed)
		w.changed = make(chan struct{})
	}
	n.mu.Unlock()
	n.wg.Wait()
	return errors.Join(errs...)
}
