package broker

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Server answers Kafka clients.
type Server struct {
	cfg      Config
	b        Backend
	read     Reader
	m        *metrics
	apis     map[int16]*api
	frames   *budget
	answers  *budget
	check    chan struct{} // one token per batch that is being checked: as many as there are cores
	session  *sessions
	groups   *coordinator
	defaults map[string]string // of topic settings

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	drain  atomic.Bool

	mu    sync.Mutex
	conns map[*conn]struct{}
	perIP map[string]int
	odd   map[[2]int16]bool // requests that are not served, by key and version, of which there was a line in the log
	lis   []net.Listener
	wg    sync.WaitGroup
}

// NewServer returns a server over a backend. Its configuration must come from DefaultConfig.
func NewServer(cfg Config, b Backend, r Reader) *Server {
	s := &Server{cfg: cfg, b: b, read: r, m: newMetrics(cfg.Registerer), frames: newBudget(cfg.FrameBudget), answers: newBudget(cfg.ResponseBudget),
		check: make(chan struct{}, cores()), session: newSessions(sessionsMax, sessionPartsAll), conns: map[*conn]struct{}{}, perIP: map[string]int{}, odd: map[[2]int16]bool{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.apis = map[int16]*api{}
	for _, a := range apiList() {
		s.apis[a.key] = &a
	}
	s.defaults = map[string]string{}
	for _, t := range topicSettings() {
		s.defaults[t.name] = t.value(&cfg)
	}
	s.groups = newCoordinator(s)
	return s
}

// ErrServerClosed is returned by Serve after Close or Drain.
var ErrServerClosed = errors.New("broker: server closed")

// Serve accepts connections until the listener fails or the server closes.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	s.lis = append(s.lis, l)
	s.mu.Unlock()
	for {
		c, err := l.Accept()
		if err != nil {
			if s.ctx.Err() != nil || s.drain.Load() {
				return ErrServerClosed
			}
			if !passes(err) {
				return err
			}
			s.m.acceptFailed.Inc()
			select { // what is missing comes back when connections end: more of them must not end the broker
			case <-time.After(acceptPause):
			case <-s.ctx.Done():
			}
			continue
		}
		if !s.admit(c) {
			c.Close()
		}
	}
}

// acceptPause is between two tries to accept a connection for which something is missing.
const acceptPause = 50 * time.Millisecond

// passes reports whether a listener that failed so may succeed later: descriptors or memory were missing, or the client had gone already.
func passes(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

// oddMost bounds what is written about requests that are not served: a client must not fill a disk with its mistakes.
const oddMost = 100

func (s *Server) firstOfItsKind(key, version int16) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	kind := [2]int16{key, version}
	if s.odd[kind] || len(s.odd) >= oddMost {
		return false
	}
	s.odd[kind] = true
	return true
}

// admit registers a connection and starts it, unless there are too many.
func (s *Server) admit(c net.Conn) bool {
	ip, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.ctx.Err() != nil || s.drain.Load():
		return false
	case len(s.conns) >= s.cfg.MaxConnections:
		s.m.rejected.WithLabelValues("max_connections").Inc()
		return false
	case s.perIP[ip] >= s.cfg.MaxConnectionsPerIP:
		s.m.rejected.WithLabelValues("max_connections_per_ip").Inc()
		return false
	}
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}) // a peer that refuses it is noticed later
	}
	x := newConn(s, c, ip)
	s.conns[x] = struct{}{}
	s.perIP[ip]++
	s.m.connections.Inc()
	s.wg.Go(x.serve)
	return true
}

func (s *Server) forget(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if s.perIP[c.ip]--; s.perIP[c.ip] <= 0 {
		delete(s.perIP, c.ip)
	}
	s.m.connections.Dec()
}

// Drain stops accepting, lets what is in flight finish and closes connections that are idle, until ctx ends. Close must follow.
func (s *Server) Drain(ctx context.Context) {
	s.drain.Store(true)
	s.closeListeners()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		busy := 0
		s.mu.Lock()
		for c := range s.conns {
			if !c.closeIfIdle() {
				busy++
			}
		}
		s.mu.Unlock()
		if busy == 0 {
			return
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

func (s *Server) closeListeners() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.lis {
		_ = l.Close() // twice is no fault
	}
}

// Abort closes every listener and connection and waits for nothing: clients see the end of them even when requests are stuck. Close
// may follow.
func (s *Server) Abort() {
	s.cancel()
	s.closeListeners()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.abort()
	}
}

// Close ends every connection and waits for it.
func (s *Server) Close() error {
	s.Abort()
	s.wg.Wait()
	s.groups.close()
	return nil
}

// Lead runs the coordinator of a shard's groups until ctx ends.
func (s *Server) Lead(ctx context.Context, shard uint32) { s.groups.lead(ctx, shard) }
