package raftmeta

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// The rules of freeing the log, of snapshots and of installs, one by one: a raft instance over the real log, the real transport and a real shard, with peers that the test plays
// by hand over the real wire. They send what a leader that has gone wrong, or was overtaken, would send.

const (
	selfID, handID = "1.self", "2.hand"
	ruleGroup      = 1
)

// shardFSM is a shard under raft, without anything above it.
type shardFSM struct {
	mu sync.Mutex
	s  *state.Shard
}

func (f *shardFSM) Apply(l *raft.Log) any {
	f.mu.Lock()
	defer f.mu.Unlock()
	if l.Type == raft.LogCommand {
		f.s.Apply(state.RaftIndex(l.Index), state.Term(l.Term), l.Data)
	}
	return nil
}

type frozenShard struct{ *state.Frozen }

func (f frozenShard) Persist(k raft.SnapshotSink) error {
	if _, err := f.WriteTo(k); err != nil {
		return errors.Join(err, k.Cancel())
	}
	return k.Close()
}
func (frozenShard) Release() {}

func (f *shardFSM) Snapshot() (raft.FSMSnapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	z := f.s.Freeze()
	return frozenShard{&z}, nil
}

func (f *shardFSM) Restore(r io.ReadCloser) error {
	defer r.Close()
	s, err := state.RestoreShard(r)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.s = s
	return nil
}

func (f *shardFSM) high() record.Offset {
	f.mu.Lock()
	defer f.mu.Unlock()
	i, _ := f.s.Partition(ruleTP)
	return i.HighWatermark
}

var ruleTP = record.TopicPartition{Topic: record.TopicID{1}}

// handLog is the log of the peer that is played by hand: it vouches for everything.
type handLog struct{ payloads map[[2]uint64][]byte }

func (*handLog) Matches(uint64, uint64, uint64, []*raft.Log) bool { return true }
func (h *handLog) Payload(i, term uint64) ([]byte, error)         { return h.payloads[[2]uint64{i, term}], nil }
func (h *handLog) Lengths(e *raft.Log) (int, uint32, error) {
	p := h.payloads[[2]uint64{e.Index, e.Term}]
	return len(p), record.CRC(p), nil
}
func (*handLog) Base() (uint64, uint64)           { return 0, 0 }
func (*handLog) LastIndex() (uint64, error)       { return 0, nil }
func (*handLog) HoldAt(string, uint64, time.Time) {}
func (*handLog) Check(*raft.Log, uint32) error    { return nil }
func (*handLog) Lend([]*raft.Log) func()          { return func() {} }
func (*handLog) Stalled() time.Duration           { return 0 }

// rig is the instance under test and the hand that plays its peers.
type rig struct {
	t     *testing.T
	dir   string
	addrs map[string]string
	log   *raftlog.Log
	snaps *raftlog.Snapshots
	fsm   *shardFSM
	raft  atomic.Pointer[raft.Raft]
	trans *peer.Transport
	peers *peer.Peers
	close func()

	hand    *peer.Transport
	handLog *handLog
	snapMu  sync.Mutex
	stable  *raftlog.Stable
}

func newRig(t *testing.T) *rig {
	g := &rig{t: t, dir: t.TempDir(), addrs: map[string]string{}, handLog: &handLog{map[[2]uint64][]byte{}}}
	hl := g.listen(handID)
	hand, err := peer.New(peer.Config{ServerID: handID, ClusterID: "c", Listener: hl, Resolve: g.resolve, StageDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hand.Close() })
	g.hand = hand.Open(peer.Group{ID: ruleGroup, Log: g.handLog, Term: func() (uint64, bool) { return 0, false }, Leader: func() string { return "" }, Rank: func() int { return 0 },
		Installed: func(i, _ uint64) uint64 { return i }, Install: func(_, _, _ uint64, hand func() error) (bool, error) { return false, hand() }})
	t.Cleanup(func() { _ = g.hand.Close() })
	g.open()
	t.Cleanup(func() { g.close() })
	return g
}

func (g *rig) resolve(id string) (string, bool) { a, ok := g.addrs[id]; return a, ok }

func (g *rig) listen(id string) net.Listener {
	g.addrs[id] = freeAddr(g.t)
	return listenAt(g.t, g.addrs[id])
}

// open starts the instance on what is in its directory. Its timers do not run out in a test.
func (g *rig) open() {
	g.t.Helper()
	check := func(err error) {
		g.t.Helper()
		if err != nil {
			g.t.Fatal(err)
		}
	}
	dir := filepath.Join(g.dir, "shard-1")
	var err error
	g.log, err = raftlog.Open(raftlog.Config{Dir: dir, Group: ruleGroup, FileBytes: 1 << 20, TailBytes: 1 << 10})
	check(err)
	g.stable, err = raftlog.OpenStable(raftlog.OS{}, dir, func(err error) { g.t.Error(err) })
	check(err)
	g.snaps, err = raftlog.OpenSnapshots(g.log)
	check(err)
	g.fsm = &shardFSM{s: state.NewShard(1)}
	var l net.Listener
	if addr, ok := g.addrs[selfID]; ok {
		l = listenAt(g.t, addr)
	} else {
		l = g.listen(selfID)
	}
	g.peers, err = peer.New(peer.Config{ServerID: selfID, ClusterID: "c", Listener: l, Resolve: g.resolve, StageDir: g.dir})
	check(err)
	g.trans = g.peers.Open(peer.Group{ID: ruleGroup, Log: g.log,
		Term: func() (uint64, bool) {
			if r := g.raft.Load(); r != nil {
				return r.CurrentTerm(), true
			}
			return 0, false
		},
		Leader: func() string { return "" }, Rank: func() int { return 0 }, Installed: g.snaps.InstallableAt,
		Install: func(index, term, installed uint64, hand func() error) (bool, error) {
			g.snapMu.Lock()
			defer g.snapMu.Unlock()
			g.snaps.ExpectInstall(index, term, installed, func() uint64 { return g.raft.Load().AppliedIndex() })
			err := hand()
			return g.snaps.InstallRefused(), err
		}})
	cfg := raft.DefaultConfig()
	cfg.LocalID = selfID
	cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout = time.Hour, time.Hour, time.Hour
	cfg.SnapshotThreshold, cfg.SnapshotInterval, cfg.TrailingLogs = math.MaxUint64, 1000*time.Hour, 0
	cfg.LogOutput = io.Discard
	r, err := raft.NewRaft(cfg, g.fsm, g.log, g.stable, g.snaps.Store(), g.trans)
	check(err)
	g.raft.Store(r)
	g.close = sync.OnceFunc(func() {
		_ = g.trans.Close()
		_ = r.Shutdown().Error()
		_ = g.peers.Close()
		_, _ = g.log.Close(), g.stable.Close()
	})
}

// members is the configuration that the first entry holds.
var members = raft.Configuration{Servers: []raft.Server{{ID: selfID, Address: selfID}, {ID: handID, Address: handID}, {ID: "3.third", Address: "3.third"}}}

// entry is entry i of a term: the configuration, then the partition, then one batch each.
func (g *rig) entry(i, term uint64) *raft.Log {
	if i == 1 {
		return &raft.Log{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(members)}
	}
	var e state.Entry
	var payload []byte
	if i == 2 {
		if _, err := e.Add(state.MetaEffects{From: 1, To: 1, Effects: []state.Effect{{EnsurePartition: &state.EnsurePartition{TP: ruleTP, Config: state.PartitionConfig{RetentionMs: -1, RetentionBytes: -1}}}}}); err != nil {
			g.t.Fatal(err)
		}
	} else {
		b := batchOf(g.t, -1, -1, fmt.Sprintf("entry %d of term %d", i, term))
		payload = b
		slot := state.SlotOf(b)
		slot.Handle = 1
		e.AddSlot(slot)
	}
	data, _ := e.Cut(state.Term(term), payload, 1000, nil)
	g.handLog.payloads[[2]uint64{i, term}] = payload
	return &raft.Log{Index: i, Term: term, Type: raft.LogCommand, Data: data, AppendedAt: time.Unix(1, 0)}
}

func (g *rig) entries(from, to, term uint64) (out []*raft.Log) {
	for i := from; i <= to; i++ {
		out = append(out, g.entry(i, term))
	}
	return out
}

var handHeader = raft.RPCHeader{ProtocolVersion: 3, ID: []byte(handID), Addr: []byte(handID)}

// send is AppendEntries over the wire.
func (g *rig) send(term, prev, prevTerm uint64, es []*raft.Log, commit uint64) (raft.AppendEntriesResponse, error) {
	var resp raft.AppendEntriesResponse
	err := g.hand.AppendEntries(selfID, selfID, &raft.AppendEntriesRequest{RPCHeader: handHeader, Term: term, PrevLogEntry: prev, PrevLogTerm: prevTerm, Entries: es, LeaderCommitIndex: commit}, &resp)
	return resp, err
}

// feed sends what must be taken. It sends it again while there is no answer: the hand's connection to an instance that was closed may break under the first request to the next one.
func (g *rig) feed(term, prev, prevTerm uint64, es []*raft.Log, commit uint64) {
	g.t.Helper()
	var resp raft.AppendEntriesResponse
	until(g.t, fmt.Sprintf("an answer to entries behind (%d, %d)", prev, prevTerm), func() (ok bool) {
		var err error
		resp, err = g.send(term, prev, prevTerm, es, commit)
		return err == nil
	})
	if !resp.Success {
		g.t.Fatalf("entries behind (%d, %d): %+v", prev, prevTerm, resp)
	}
}

// install sends a snapshot of (index, term), the state of a shard that has applied so far.
func (g *rig) install(term, index, snapTerm uint64) (raft.InstallSnapshotResponse, error) {
	s := state.NewShard(1)
	for i := uint64(2); i <= index; i++ {
		s.Apply(state.RaftIndex(i), state.Term(snapTerm), g.entry(i, snapTerm).Data)
	}
	var b bytes.Buffer
	f := s.Freeze()
	if _, err := f.WriteTo(&b); err != nil {
		g.t.Fatal(err)
	}
	var resp raft.InstallSnapshotResponse
	err := g.hand.InstallSnapshot(selfID, selfID, &raft.InstallSnapshotRequest{RPCHeader: handHeader, SnapshotVersion: 1, Term: term, Leader: []byte(handID), LastLogIndex: index, LastLogTerm: snapTerm,
		Configuration: raft.EncodeConfiguration(members), ConfigurationIndex: 1, Size: int64(b.Len())}, &resp, &b)
	return resp, err
}

func (g *rig) applied(i uint64) {
	g.t.Helper()
	until(g.t, fmt.Sprintf("entry %d to be applied", i), func() bool { return g.raft.Load().AppliedIndex() == i })
}

// high waits until the state has so many records: raft counts an entry as applied when it hands it over.
func (g *rig) high(want record.Offset) {
	g.t.Helper()
	until(g.t, fmt.Sprintf("a high watermark of %d", want), func() bool { return g.fsm.high() == want })
}

// holds checks that the log ends at last and holds entry i of a term with its payload.
func (g *rig) holds(i, term uint64) {
	g.t.Helper()
	p, err := g.log.Payload(i, term)
	if err != nil || !bytes.Equal(p, g.handLog.payloads[[2]uint64{i, term}]) {
		g.t.Errorf("entry %d of term %d: %d bytes, %v", i, term, len(p), err)
	}
}

func (g *rig) ends(want uint64) {
	g.t.Helper()
	if last, _ := g.log.LastIndex(); last != want {
		g.t.Errorf("the log ends at %d, want %d", last, want)
	}
}

// A snapshot that the state is past already is answered with success and changes nothing: applied does not go back.
func TestRuleStaleInstall(t *testing.T) {
	g := newRig(t)
	g.feed(1, 0, 0, g.entries(1, 10, 1), 10)
	g.applied(10)
	if resp, err := g.install(1, 5, 1); err != nil || !resp.Success {
		t.Errorf("%+v %v: it would be sent for ever", resp, err)
	}
	g.applied(10)
	g.high(8)
	g.feed(1, 10, 1, g.entries(11, 12, 1), 12)
	g.applied(12)
	g.holds(7, 1)
}

// A snapshot inside a tail that was acknowledged and is not committed takes nothing of it away.
func TestRuleInstallInsideTheTail(t *testing.T) {
	g := newRig(t)
	g.feed(1, 0, 0, g.entries(1, 10, 1), 3)
	g.applied(3)
	if resp, err := g.install(1, 6, 1); err != nil || !resp.Success {
		t.Errorf("%+v %v", resp, err)
	}
	g.ends(10)
	g.holds(10, 1)
	g.feed(1, 10, 1, g.entries(11, 11, 1), 11)
	g.applied(11)
}

// A snapshot that contradicts the tail, also at the very entry that it ends with: it becomes the base, what comes behind it is taken, and it is all there after a restart.
func TestRuleInstallOverADivergentTail(t *testing.T) {
	for _, s := range []uint64{8, 10, 20} { // inside, at the end, beyond
		t.Run(fmt.Sprint(s), func(t *testing.T) {
			g := newRig(t)
			g.feed(1, 0, 0, g.entries(1, 10, 1), 2)
			g.applied(2)
			if resp, err := g.install(2, s, 2); err != nil || !resp.Success {
				t.Fatalf("%+v %v", resp, err)
			}
			if base, term := g.log.Base(); base != s || term != 2 {
				t.Errorf("base (%d, %d)", base, term)
			}
			until(t, "what comes behind the snapshot to be taken", func() bool {
				resp, err := g.send(2, s, 2, g.entries(s+1, s+2, 2), s+2)
				if err == nil && !resp.Success && s == 10 { // raft has the term of the old entry in mind; an instance that is opened again has not
					g.close()
					g.open()
				}
				return err == nil && resp.Success
			})
			g.applied(s + 2)
			g.ends(s + 2)
			g.close()
			g.open()
			g.feed(2, s+2, 2, nil, s+2)
			g.applied(s + 2)
			g.holds(s+1, 2)
			g.high(record.Offset(s))
		})
	}
}

// A snapshot that ends with this log's own last entry, of another term, heals without a restart.
func TestRuleInstallAtADivergentLastEntry(t *testing.T) {
	g := newRig(t)
	g.feed(1, 0, 0, g.entries(1, 10, 1), 2)
	g.applied(2)
	if resp, err := g.install(2, 10, 2); err != nil || !resp.Success {
		t.Fatalf("%+v %v", resp, err)
	}
	until(t, "what comes behind the snapshot to be taken", func() bool {
		resp, err := g.send(2, 10, 2, g.entries(11, 12, 2), 12)
		return err == nil && resp.Success
	})
}

// A request without entries commits nothing that it has not checked: what the leader has committed since is another entry than the one that lies here.
func TestRuleCommitIsWhatWasChecked(t *testing.T) {
	g := newRig(t)
	g.feed(1, 0, 0, g.entries(1, 10, 1), 4)
	g.applied(4)
	g.feed(2, 4, 1, nil, 6)
	if c := g.raft.Load().CommitIndex(); c != 4 {
		t.Errorf("%d is committed: an entry of a deposed leader, which nobody compared", c)
	}
	g.feed(2, 4, 1, g.entries(5, 6, 2), 6)
	g.applied(6)
	g.holds(6, 2)
	g.ends(6)
}

// Entries that begin below the base are lifted onto it; nothing is installed for them and nothing applied twice.
func TestRuleEntriesBelowTheBase(t *testing.T) {
	g := newRig(t)
	if resp, err := g.install(1, 8, 1); err != nil || !resp.Success {
		t.Fatalf("%+v %v", resp, err)
	}
	g.feed(1, 5, 1, g.entries(6, 11, 1), 11)
	g.applied(11)
	g.ends(11)
	g.holds(11, 1)
	g.high(9)
}

// An entry of a later term than the request's own was put together of two logs: it is refused, and so is a command whose proposing term is not the one that it would be stored under.
func TestRuleMixedRequests(t *testing.T) {
	g := newRig(t)
	g.feed(2, 0, 0, g.entries(1, 4, 1), 2)
	if resp, err := g.send(2, 4, 1, []*raft.Log{g.entry(5, 3)}, 2); err == nil && resp.Success {
		t.Error("an entry of a later term than its request was taken")
	}
	forged := *g.entry(5, 1)
	forged.Term = 2
	g.handLog.payloads[[2]uint64{5, 2}] = g.handLog.payloads[[2]uint64{5, 1}]
	if resp, err := g.send(2, 4, 1, []*raft.Log{&forged}, 5); err == nil && resp.Success {
		t.Error("a command was taken under another term than its own")
	}
	g.ends(4)
	g.feed(2, 4, 1, g.entries(5, 5, 2), 5)
	g.applied(5)
}

// raft compacts an idle group up to its last entry: with a snapshot that is not installable nothing is lost by it; when it becomes so, the base follows, never past it.
func TestRuleIdleSnapshot(t *testing.T) {
	g := newRig(t)
	g.feed(1, 0, 0, g.entries(1, 10, 1), 10)
	g.high(8) // applied, not only handed over: raft may take a snapshot in between
	if err := g.raft.Load().Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	for i := uint64(3); i <= 10; i++ {
		g.holds(i, 1)
	}
	if base, _ := g.log.Base(); base != 0 {
		t.Errorf("base %d below a snapshot with hot entries", base)
	}
	g.close()
	g.open() // from the snapshot, with the log that it may not free
	g.feed(1, 10, 1, g.entries(11, 12, 1), 12)
	g.applied(12)
	g.holds(3, 1)
	g.high(10)
	if err := g.snaps.Applied(12, math.MaxUint64); err != nil { // all is sealed
		t.Fatal(err)
	}
	if base, _ := g.log.Base(); base > 10 {
		t.Errorf("base %d beyond the snapshot", base)
	}
}

// A vote is one record: after a restart the instance has voted for whom it voted, and for nobody else in that term.
func TestRuleOneVotePerTerm(t *testing.T) {
	g := newRig(t)
	g.feed(1, 0, 0, g.entries(1, 5, 1), 5)
	vote := func(term, last uint64) bool {
		var resp raft.RequestVoteResponse
		if err := g.hand.RequestVote(selfID, selfID, &raft.RequestVoteRequest{RPCHeader: handHeader, Term: term, LastLogIndex: last, LastLogTerm: 1, LeadershipTransfer: true}, &resp); err != nil {
			t.Fatal(err)
		}
		return resp.Granted
	}
	if vote(2, 4) {
		t.Error("voted for a shorter log")
	}
	if !vote(3, 5) {
		t.Error("no vote for an equal log")
	}
	g.close()
	g.open()
	if g.raft.Load().CurrentTerm() != 3 {
		t.Errorf("term %d", g.raft.Load().CurrentTerm())
	}
	if cand, err := g.stable.Get([]byte("LastVoteCand")); err != nil || string(cand) != handID {
		t.Errorf("voted for %q: %v", cand, err)
	}
}

// A transport that is closed answers every call of raft's, also one that begins afterwards: raft waits for them before it ends.
func TestRuleClosedTransportAnswers(t *testing.T) {
	g := newRig(t)
	silent := g.listen("3.third") // takes connections and says nothing
	t.Cleanup(func() { _ = silent.Close() })
	send := func() error {
		var resp raft.InstallSnapshotResponse
		return g.trans.InstallSnapshot("3.third", "3.third", &raft.InstallSnapshotRequest{RPCHeader: handHeader, LastLogIndex: 9, LastLogTerm: 1, Size: 1}, &resp, bytes.NewReader([]byte{1}))
	}
	done := make(chan error, 2)
	go func() { done <- send() }()
	_ = g.trans.Close()
	go func() { done <- send() }()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second) // less than what a restore may take: not waitMost
	defer cancel()
	for range 2 {
		select {
		case err := <-done:
			if !errors.Is(err, peer.ErrClosed) {
				t.Errorf("%v", err)
			}
		case <-ctx.Done():
			t.Fatal("it still waits for an answer")
		}
	}
}
