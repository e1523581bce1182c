package peer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Config describes this node to its peers.
type Config struct {
	// ServerID is node ID "." incarnation; a frame to another incarnation is refused.
	ServerID string
	// ClusterID is "" until the node belongs to a cluster: until then it only says so.
	ClusterID string
	Founders  []string
	// Secret or TLS authenticates both ends. Without either the listener must be on loopback.
	Secret []byte
	TLS    *TLS
	// Features are what this node can do beyond frames, now; it speaks to nobody who has no level of one in common. nil = nothing.
	Features func() map[string]Levels
	// Listener takes connections; Close closes it. nil = this node has no peers.
	Listener net.Listener
	// Resolve gives the address of a server ID.
	Resolve func(serverID string) (addr string, ok bool)
	// Dial connects to an address; nil = TCP.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// OnForward does what a peer forwards to a group's leader, which this node may be.
	OnForward func(ctx context.Context, group uint32, body []byte) ([]byte, error)
	// Source is where this node's followers get a group's feed from; nil = it has none of that number. nil = nobody is fed.
	Source func(group uint32) Source
	// Follower: this node only follows. Its certificate names `replica`.
	Follower bool
	// StageDir is where snapshots are put together before raft sees them.
	StageDir string
	// OnBehind is called when a peer remembers that this node has been further in a group than it is; why says in words what is missing. nil = nobody is told.
	OnBehind func(group uint32, why string)

	Logger     *slog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time
	// Slower makes all that waits take so many times as long, for a simulation; 0 = 1.
	Slower int
	// Free is how many bytes of hot log this node may still take; below 0 it is beyond its budget. nil = no bound.
	Free func() int64
	// GetBuffer lends memory, of any content, for requests that carry entries, PutBuffer takes it back. nil = the garbage collector's.
	GetBuffer func(n int) []byte
	PutBuffer func([]byte)
}

// Peers are the other nodes, for all groups of this one.
type Peers struct {
	cfg    Config
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	m      *metrics
	// cluster is what Join said last.
	cluster  atomic.Pointer[membership]
	forwards chan struct{}
	states   chan struct{} // one for each state that is being sent to a follower
	queries  chan struct{}
	times    times
	identity *identity // nil without TLS

	reportMu sync.RWMutex
	reports  map[string]Report // by server ID
	memory   memory
	recalls  atomic.Int64 // groups in recalled

	mu     sync.Mutex
	groups map[uint32]*Transport
	links  map[linkKey]*link
	in     map[*inbound]struct{}
	// strangers are those of in that have not shown who they are, oldest first.
	strangers []*inbound
	closed    bool
	// recalled is what peers remember of groups that were not open yet.
	recalled map[uint32]map[string]Standing
}

type membership struct {
	id       string
	founders []string
}

// Join says which cluster this node belongs to from now on.
func (p *Peers) Join(cluster string, founders []string) {
	p.cluster.Store(&membership{cluster, founders})
}

// Forward asks a server to do something for a group that it may lead.
func (p *Peers) Forward(ctx context.Context, server string, group uint32, body []byte) ([]byte, error) {
	limit := forwardTime
	if d, ok := ctx.Deadline(); ok {
		limit = max(min(limit, time.Until(d)), time.Millisecond)
	}
	return p.link(server, classBeat).ask(&call{kind: kindForward, group: group, meta: body}, limit)
}

const (
	forwardTime = 10 * time.Second
	forwardsMax = 256
)

// name is whom this node's certificate names.
func (c *Config) name() string {
	if c.Follower {
		return followerName
	}
	return nodeName(c.ServerID)
}

type linkKey struct {
	target string
	class  class
}

// inMax bounds connections from peers, strangersMax those that have not shown yet that they are: the oldest of these gives way.
const (
	inMax        = 64
	strangersMax = 32
)

// ErrOpen: a listener that anybody may reach needs a secret or certificates.
var ErrOpen = errors.New("peer: the peer listener is not on loopback and there is neither a secret nor a certificate")

// New starts listening.
func New(cfg Config) (*Peers, error) { return newPeers(cfg, defaultTimes().slower(max(cfg.Slower, 1))) }

func newPeers(cfg Config, t times) (*Peers, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Registerer == nil {
		cfg.Registerer = prometheus.NewRegistry()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Features == nil {
		cfg.Features = func() map[string]Levels { return nil }
	}
	if cfg.Free == nil {
		cfg.Free = func() int64 { return math.MaxInt64 }
	}
	if cfg.GetBuffer == nil || cfg.PutBuffer == nil {
		cfg.GetBuffer, cfg.PutBuffer = func(n int) []byte { return make([]byte, n) }, func([]byte) {}
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		}
	}
	if cfg.Listener != nil && len(cfg.Secret) == 0 && cfg.TLS == nil {
		if a, ok := cfg.Listener.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
			return nil, fmt.Errorf("%w: %s", ErrOpen, cfg.Listener.Addr())
		}
	}
	p := &Peers{cfg: cfg, times: t, reports: map[string]Report{}, groups: map[uint32]*Transport{}, links: map[linkKey]*link{}, recalled: map[uint32]map[string]Standing{}, in: map[*inbound]struct{}{}, m: newMetrics(cfg.Registerer), forwards: make(chan struct{}, forwardsMax),
		states: make(chan struct{}, statesMax), queries: make(chan struct{}, queriesMax)}
	if cfg.TLS != nil {
		var err error
		if p.identity, err = newIdentity(*cfg.TLS, cfg.name()); err != nil {
			return nil, err
		}
	}
	p.Join(cfg.ClusterID, cfg.Founders)
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if cfg.Listener != nil {
		p.wg.Go(p.accept)
	}
	return p, nil
}

// Close ends every connection and waits for it. Calls that are under way fail.
func (p *Peers) Close() error {
	p.cancel()
	var err error
	if p.cfg.Listener != nil {
		err = p.cfg.Listener.Close()
	}
	p.mu.Lock()
	p.closed = true
	var links []*link
	for _, l := range p.links {
		links = append(links, l)
	}
	in := slices.Collect(maps.Keys(p.in))
	p.mu.Unlock()
	for _, x := range in { // not under mu: an inbound looks for its group under its own lock
		x.abort()
	}
	for _, l := range links {
		l.close()
	}
	p.wg.Wait()
	return err
}

func (p *Peers) link(target string, cl class) *link {
	p.mu.Lock()
	defer p.mu.Unlock()
	k := linkKey{target, cl}
	l := p.links[k]
	if l == nil {
		l = newLink(p, target, cl)
		l.closed = p.closed
		p.links[k] = l
		p.wg.Go(l.run)
	}
	return l
}

// abort fails the calls of a group whose raft is to end: its shutdown waits for them.
func (p *Peers) abort(group uint32) {
	p.mu.Lock()
	links := make([]*link, 0, len(p.links))
	for _, l := range p.links {
		links = append(links, l)
	}
	p.mu.Unlock()
	for _, l := range links {
		l.abort(group)
	}
}

func (p *Peers) group(id uint32) *Transport {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.groups[id]
}

func (p *Peers) accept() {
	for {
		c, err := p.cfg.Listener.Accept()
		if err != nil {
			if p.ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				p.cfg.Logger.Warn("the peer listener failed", "component", "peer", "err", err)
				if p.pause(p.times.redial) {
					continue
				}
			}
			return
		}
		p.admit(newInbound(p, c))
	}
}

// admit takes a connection whose maker is not known yet.
func (p *Peers) admit(x *inbound) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		_ = x.raw.Close()
		return
	}
	if len(p.strangers) >= strangersMax {
		p.wg.Go(p.strangers[0].abort) // it takes locks of its own
		p.strangers = p.strangers[1:]
	}
	p.strangers = append(p.strangers, x)
	p.in[x] = struct{}{}
	p.wg.Go(x.serve)
}

// proven counts a connection among the peers'. A peer has one of each class: an older one is what its end has forgotten.
func (p *Peers) proven(x *inbound) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.knownLocked(x)
	most, n := inMax, 0
	if x.cl.follows() {
		most = feedsMax
	}
	for o := range p.in {
		if o.c != nil && o.cl.follows() == x.cl.follows() {
			n++
		}
	}
	if n > most {
		return fmt.Errorf("%w: there are %d connections like it", ErrStranger, most)
	}
	for o := range p.in {
		if o != x && x.cl != classFeed && o.c != nil && o.from == x.from && o.cl == x.cl {
			p.wg.Go(o.abort)
		}
	}
	if x.cl == classBeat {
		p.wg.Go(x.askBack)
	}
	return nil
}

// knownLocked takes a connection from the strangers.
func (p *Peers) knownLocked(x *inbound) {
	if i := slices.Index(p.strangers, x); i >= 0 {
		p.strangers = slices.Delete(p.strangers, i, i+1)
	}
}

// lost is told when a connection from a peer has ended: if nobody listens there any more its process is dead, and no timer need run out.
func (p *Peers) lost(from string) {
	addr, ok := p.cfg.Resolve(from)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(p.ctx, p.times.dial)
	defer cancel()
	c, err := p.cfg.Dial(ctx, addr)
	if err == nil {
		_ = c.Close()
		return
	}
	if !refused(err) {
		return
	}
	p.mu.Lock()
	groups := make([]*Transport, 0, len(p.groups))
	for _, g := range p.groups {
		groups = append(groups, g)
	}
	p.mu.Unlock()
	for _, g := range groups {
		g.leaderDied(from)
	}
}

// Standing is where a server's instance of a group is.
type Standing struct {
	Term      uint64 `json:"term,omitempty"`
	LastIndex uint64 `json:"index,omitempty"`
}

// Standings asks servers, each after the call began, where their instances of a group are. It returns what those said that answered before ctx ended; it ends as soon as `enough`
// says so.
func (p *Peers) Standings(ctx context.Context, group uint32, servers []string, enough func([]Standing) bool) []Standing {
	answers := make(chan Standing, len(servers))
	failed := make(chan struct{}, len(servers))
	limit := p.times.call
	if d, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(d))
	}
	for _, s := range servers {
		began := time.Now()
		c := &call{kind: kindTerm, group: group}
		c.done = func(b []byte, err error) {
			p.observe(s, kindTerm, began, err)
			if st, ok := decodeStanding(b); err == nil && ok {
				answers <- st
				return
			}
			failed <- struct{}{}
		}
		p.link(s, classBeat).submit(c, max(limit, time.Millisecond))
	}
	var out []Standing
	for left := len(servers); left > 0 && !enough(out); left-- {
		select {
		case st := <-answers:
			out = append(out, st)
		case <-failed:
		case <-ctx.Done():
			return out
		}
	}
	return out
}

type metrics struct {
	calls    *prometheus.CounterVec
	failed   *prometheus.CounterVec
	duration *prometheus.HistogramVec

	feedBytes, feedResets *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		calls:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "estran_raft_rpc_total", Help: "Requests to peers."}, []string{"peer", "kind"}),
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "estran_raft_rpc_errors_total", Help: "Requests to peers that failed."}, []string{"peer", "kind"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "estran_raft_rpc_duration_seconds", Help: "Requests to peers until their answer.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10}}, []string{"peer", "kind"}),
	}
	m.feedBytes = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "estran_feed_bytes_total", Help: "Bytes sent to read replicas: entries, states and hot batches that they asked for."}, []string{"peer"})
	m.feedResets = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "estran_feed_resets_total", Help: "Read replicas that were cut off and had to begin anew: too slow, or a snapshot replaced the state."}, []string{"reason"})
	r.MustRegister(m.calls, m.failed, m.duration, m.feedBytes, m.feedResets)
	return m
}

func (p *Peers) observe(peer string, k kind, began time.Time, err error) {
	node, _, _ := cutServer(peer)
	p.m.calls.WithLabelValues(node, k.String()).Inc()
	p.m.duration.WithLabelValues(node, k.String()).Observe(time.Since(began).Seconds())
	if err != nil {
		p.m.failed.WithLabelValues(node, k.String()).Inc()
	}
}
