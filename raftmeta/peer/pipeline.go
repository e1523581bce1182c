package peer

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// future is a pipelined append.
type future struct {
	began time.Time
	req   *raft.AppendEntriesRequest
	resp  *raft.AppendEntriesResponse
	err   error
	done  chan struct{}
}

func (f *future) Error() error                          { <-f.done; return f.err }
func (f *future) Start() time.Time                      { return f.began }
func (f *future) Request() *raft.AppendEntriesRequest   { return f.req }
func (f *future) Response() *raft.AppendEntriesResponse { return f.resp }

// pipeline never blocks for ever: after an error or an answer without success everything that is pending or comes later fails.
type pipeline struct {
	t      *Transport
	target string
	l      *link
	out    chan raft.AppendFuture

	// order is held from deciding that a request is next until the link has it. It is taken before mu.
	order sync.Mutex
	mu    sync.Mutex
	cond  *sync.Cond
	calls int // not answered yet
	bytes int
	// sent is what the last request told the peer; held are requests since that tell it nothing new, and heldCall the one that will answer them all.
	sent     told
	held     []*future
	heldCall *call
	timer    *time.Timer
	failed   bool
}

// told is what a peer knows after a request: its leader's term, the last entry and the commit index.
type told struct{ term, last, commit uint64 }

func tells(a *raft.AppendEntriesRequest) told {
	return told{a.Term, a.PrevLogEntry + uint64(len(a.Entries)), a.LeaderCommitIndex}
}

// repeatsMax bounds the requests that wait: raft makes one every 10 to 20 ms.
const repeatsMax = 32

// AppendEntriesPipeline implements raft.Transport.
func (t *Transport) AppendEntriesPipeline(_ raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	p := &pipeline{t: t, target: string(target), l: t.p.link(string(target), classBulk), out: make(chan raft.AppendFuture, 4*windowCalls)}
	p.cond = sync.NewCond(&p.mu)
	return p, nil
}

// Consumer implements raft.AppendPipeline.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.out }

// Close implements raft.AppendPipeline.
func (p *pipeline) Close() error {
	p.mu.Lock()
	p.failed = true
	p.cond.Broadcast()
	_, held := p.takeLocked()
	p.mu.Unlock()
	p.answered(held, nil, raft.ErrPipelineShutdown)
	return nil
}

// AppendEntries implements raft.AppendPipeline. It waits while the window is full. An empty request that repeats what the peer was told last is not sent at once: raft makes
// them all the time, for every group. It is answered when the peer answers, never here: raft takes an answer for contact.
func (p *pipeline) AppendEntries(a *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	c, err := p.t.prepare(p.target, a)
	if err != nil {
		return nil, err
	}
	f := &future{began: time.Now(), req: a, resp: resp, done: make(chan struct{})}
	size := c.size + len(c.meta)
	p.order.Lock()
	defer p.order.Unlock()
	p.mu.Lock()
	if !p.failed && len(a.Entries) == 0 && tells(a) == p.sent && len(p.held) < repeatsMax {
		p.holdLocked(f, c)
		p.mu.Unlock()
		return f, nil
	}
	p.mu.Unlock()
	p.release()
	if !p.take(size) {
		return nil, raft.ErrPipelineShutdown
	}
	p.mu.Lock()
	p.sent = tells(a)
	p.mu.Unlock()
	p.submit(c, size, []*future{f})
	return f, nil
}

// take waits for room in the window and takes it; false = the pipeline has failed.
func (p *pipeline) take(size int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.failed && p.calls > 0 && (p.calls >= windowCalls || p.bytes+size > windowBytes) {
		p.cond.Wait()
	}
	if p.failed {
		return false
	}
	p.calls++
	p.bytes += size
	return true
}

// submit sends a call that answers futures; its room has been taken.
func (p *pipeline) submit(c *call, size int, fs []*future) {
	c.done = func(b []byte, err error) {
		p.mu.Lock()
		p.calls--
		p.bytes -= size
		p.cond.Broadcast()
		p.mu.Unlock()
		p.t.p.observe(p.target, kindAppend, fs[0].began, err)
		p.answered(fs, b, err)
	}
	p.l.submit(c, p.t.p.times.call)
}

func (p *pipeline) holdLocked(f *future, c *call) {
	if p.held = append(p.held, f); p.heldCall == nil {
		p.heldCall = c
		p.timer = time.AfterFunc(p.t.p.times.hold, func() {
			p.order.Lock()
			defer p.order.Unlock()
			p.release()
		})
	}
}

// takeLocked takes what is held.
func (p *pipeline) takeLocked() (*call, []*future) {
	c, fs := p.heldCall, p.held
	if c != nil {
		p.timer.Stop()
	}
	p.heldCall, p.held = nil, nil
	return c, fs
}

// release sends what is held, as one request; order is held. It takes room in the window without waiting for it: there is one such request at a time.
func (p *pipeline) release() {
	p.mu.Lock()
	c, fs := p.takeLocked()
	if c != nil {
		p.calls++
		p.bytes += len(c.meta)
	}
	p.mu.Unlock()
	if c != nil {
		p.submit(c, len(c.meta), fs)
	}
}

// answered ends futures with one answer. It is called in the order of the requests, as long as nothing has failed.
func (p *pipeline) answered(fs []*future, b []byte, err error) {
	for _, f := range fs {
		p.mu.Lock()
		if err == nil && p.failed {
			err = raft.ErrPipelineShutdown
		}
		if err == nil {
			err = p.t.p.takeAnswer(p.target, b, f.resp)
		}
		if err != nil || !f.resp.Success {
			p.failed = true
			p.cond.Broadcast()
		}
		p.mu.Unlock()
		f.err = err
		if err == nil {
			p.t.contact.heard(p.target)
			p.t.p.memory.note(p.target, p.t.g.ID, standingIn(f.req, f.resp))
			p.t.track(p.target, f.req, f.resp)
		}
		close(f.done)
		if err == nil {
			p.give(f)
		}
	}
}

// give hands raft an answer. What failed is not given to it: raft would take it for contact with the peer without looking; it learns of it with its next request.
func (p *pipeline) give(f *future) {
	select {
	case p.out <- f:
	case <-p.t.closed:
	default:
		p.mu.Lock() // raft does not take what is done: it has left the pipeline
		p.failed = true
		p.cond.Broadcast()
		p.mu.Unlock()
	}
}
