package peer

import (
	"time"

	"github.com/hashicorp/raft"
)

// Report is what a peer has last said of itself, in an answer to an append.
type Report struct {
	// Clock is its wall clock when it answered; Free its free hot budget in bytes.
	Clock time.Time
	Free  int64
	// At is when the answer came.
	At time.Time
}

// Now is the peer's wall clock now, as far as this node's monotonic one goes.
func (r Report) Now() time.Time { return r.Clock.Add(time.Since(r.At)) }

// Report returns what a server has said of itself; ok is false if that is longer ago than life.
func (p *Peers) Report(server string, life time.Duration) (r Report, ok bool) {
	p.reportMu.RLock()
	r, ok = p.reports[server]
	p.reportMu.RUnlock()
	return r, ok && time.Since(r.At) <= life
}

// takeAnswer reads the answer to an append and keeps what the peer says of itself.
func (p *Peers) takeAnswer(server string, b []byte, resp *raft.AppendEntriesResponse) error {
	clock, free, err := decodeAppendAnswer(b, resp)
	if err != nil {
		return err
	}
	p.reportMu.Lock()
	p.reports[server] = Report{Clock: clock, Free: free, At: time.Now()}
	p.reportMu.Unlock()
	return nil
}
