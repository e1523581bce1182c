package peer

import (
	"errors"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// called is how many calls the link has been given.
func (l *link) called() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next
}

// pipelineTo opens a pipeline of the leader to one that follows it, beside raft's own, and returns a request that repeats what is.
func pipelineTo(t *testing.T, hold time.Duration) (p *pipeline, again func() *raft.AppendEntriesRequest) {
	c := newClusterOf(t, 3, func(n *node) { n.slow = true; n.at.hold = hold })
	lead := c.elect()
	c.write(0, 3, func(uint64) int { return 10 })
	c.agree(3)
	to := c.nodes[0]
	if to == lead {
		to = c.nodes[1]
	}
	lead.peers.link(to.id, classBulk).close() // a peer has one connection of a class: raft's would end the test's
	x, err := lead.trans.AppendEntriesPipeline("", raft.ServerAddress(to.id))
	if err != nil {
		t.Fatal(err)
	}
	p = x.(*pipeline)
	t.Cleanup(func() { _ = p.Close() })
	p.l = newLink(lead.peers, to.id, classBulk) // its own: what it is given can be counted
	lead.peers.wg.Go(p.l.run)
	t.Cleanup(p.l.close)
	last, err := lead.log.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	var e raft.Log
	if err := lead.log.GetLog(last, &e); err != nil {
		t.Fatal(err)
	}
	h := raft.RPCHeader{ProtocolVersion: 3, ID: []byte(lead.id), Addr: []byte(lead.id)}
	r := lead.raft.Load()
	commit := r.CommitIndex()
	return p, func() *raft.AppendEntriesRequest {
		return &raft.AppendEntriesRequest{RPCHeader: h, Term: r.CurrentTerm(), PrevLogEntry: last, PrevLogTerm: e.Term, LeaderCommitIndex: commit}
	}
}

func (p *pipeline) ask(t *testing.T, a *raft.AppendEntriesRequest) raft.AppendFuture {
	t.Helper()
	f, err := p.AppendEntries(a, new(raft.AppendEntriesResponse))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// What tells a peer nothing new waits, and leaves as one request as soon as there is something new; every request is answered by the peer.
func TestRepeatsAreHeldBack(t *testing.T) {
	p, again := pipelineTo(t, time.Hour)
	first := p.ask(t, again())
	if err := first.Error(); err != nil || !first.Response().Success {
		t.Fatalf("%+v, %v", first.Response(), err)
	}
	var held []raft.AppendFuture
	for range 5 {
		held = append(held, p.ask(t, again()))
	}
	if n := p.l.called(); n != 1 {
		t.Fatalf("%d requests were sent, want 1", n)
	}
	for _, f := range held {
		select {
		case <-f.(*future).done:
			t.Fatal("answered before the peer was asked: raft takes that for contact")
		default:
		}
	}
	news := again()
	news.LeaderCommitIndex++ // a commit index that the peer does not know goes at once
	if f := p.ask(t, news); f.Error() != nil {
		t.Fatal(f.Error())
	}
	for i, f := range held {
		if err := f.Error(); err != nil || !f.Response().Success || f.Response().LastLog == 0 {
			t.Errorf("held request %d: %+v, %v", i, f.Response(), err)
		}
	}
	if n := p.l.called(); n != 3 {
		t.Errorf("%d requests were sent, want 3", n)
	}
	for i := range 7 {
		f := <-p.Consumer()
		if want := append(append([]raft.AppendFuture{first}, held...), nil)[i]; want != nil && f != want {
			t.Errorf("answer %d is not that of request %d", i, i)
		}
	}
	for range repeatsMax + 1 { // nor do they pile up
		p.ask(t, news)
	}
	if n := p.l.called(); n != 5 {
		t.Errorf("%d requests were sent, want 5", n)
	}
}

// Without anything new a repeat leaves by itself.
func TestRepeatsAreSentInTheEnd(t *testing.T) {
	p, again := pipelineTo(t, time.Millisecond)
	for range 5 {
		if f := p.ask(t, again()); f.Error() != nil || !f.Response().Success {
			t.Fatalf("%+v, %v", f.Response(), f.Error())
		}
	}
	if n := p.l.called(); n < 2 {
		t.Errorf("%d requests were sent", n)
	}
}

// A request that failed is no answer: raft would count it as contact with the peer. What waits fails with the pipeline.
func TestFailuresAreNotAnswers(t *testing.T) {
	p, again := pipelineTo(t, time.Hour)
	if f := p.ask(t, again()); f.Error() != nil {
		t.Fatal(f.Error())
	}
	<-p.Consumer()
	held := p.ask(t, again())
	p.l.close()
	news := again()
	news.LeaderCommitIndex++
	f, err := p.AppendEntries(news, new(raft.AppendEntriesResponse))
	if err == nil {
		err = f.Error()
	}
	if err == nil || held.Error() == nil {
		t.Errorf("%v, %v", err, held.Error())
	}
	select {
	case f := <-p.Consumer():
		t.Errorf("raft is given %+v, which failed: %v", f.Response(), f.Error())
	default:
	}
	if _, err := p.AppendEntries(again(), new(raft.AppendEntriesResponse)); !errors.Is(err, raft.ErrPipelineShutdown) {
		t.Errorf("%v", err)
	}
}

// Closing ends what waits.
func TestClosedPipelineHoldsNothing(t *testing.T) {
	p, again := pipelineTo(t, time.Hour)
	if f := p.ask(t, again()); f.Error() != nil {
		t.Fatal(f.Error())
	}
	held := p.ask(t, again())
	_ = p.Close()
	if err := held.Error(); !errors.Is(err, raft.ErrPipelineShutdown) {
		t.Errorf("%v", err)
	}
}
