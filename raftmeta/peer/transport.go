package peer

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/estran/estran/localstack/planted"
	"github.com/hashicorp/raft"
)

const (
	// sendMost bounds the bytes of one AppendEntries; one entry may be larger.
	sendMost = 8 << 20
	// windowBytes and windowCalls bound what a follower has not acknowledged yet.
	windowBytes = 16 << 20
	windowCalls = 64
)

// Log is what the transport needs of a group's log.
type Log interface {
	// Matches reports, under one lock, whether the entry before the first and all of them are the log's own, none of a later term than `term`.
	Matches(prevIndex, prevTerm, term uint64, entries []*raft.Log) bool
	// Payload returns the Extensions of the log's entry, which must not be changed.
	Payload(index, term uint64) ([]byte, error)
	// Lengths returns the length and CRC of an entry's payload from its Data.
	Lengths(e *raft.Log) (payload int, crc uint32, err error)
	// Base is the entry that the log begins behind.
	Base() (index, term uint64)
	LastIndex() (uint64, error)
	// HoldAt keeps what lies above index for a peer.
	HoldAt(peer string, index uint64, until time.Time)
	// Check refuses an entry that must not be stored.
	Check(e *raft.Log, payloadCRC uint32) error
	// Lend says that the entries' bytes are this package's again once back was called: until then the log must not keep any of them.
	Lend(entries []*raft.Log) (back func())
	// Stalled is how long the write in flight has been in the disk; 0 if there is none.
	Stalled() time.Duration
}

// Group is what the transport needs of a group.
type Group struct {
	ID  uint32
	Log Log
	// Term is the current term of the group's raft instance; ok is false while there is none.
	Term func() (term uint64, ok bool)
	// Leader is the server ID that this instance follows, "" if none.
	Leader func() string
	// Rank orders the followers that stand for election when their leader's process has died: 0 at once.
	Rank func() int
	// Installed is the index at whose application the leader's snapshot (index, term) became installable.
	Installed func(index, term uint64) uint64
	// Install is called around the moment in which raft gets a received snapshot; hand returns raft's answer. It reports whether the snapshot was stale: that is a success.
	Install func(index, term, installed uint64, hand func() error) (stale bool, err error)
}

// Transport is one group's raft.Transport. There is one for each raft instance.
type Transport struct {
	p  *Peers
	g  Group
	ch chan raft.RPC

	closed chan struct{}
	mu     sync.Mutex // guards ended, and adding to wg
	ended  bool
	wg     sync.WaitGroup

	stageMu sync.Mutex
	stage   *staging

	contact contacts
}

var (
	_ raft.Transport   = (*Transport)(nil)
	_ raft.WithPreVote = (*Transport)(nil)
	_ raft.WithClose   = (*Transport)(nil)
)

// Open returns the transport of a group. Messages for it are taken from now on.
func (p *Peers) Open(g Group) *Transport {
	t := &Transport{p: p, g: g, ch: make(chan raft.RPC), closed: make(chan struct{})}
	p.mu.Lock()
	p.groups[g.ID] = t
	p.mu.Unlock()
	return t
}

// Close implements raft.WithClose: what waits for raft is refused. raft calls it at the end of its shutdown; the owner may call it before, so that the shutdown waits for nobody.
func (t *Transport) Close() error {
	t.mu.Lock()
	ended := t.ended
	t.ended = true
	t.mu.Unlock()
	if !ended {
		close(t.closed)
		t.p.mu.Lock()
		if t.p.groups[t.g.ID] == t {
			delete(t.p.groups, t.g.ID)
		}
		t.p.mu.Unlock()
		t.p.abort(t.g.ID)
		t.dropStage(nil)
	}
	t.wg.Wait()
	return nil
}

func (t *Transport) over() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ended
}

// spawn runs f unless the transport is closed; Close waits for it.
func (t *Transport) spawn(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.ended {
		t.wg.Go(f)
	}
}

// Consumer implements raft.Transport.
func (t *Transport) Consumer() <-chan raft.RPC { return t.ch }

// LocalAddr implements raft.Transport: an address is a server ID.
func (t *Transport) LocalAddr() raft.ServerAddress { return raft.ServerAddress(t.p.cfg.ServerID) }

// EncodePeer implements raft.Transport.
func (t *Transport) EncodePeer(id raft.ServerID, _ raft.ServerAddress) []byte { return []byte(id) }

// DecodePeer implements raft.Transport.
func (t *Transport) DecodePeer(b []byte) raft.ServerAddress { return raft.ServerAddress(b) }

// SetHeartbeatHandler implements raft.Transport by doing nothing: the fast path can lose acknowledged writes (hashicorp/raft #695).
func (t *Transport) SetHeartbeatHandler(f func(raft.RPC)) { t.keepHandler(f) }

// ElectNow makes this instance stand for election at once. Elections are always safe; this only chooses their moment.
func (t *Transport) ElectNow() {
	h := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(t.p.cfg.ServerID), Addr: []byte(t.p.cfg.ServerID)}
	t.spawn(func() { _, _ = t.hand(nil, &raft.TimeoutNowRequest{RPCHeader: h}, nil) })
}

// leaderDied is told that a peer's process is gone.
func (t *Transport) leaderDied(server string) {
	if t.g.Leader() != server {
		return
	}
	wait := time.Duration(t.g.Rank()) * t.p.times.rank
	t.spawn(func() {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		for {
			select {
			case <-timer.C:
			case <-t.closed:
				return
			}
			if l := t.g.Leader(); l != server && l != "" {
				return
			}
			left := t.contact.outcome(t.p.times.silent)
			if left <= 0 { // one of a lower rank has stood in vain, its log too short, or not at all
				t.ElectNow()
				return
			}
			timer.Reset(left + wait) // to stand now would depose whom this node has just voted for
		}
	})
}

// hand gives raft a request and waits for its answer.
func (t *Transport) hand(x *inbound, command any, r io.Reader) (any, error) {
	var gone <-chan struct{}
	if x != nil {
		gone = x.done
	}
	answer := make(chan raft.RPCResponse, 1)
	select {
	case t.ch <- raft.RPC{Command: command, Reader: r, RespChan: answer}:
	case <-t.closed:
		return nil, ErrClosed
	case <-gone:
		return nil, errBroken
	}
	select {
	case a := <-answer:
		return a.Response, a.Error
	case <-t.closed:
		return nil, ErrClosed
	}
}

func isBeat(a *raft.AppendEntriesRequest) bool {
	return len(a.Entries) == 0 && a.PrevLogEntry == 0 && a.PrevLogTerm == 0 && a.LeaderCommitIndex == 0
}

// AppendEntries implements raft.Transport. It may shorten the request.
func (t *Transport) AppendEntries(_ raft.ServerID, target raft.ServerAddress, a *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	c, err := t.prepare(string(target), a)
	if err != nil {
		return err
	}
	l, limit := t.p.link(string(target), classBulk), t.p.times.call
	if isBeat(a) {
		l, limit = t.p.link(string(target), classBeat), t.p.times.beat
	}
	b, err := l.askUntil(c, limit, t.closed)
	if err != nil {
		return err
	}
	if err := t.p.takeAnswer(string(target), b, resp); err != nil {
		return err
	}
	t.contact.heard(string(target))
	t.p.memory.note(string(target), t.g.ID, standingIn(a, resp))
	t.track(string(target), a, resp)
	return nil
}

// track keeps the log for a peer that catches up.
func (t *Transport) track(target string, a *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) {
	last, err := t.g.Log.LastIndex()
	switch n := len(a.Entries); {
	case err != nil || isBeat(a):
	case resp.Success && n > 0 && a.Entries[n-1].Index < last:
		t.g.Log.HoldAt(target, a.Entries[n-1].Index, time.Now().Add(t.p.times.catchUp))
	case !resp.Success:
		t.g.Log.HoldAt(target, min(max(a.PrevLogEntry, 1)-1, resp.LastLog), time.Now().Add(t.p.times.catchUp))
	}
}

// stalledMost: a leader whose write has been in the disk for longer says nothing more to its followers, heartbeats included. raft's main loop is stuck in that write and cannot
// give up the leadership, and what keeps followers content does not pass through it: they would wait until the disk answers.
const stalledMost = 2 * time.Second

// Silent reports whether this node keeps silent, so that another one may be elected: its disk does not answer.
func (t *Transport) Silent() bool { return t.g.Log.Stalled() > stalledMost }

var errStalled = errors.New("peer: this node's own disk does not answer")

// prepare shortens a request, checks it against the log and fetches the payloads.
func (t *Transport) prepare(target string, a *raft.AppendEntriesRequest) (*call, error) {
	if t.over() {
		return nil, ErrClosed
	}
	if t.Silent() {
		return nil, errStalled
	}
	c := &call{kind: kindAppend, group: t.g.ID}
	crcs := make([]entryCRC, len(a.Entries))
	size := 0
	for i, e := range a.Entries {
		n, crc, err := t.g.Log.Lengths(e)
		if err != nil {
			return nil, err
		}
		if i > 0 && size+len(e.Data)+n > sendMost {
			a.Entries = a.Entries[:i] // raft counts what was sent from here
			crcs = crcs[:i]
			break
		}
		crcs[i] = entryCRC{ext: crc, extLen: uint32(n)}
		size += len(e.Data) + n
	}
	if !isBeat(a) && !t.g.Log.Matches(a.PrevLogEntry, a.PrevLogTerm, a.Term, a.Entries) { // what a goroutine of a lost term has put together
		return nil, fmt.Errorf("peer: entries behind %d of term %d are not the log's any more", a.PrevLogEntry, a.PrevLogTerm)
	}
	c.bulk = make(net.Buffers, 0, 2*len(a.Entries))
	for i, e := range a.Entries {
		crcs[i].data = crcOf(e.Data)
		if len(e.Data) > 0 {
			c.bulk = append(c.bulk, e.Data)
		}
		if crcs[i].extLen == 0 {
			continue
		}
		payload, err := t.g.Log.Payload(e.Index, e.Term)
		if err != nil {
			return nil, fmt.Errorf("peer: payload of entry %d for %s: %w", e.Index, target, err)
		}
		if len(payload) != int(crcs[i].extLen) {
			return nil, fmt.Errorf("peer: payload of entry %d has %d bytes, its header says %d", e.Index, len(payload), crcs[i].extLen)
		}
		c.bulk = append(c.bulk, payload)
	}
	c.size = size
	var contacts []string
	if isBeat(a) {
		contacts = t.contact.since(t.p.times.contact)
	}
	c.meta = encodeAppend(a, crcs, contacts)
	return c, nil
}

func (t *Transport) small(target raft.ServerAddress, k kind, req, resp any) error {
	if t.over() {
		return ErrClosed
	}
	meta, err := json.Marshal(req)
	if err != nil {
		return err
	}
	b, err := t.p.link(string(target), classBeat).askUntil(&call{kind: k, group: t.g.ID, meta: meta}, t.p.times.vote, t.closed)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, resp)
}

// RequestVote implements raft.Transport.
func (t *Transport) RequestVote(_ raft.ServerID, target raft.ServerAddress, a *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	err := t.small(target, kindVote, a, resp)
	if err == nil {
		t.p.memory.note(string(target), t.g.ID, Standing{Term: resp.Term})
	}
	return err
}

// RequestPreVote implements raft.WithPreVote.
func (t *Transport) RequestPreVote(_ raft.ServerID, target raft.ServerAddress, a *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return t.small(target, kindPreVote, a, resp)
}

// TimeoutNow implements raft.Transport.
func (t *Transport) TimeoutNow(_ raft.ServerID, target raft.ServerAddress, a *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return t.small(target, kindTimeoutNow, a, resp)
}

// handle answers a message of a peer.
func (t *Transport) handle(x *inbound, m *message) ([]byte, error) {
	if t.p.recalls.Load() > 0 && t.lateRecall() {
		return nil, errors.New("this node has lost writes")
	}
	switch m.kind {
	case kindAppend:
		return t.handleAppend(x, m)
	case kindVote:
		return handleSmall(t, x, m, func(req *raft.RequestVoteRequest) {
			if t.forsaken() != "" {
				req.LeadershipTransfer = true // vote, though there is a leader
			}
		}, func(resp any) {
			if r, ok := resp.(*raft.RequestVoteResponse); ok && r.Granted {
				t.contact.voted()
			}
		})
	case kindPreVote:
		return handleSmall(t, x, m, func(req *raft.RequestPreVoteRequest) {
			if leader := t.forsaken(); leader != "" {
				req.Addr = []byte(leader) // raft protects a leader from everybody but itself; who the candidate is it takes from the ID
			}
		}, func(any) {})
	case kindTimeoutNow:
		return handleSmall(t, x, m, func(*raft.TimeoutNowRequest) {}, func(any) {})
	case kindInstall:
		return t.handleInstall(x, m)
	}
	return nil, fmt.Errorf("%w: kind %d", ErrFrame, m.kind)
}

// forsaken returns the leader if it is another node that has been silent for so long that it is not to be protected from who stands for election (Ongaro's thesis, 4.2.3). raft
// itself would protect it until its own timer, which is random, has run out too; then a silent leader is replaced after the longer of two timers, not the shorter.
func (t *Transport) forsaken() string {
	leader := t.g.Leader()
	if leader == "" || leader == t.p.cfg.ServerID || !t.contact.silent(leader, t.p.times.silent) {
		return ""
	}
	return leader
}

// handleSmall hands raft a request that is JSON; change sees it first, after sees the answer.
func handleSmall[R any](t *Transport, x *inbound, m *message, change func(*R), after func(any)) ([]byte, error) {
	req := new(R)
	if err := json.Unmarshal(m.body, req); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	h := any(req).(raft.WithRPCHeader).GetRPCHeader()
	if string(h.Addr) != x.from {
		return nil, fmt.Errorf("%w: %s speaks for %s", ErrFrame, x.from, h.Addr)
	}
	change(req)
	resp, err := t.hand(x, req, nil)
	if err != nil {
		return nil, err
	}
	after(resp)
	b, err := json.Marshal(resp)
	return append([]byte{statusOK}, b...), err
}

func (t *Transport) handleAppend(x *inbound, m *message) ([]byte, error) {
	a, crcs, contacts, err := decodeAppend(m.metaPart(), m.bulk())
	if err != nil {
		return nil, err
	}
	if string(a.RPCHeader.Addr) != x.from {
		return nil, fmt.Errorf("%w: %s speaks for %s", ErrFrame, x.from, a.RPCHeader.Addr)
	}
	for i, e := range a.Entries {
		if e.Term > a.Term {
			return nil, fmt.Errorf("%w: entry %d of term %d in a request of term %d", ErrFrame, e.Index, e.Term, a.Term)
		}
		if err := t.g.Log.Check(e, crcs[i].ext); err != nil {
			return nil, err
		}
	}
	beat := isBeat(a) // before it may be lifted
	t.lift(a)
	back := t.g.Log.Lend(a.Entries)
	resp, done, err := t.handBeat(a)
	if !done {
		resp, err = t.hand(x, a, nil)
	}
	back()
	if m.idle = err == nil; err != nil { // raft may be at it still
		return nil, err
	}
	r, ok := resp.(*raft.AppendEntriesResponse)
	if !ok {
		return nil, fmt.Errorf("peer: raft answered %T", resp)
	}
	if beat && r.Success {
		t.contact.told(x.from, contacts)
	}
	return encodeAppendAnswer(r, t.p.cfg.Now(), t.p.cfg.Free()), nil
}

// lift moves a request that begins below this log's base onto the base: what lies there is committed, and any leader has it. It also holds the commit index down to what the
// request has checked: raft commits up to min(commit index, last index), whatever lies behind the last checked entry.
func (t *Transport) lift(a *raft.AppendEntriesRequest) {
	if isBeat(a) {
		return
	}
	base, term := t.g.Log.Base()
	if a.PrevLogEntry < base {
		for len(a.Entries) > 0 && a.Entries[0].Index <= base {
			a.Entries = a.Entries[1:]
		}
		if len(a.Entries) > 0 && a.Entries[0].Index != base+1 {
			a.Entries = nil
		}
		a.PrevLogEntry, a.PrevLogTerm = base, term
	}
	if !planted.On(planted.CommitIndexUnclamped) {
		a.LeaderCommitIndex = min(a.LeaderCommitIndex, a.PrevLogEntry+uint64(len(a.Entries)))
	}
	if a.PrevLogEntry == base && a.PrevLogTerm == term {
		// What lies at the base is known here, and raft need not look. After an install at its own last index it would compare with the term of the entry that was there before,
		// and refuse for ever.
		a.PrevLogEntry, a.PrevLogTerm = 0, 0
	}
}

// standingOf answers a term question; it is refused if there is no instance.
func (p *Peers) standingOf(group uint32) []byte {
	if t := p.group(group); t != nil {
		if s, ok := t.standing(); ok {
			return encodeStanding(s)
		}
	}
	return []byte{statusRefused}
}

// standing is where this node's instance is; ok is false while there is none.
func (t *Transport) standing() (s Standing, ok bool) {
	last, err := t.g.Log.LastIndex()
	term, ok := t.g.Term()
	return Standing{term, last}, ok && err == nil
}

func encodeStanding(s Standing) []byte {
	b := binary.BigEndian.AppendUint64([]byte{statusOK}, s.Term)
	return binary.BigEndian.AppendUint64(b, s.LastIndex)
}

func decodeStanding(b []byte) (s Standing, ok bool) {
	if len(b) != 16 {
		return s, false
	}
	return Standing{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}, true
}

func cutServer(id string) (node, incarnation string, ok bool) { return strings.Cut(id, ".") }
