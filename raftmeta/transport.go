package raftmeta

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// errNoPeer: this node is its group's only voter and talks to nobody.
var errNoPeer = errors.New("raftmeta: no peer")

// loner is the transport of a group whose only voter is this node. Its one duty is to make that voter leader at once, instead of after
// an election timeout.
type loner struct {
	addr raft.ServerAddress
	rpc  chan raft.RPC
}

var (
	_ raft.Transport   = (*loner)(nil)
	_ raft.WithPreVote = (*loner)(nil)
	_ raft.WithClose   = (*loner)(nil)
)

func newLoner(id string) *loner {
	return &loner{addr: raft.ServerAddress(id), rpc: make(chan raft.RPC, 1)}
}

// electNow hands raft a TimeoutNow: it stands for election at once. Elections are always safe; this only chooses their moment.
func (t *loner) electNow() {
	t.rpc <- raft.RPC{Command: &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(t.addr), Addr: []byte(t.addr)}},
		RespChan: make(chan raft.RPCResponse, 1)}
}

func (t *loner) Consumer() <-chan raft.RPC          { return t.rpc }
func (t *loner) LocalAddr() raft.ServerAddress      { return t.addr }
func (t *loner) SetHeartbeatHandler(func(raft.RPC)) {} // never: the fast path can lose acknowledged writes (hashicorp/raft #695)
func (t *loner) Close() error                       { return nil }
func (t *loner) EncodePeer(id raft.ServerID, _ raft.ServerAddress) []byte {
	return []byte(id)
}
func (t *loner) DecodePeer(b []byte) raft.ServerAddress { return raft.ServerAddress(b) }
func (t *loner) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, errNoPeer
}
func (t *loner) AppendEntries(raft.ServerID, raft.ServerAddress, *raft.AppendEntriesRequest, *raft.AppendEntriesResponse) error {
	return errNoPeer
}
func (t *loner) RequestVote(raft.ServerID, raft.ServerAddress, *raft.RequestVoteRequest, *raft.RequestVoteResponse) error {
	return errNoPeer
}
func (t *loner) RequestPreVote(raft.ServerID, raft.ServerAddress, *raft.RequestPreVoteRequest, *raft.RequestPreVoteResponse) error {
	return errNoPeer
}
func (t *loner) InstallSnapshot(raft.ServerID, raft.ServerAddress, *raft.InstallSnapshotRequest, *raft.InstallSnapshotResponse, io.Reader) error {
	return errNoPeer
}
func (t *loner) TimeoutNow(raft.ServerID, raft.ServerAddress, *raft.TimeoutNowRequest, *raft.TimeoutNowResponse) error {
	return errNoPeer
}

// Peer handshake, both directions: magic, version 2, length 4, JSON.
const (
	peerMagic    = "ESTRPEER"
	peerVersion  = 1
	peerMax      = 64 << 10
	peerDeadline = 5 * time.Second
	peersMax     = 64
)

// hello is what the two ends of a peer connection say first.
type hello struct {
	Cluster string
	Server  string // node ID "." incarnation of the speaker
	Target  string `json:",omitempty"` // whom the speaker wants; "" = whoever answers
	Error   string `json:",omitempty"` // why the connection is refused
}

// peerServer answers handshakes on the peer port. With one voter there is nothing more to say: a peer learns who this is, and a wrong target
// is refused.
type peerServer struct {
	self hello
	l    net.Listener
	log  *slog.Logger
	wg   sync.WaitGroup
	slot chan struct{}
}

func servePeers(l net.Listener, self hello, log *slog.Logger) *peerServer {
	s := &peerServer{self: self, l: l, log: log, slot: make(chan struct{}, peersMax)}
	s.wg.Go(s.accept)
	return s
}

func (s *peerServer) accept() {
	for {
		c, err := s.l.Accept()
		if err != nil {
			return
		}
		select {
		case s.slot <- struct{}{}:
			s.wg.Go(func() {
				defer func() { c.Close(); <-s.slot }()
				if err := s.answer(c); err != nil {
					s.log.Debug("peer handshake failed", "peer", c.RemoteAddr(), "err", err)
				}
			})
		default:
			c.Close()
		}
	}
}

func (s *peerServer) answer(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(peerDeadline)); err != nil {
		return err
	}
	h, err := readHello(bufio.NewReader(c))
	if err != nil {
		return err
	}
	ans := s.self
	switch {
	case h.Cluster != "" && h.Cluster != s.self.Cluster:
		ans = hello{Error: fmt.Sprintf("this node belongs to another cluster than %q", h.Cluster)}
	case h.Target != "" && h.Target != s.self.Server:
		ans = hello{Error: fmt.Sprintf("this is not %s", h.Target)}
	default:
		ans.Error = "this node is the only voter of its groups"
	}
	return writeHello(c, ans)
}

func readHello(r io.Reader) (h hello, err error) {
	head := make([]byte, len(peerMagic)+6)
	if _, err := io.ReadFull(r, head); err != nil {
		return h, err
	}
	be := binary.BigEndian
	if string(head[:8]) != peerMagic {
		return h, errors.New("not a peer of Estran")
	}
	if v := be.Uint16(head[8:]); v != peerVersion {
		return h, fmt.Errorf("peer speaks version %d, this program %d", v, peerVersion)
	}
	n := be.Uint32(head[10:])
	if n > peerMax {
		return h, fmt.Errorf("handshake of %d bytes", n)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return h, err
	}
	return h, json.Unmarshal(body, &h)
}

func writeHello(w io.Writer, h hello) error {
	body, err := json.Marshal(h)
	if err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint16([]byte(peerMagic), peerVersion)
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
	_, err = w.Write(append(b, body...))
	return err
}

func (s *peerServer) close() error {
	err := s.l.Close()
	s.wg.Wait()
	return err
}
