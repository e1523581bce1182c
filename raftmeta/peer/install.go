package peer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"time"

	"github.com/hashicorp/raft"
)

const (
	snapshotMax = 4 << 30
)

// piece is a part of a snapshot on its way.
type piece struct {
	ID   uint64 `json:"id"`
	At   int64  `json:"at"`
	CRC  uint32 `json:"crc"` // of the bytes that come with it
	Last bool   `json:"last,omitempty"`
	// Request and Installed come with the first one.
	Request   *raft.InstallSnapshotRequest `json:"request,omitempty"`
	Installed uint64                       `json:"installed,omitempty"`
}

// InstallSnapshot implements raft.Transport.
func (t *Transport) InstallSnapshot(_ raft.ServerID, target raft.ServerAddress, a *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	l := t.p.link(string(target), classBulk)
	m := piece{ID: rand.Uint64(), Request: a, Installed: t.g.Installed(a.LastLogIndex, a.LastLogTerm)}
	buf := make([]byte, chunkMax)
	for !m.Last {
		n, err := io.ReadFull(data, buf)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("peer: reading the snapshot %d for %s: %w", a.LastLogIndex, target, err)
		}
		limit := t.p.times.step
		if m.Last = err != nil || m.At+int64(n) >= a.Size; m.Last {
			limit = t.p.times.restore
		}
		m.CRC = crcOf(buf[:n])
		meta, err := json.Marshal(m)
		if err != nil {
			return err
		}
		answer, err := l.askUntil(&call{kind: kindInstall, group: t.g.ID, meta: meta, bulk: net.Buffers{buf[:n]}, size: n}, limit, t.closed)
		if err != nil {
			return err
		}
		if m.At == 0 { // not before it has answered: raft goes on trying while it is away, and the log would never be freed
			t.g.Log.HoldAt(string(target), a.LastLogIndex, time.Now().Add(t.p.times.restore))
		}
		if m.Last {
			if err := json.Unmarshal(answer, resp); err != nil {
				return fmt.Errorf("%w: %w", ErrFrame, err)
			}
		}
		m.At += int64(n)
		m.Request, m.Installed = nil, 0
	}
	return nil
}

// staging is a snapshot that is being received. raft sees it when it is whole.
type staging struct {
	from      string
	id        uint64
	req       *raft.InstallSnapshotRequest
	installed uint64
	f         *os.File
	at        int64
}

var errSuperseded = errors.New("a newer snapshot is being received")

func (t *Transport) handleInstall(x *inbound, m *message) ([]byte, error) {
	p, err := decodePiece(m)
	if err != nil {
		return nil, err
	}
	s, err := t.receive(x.from, p, m.bulk())
	if err != nil || !p.Last {
		return []byte{statusOK}, err
	}
	defer t.dropStage(s)
	resp, err := t.install(x, s)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(resp)
	return append([]byte{statusOK}, b...), err
}

// decodePiece reads a piece whose bytes are what the sender read.
func decodePiece(m *message) (*piece, error) {
	p := new(piece)
	if err := json.Unmarshal(m.metaPart(), p); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	if crcOf(m.bulk()) != p.CRC {
		return nil, fmt.Errorf("%w: checksum of %d bytes at %d of a snapshot", ErrFrame, len(m.bulk()), p.At)
	}
	return p, nil
}

// receive adds a piece. The first piece of a snapshot replaces one that is on its way, unless that is of a later term.
func (t *Transport) receive(from string, p *piece, data []byte) (*staging, error) {
	t.stageMu.Lock()
	defer t.stageMu.Unlock()
	s := t.stage
	if p.Request != nil {
		switch {
		case string(p.Request.Addr) != from:
			return nil, fmt.Errorf("%w: %s speaks for %s", ErrFrame, from, p.Request.Addr)
		case p.At != 0 || p.Request.Size < 0 || p.Request.Size > snapshotMax:
			return nil, fmt.Errorf("%w: a snapshot of %d bytes that begins at %d", ErrFrame, p.Request.Size, p.At)
		case s != nil && p.Request.Term < s.req.Term:
			return nil, errSuperseded
		}
		t.dropStageLocked(s)
		f, err := os.CreateTemp(t.p.cfg.StageDir, "install-")
		if err != nil {
			return nil, err
		}
		s = &staging{from: from, id: p.ID, req: p.Request, installed: p.Installed, f: f}
		t.stage = s
	}
	if s == nil || s.from != from || s.id != p.ID {
		return nil, errSuperseded
	}
	if p.At != s.at || s.at+int64(len(data)) > s.req.Size || p.Last && s.at+int64(len(data)) != s.req.Size {
		t.dropStageLocked(s)
		return nil, fmt.Errorf("%w: %d bytes at %d of a snapshot of %d, %d are here", ErrFrame, len(data), p.At, s.req.Size, s.at)
	}
	if _, err := s.f.WriteAt(data, s.at); err != nil {
		t.dropStageLocked(s)
		return nil, err
	}
	s.at += int64(len(data))
	return s, nil
}

// dropStage forgets a staging, or with nil whichever there is.
func (t *Transport) dropStage(s *staging) {
	t.stageMu.Lock()
	defer t.stageMu.Unlock()
	if s == nil {
		s = t.stage
	}
	t.dropStageLocked(s)
}

func (t *Transport) dropStageLocked(s *staging) {
	if s == nil || s.f == nil {
		return
	}
	_ = s.f.Close()
	_ = os.Remove(s.f.Name()) // what is left is swept at the next start
	s.f = nil
	if t.stage == s {
		t.stage = nil
	}
}

// install gives raft a snapshot that is here whole.
func (t *Transport) install(x *inbound, s *staging) (*raft.InstallSnapshotResponse, error) {
	t.stageMu.Lock()
	if t.stage == s {
		t.stage = nil // the next one may be received meanwhile
	}
	t.stageMu.Unlock()
	var out *raft.InstallSnapshotResponse
	stale, err := t.g.Install(s.req.LastLogIndex, s.req.LastLogTerm, s.installed, func() error {
		// A candidate of this term must become a follower first: raft's installSnapshot sets the leader, not the state.
		beat := &raft.AppendEntriesRequest{RPCHeader: s.req.RPCHeader, Term: s.req.Term}
		if _, err := t.hand(x, beat, nil); err != nil {
			return err
		}
		resp, err := t.hand(x, s.req, io.NewSectionReader(s.f, 0, s.at))
		if err != nil {
			return err
		}
		out, _ = resp.(*raft.InstallSnapshotResponse)
		if out == nil {
			return fmt.Errorf("peer: raft answered %T", resp)
		}
		return nil
	})
	if !stale {
		return out, err
	}
	// What it holds is here already. raft would send it for ever if it were told anything else.
	term, ok := t.g.Term()
	return &raft.InstallSnapshotResponse{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}, Term: max(term, s.req.Term), Success: ok && s.req.Term >= term}, nil
}
