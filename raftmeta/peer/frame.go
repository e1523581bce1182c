// Package peer is the transport of a node's Raft groups: framed, authenticated, one order per group. FORMAT.md is what goes over the wire. It knows raft's requests and a
// log's entries by (index, term); it knows no state and no Kafka.
//
// The invariants: what reaches raft is what the sender's log holds, checked; a stalled group holds up no other; nothing waits without a limit.
package peer

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"time"

	"github.com/hashicorp/raft"
)

type kind uint8

const (
	kindAppend     kind = 1
	kindVote       kind = 2
	kindPreVote    kind = 3
	kindTimeoutNow kind = 4
	kindInstall    kind = 5
	kindTerm       kind = 6
	kindForward    kind = 7
	kindFollow     kind = 8
	kindPart       kind = 9
	kindReach      kind = 10
	kindBytes      kind = 11
	kindLast            = kindBytes
)

// String returns the label of the metrics.
func (k kind) String() string {
	return [...]string{"", "append", "vote", "prevote", "timeout_now", "install", "term", "forward", "follow", "part", "reach", "bytes"}[k]
}

// most is the limit of a message of this kind: who sends more is no peer of this version.
func (k kind) most(answer bool) uint32 {
	switch {
	case answer && k == kindBytes:
		return chunkMax
	case answer && k == kindPart: // nobody answers one
		return 0
	case answer:
		return answerMax
	}
	return [...]uint32{kindAppend: messageMax, kindVote: smallMax, kindPreVote: smallMax, kindTimeoutNow: smallMax, kindInstall: smallMax + chunkMax, kindTerm: 0, kindForward: metaMax, kindFollow: followBytes, kindPart: messageMax, kindReach: 0, kindBytes: bytesAskBytes}[k]
}

const (
	frameLeast   = 1
	frameVersion = 1
	frameHeader  = 40
	chunkMax     = 256 << 10
	messageMax   = 24 << 20
	metaMax      = 1 << 20
	smallMax     = 64 << 10
	answerMax    = 64 << 10
	entryMeta    = 41

	flagAnswer = 1
	flagMore   = 2
	flagsKnown = flagAnswer | flagMore

	statusOK      = 0
	statusRefused = 1
)

// ErrFrame: what a peer sent is no frame of this version.
var ErrFrame = errors.New("peer: bad frame")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crcOf(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// header is a frame's.
type header struct {
	kind        kind
	flags       uint8
	length      uint32
	group       uint32
	id          uint64
	total, meta uint32
	metaCRC     uint32
}

func (h *header) encode(b []byte) {
	be := binary.BigEndian
	b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7] = 'E', 'P', frameVersion, byte(h.kind), h.flags, 0, 0, 0
	be.PutUint32(b[8:], h.length)
	be.PutUint32(b[12:], h.group)
	be.PutUint64(b[16:], h.id)
	be.PutUint32(b[24:], h.total)
	be.PutUint32(b[28:], h.meta)
	be.PutUint32(b[32:], h.metaCRC)
	be.PutUint32(b[36:], crcOf(b[:36]))
}

func decodeHeader(b []byte) (h header, err error) {
	be := binary.BigEndian
	switch {
	case len(b) < frameHeader || b[0] != 'E' || b[1] != 'P':
		return h, fmt.Errorf("%w: no magic", ErrFrame)
	case be.Uint32(b[36:]) != crcOf(b[:36]):
		return h, fmt.Errorf("%w: checksum of the header", ErrFrame)
	case b[2] < frameLeast || b[2] > frameVersion:
		return h, fmt.Errorf("%w: frame of version %d, this program speaks %d to %d", ErrVersion, b[2], frameLeast, frameVersion)
	case b[3] == 0 || kind(b[3]) > kindLast || b[4]&^flagsKnown != 0 || b[5]|b[6]|b[7] != 0:
		return h, fmt.Errorf("%w: frame of kind %d with flags % x", ErrVersion, b[3], b[4:8])
	}
	h = header{kind: kind(b[3]), flags: b[4], length: be.Uint32(b[8:]), group: be.Uint32(b[12:]), id: be.Uint64(b[16:]), total: be.Uint32(b[24:]), meta: be.Uint32(b[28:]), metaCRC: be.Uint32(b[32:])}
	if h.flags == flagAnswer|flagMore || h.length > chunkMax || h.total > h.kind.most(h.flags&flagAnswer != 0) || h.meta > metaMax || h.meta > h.total || h.length > h.total {
		return h, fmt.Errorf("%w: %s with flags %d: %d bytes of %d, %d of them meta", ErrFrame, h.kind, h.flags, h.length, h.total, h.meta)
	}
	return h, nil
}

// message is one that was received whole.
type message struct {
	header
	body []byte
	lent bool // body is from Config.GetBuffer
	idle bool // nothing refers to body any more
}

func (m *message) metaPart() []byte { return m.body[:m.meta] }
func (m *message) bulk() []byte     { return m.body[m.meta:] }

// assembler puts messages together; one frame of a group belongs to the message that the frame before it began.
type assembler struct {
	r    *bufio.Reader
	get  func(int) []byte    // memory for requests that carry entries
	late func(time.Duration) // sets how long a read may take from now on, 0 = for ever
	body time.Duration
	open map[uint32]*message // by group
	got  map[uint32]uint32
	// held bounds what is being put together.
	held int
	head [frameHeader]byte
}

// newAssembler reads from a connection; what is left of a frame that has begun must come within `body`.
func newAssembler(c net.Conn, buffer int, body time.Duration) *assembler {
	a := &assembler{r: bufio.NewReaderSize(c, buffer), body: body, open: map[uint32]*message{}, got: map[uint32]uint32{}}
	a.get = func(n int) []byte { return make([]byte, n) }
	a.late = func(d time.Duration) {
		at := time.Time{}
		if d > 0 {
			at = time.Now().Add(d)
		}
		_ = c.SetReadDeadline(at) // fails on a closed connection only, and so does the read
	}
	return a
}

// fill reads a part of a frame. What is here already needs no clock.
func (a *assembler) fill(b []byte) error {
	if a.r.Buffered() >= len(b) {
		_, err := io.ReadFull(a.r, b)
		return err
	}
	a.late(a.body)
	_, err := io.ReadFull(a.r, b)
	a.late(0)
	return err
}

const (
	heldMax = 4 * messageMax
	// lentLeast is the shortest request whose memory is used again.
	lentLeast = 16 << 10
)

// next returns the next message that is whole.
func (a *assembler) next() (*message, error) {
	for {
		if _, err := a.r.Peek(1); err != nil { // a peer may have nothing to say for long
			return nil, err
		}
		if err := a.fill(a.head[:]); err != nil {
			return nil, err
		}
		h, err := decodeHeader(a.head[:])
		if err != nil {
			return nil, err
		}
		m := a.open[h.group]
		if m == nil {
			if a.held += int(h.total); a.held > heldMax {
				return nil, fmt.Errorf("%w: %d bytes of messages that are not whole", ErrFrame, a.held)
			}
			m = &message{header: h}
			if m.lent = h.kind == kindAppend && h.flags&flagAnswer == 0 && h.total >= lentLeast; m.lent {
				m.body = a.get(int(h.total))
			} else {
				m.body = make([]byte, h.total)
			}
			a.open[h.group], a.got[h.group] = m, 0
		}
		at := a.got[h.group]
		last := h.flags&flagMore == 0
		if h.id != m.id || h.kind != m.kind || (h.flags^m.flags)&flagAnswer != 0 || h.total != m.total || h.meta != m.meta || h.metaCRC != m.metaCRC || at+h.length > m.total || last != (at+h.length == m.total) || !last && h.length == 0 {
			return nil, fmt.Errorf("%w: a frame that does not continue message %d of group %d", ErrFrame, m.id, h.group)
		}
		if err := a.fill(m.body[at : at+h.length]); err != nil {
			return nil, err
		}
		a.got[h.group] = at + h.length
		if !last {
			continue
		}
		delete(a.open, h.group)
		delete(a.got, h.group)
		a.held -= int(m.total)
		if crcOf(m.metaPart()) != m.metaCRC {
			return nil, fmt.Errorf("%w: checksum of the meta part of message %d", ErrFrame, m.id)
		}
		m.flags = h.flags
		return m, nil
	}
}

// contactsMax bounds the servers that a heartbeat names.
const contactsMax = 32

// encodeAppend makes the meta part of a request; contacts are the servers that the leader is in contact with, in heartbeats.
func encodeAppend(a *raft.AppendEntriesRequest, crcs []entryCRC, contacts []string) []byte {
	be := binary.BigEndian
	leader := a.RPCHeader.Addr
	contacts = contacts[:min(len(contacts), contactsMax)]
	size := 43 + len(leader) + entryMeta*len(a.Entries)
	for _, c := range contacts {
		size += 1 + len(c)
	}
	b := make([]byte, 0, size)
	b = be.AppendUint32(b, uint32(a.ProtocolVersion))
	for _, v := range []uint64{a.Term, a.PrevLogEntry, a.PrevLogTerm, a.LeaderCommitIndex} {
		b = be.AppendUint64(b, v)
	}
	b = be.AppendUint16(b, uint16(len(leader)))
	b = append(b, leader...)
	b = append(b, byte(len(contacts)))
	for _, c := range contacts {
		b = append(append(b, byte(len(c))), c...)
	}
	b = be.AppendUint32(b, uint32(len(a.Entries)))
	for i, e := range a.Entries {
		b = be.AppendUint64(b, e.Index)
		b = be.AppendUint64(b, e.Term)
		b = append(b, byte(e.Type))
		at := int64(0)
		if !e.AppendedAt.IsZero() {
			at = e.AppendedAt.UnixNano()
		}
		b = be.AppendUint64(b, uint64(at))
		b = be.AppendUint32(b, uint32(len(e.Data)))
		b = be.AppendUint32(b, crcs[i].extLen)
		b = be.AppendUint32(b, crcs[i].data)
		b = be.AppendUint32(b, crcs[i].ext)
	}
	return b
}

// entryCRC is what a frame says of an entry's bytes.
type entryCRC struct{ data, ext, extLen uint32 }

// decodeContacts reads the servers that a heartbeat names.
func decodeContacts(b []byte) (contacts []string, rest []byte, ok bool) {
	if len(b) < 1 || b[0] > contactsMax {
		return nil, nil, false
	}
	n, b := int(b[0]), b[1:]
	for range n {
		if len(b) < 1 || len(b) < 1+int(b[0]) {
			return nil, nil, false
		}
		contacts, b = append(contacts, string(b[1:1+b[0]])), b[1+int(b[0]):]
	}
	return contacts, b, true
}

// decodeAppend reads a request whose entries alias bulk. Every byte has been checked when it returns.
func decodeAppend(meta, bulk []byte) (*raft.AppendEntriesRequest, []entryCRC, []string, error) {
	be := binary.BigEndian
	bad := func(why string) (*raft.AppendEntriesRequest, []entryCRC, []string, error) {
		return nil, nil, nil, fmt.Errorf("%w: append: %s", ErrFrame, why)
	}
	if len(meta) < 38 {
		return bad("short")
	}
	a := &raft.AppendEntriesRequest{Term: be.Uint64(meta[4:]), PrevLogEntry: be.Uint64(meta[12:]), PrevLogTerm: be.Uint64(meta[20:]), LeaderCommitIndex: be.Uint64(meta[28:])}
	n := int(be.Uint16(meta[36:]))
	rest := meta[38:]
	if len(rest) < n {
		return bad("short")
	}
	a.RPCHeader = raft.RPCHeader{ProtocolVersion: raft.ProtocolVersion(be.Uint32(meta)), ID: rest[:n:n], Addr: rest[:n:n]}
	contacts, rest, ok := decodeContacts(rest[n:])
	if !ok || len(rest) < 4 {
		return bad("servers in contact")
	}
	count := be.Uint32(rest)
	rest = rest[4:]
	if uint64(len(rest)) != uint64(count)*entryMeta {
		return bad("number of entries")
	}
	logs, crcs := make([]raft.Log, count), make([]entryCRC, count)
	a.Entries = make([]*raft.Log, count)
	for i := range logs {
		m := rest[i*entryMeta:]
		dataLen, extLen := be.Uint32(m[25:]), be.Uint32(m[29:])
		if uint64(dataLen)+uint64(extLen) > uint64(len(bulk)) {
			return bad("length of an entry")
		}
		e := &logs[i]
		e.Index, e.Term, e.Type = be.Uint64(m), be.Uint64(m[8:]), raft.LogType(m[16])
		if at := int64(be.Uint64(m[17:])); at != 0 {
			e.AppendedAt = time.Unix(0, at)
		}
		e.Data, bulk = bulk[:dataLen:dataLen], bulk[dataLen:]
		if extLen > 0 {
			e.Extensions, bulk = bulk[:extLen:extLen], bulk[extLen:]
		}
		crcs[i] = entryCRC{be.Uint32(m[33:]), be.Uint32(m[37:]), extLen}
		if crcOf(e.Data) != crcs[i].data || crcOf(e.Extensions) != crcs[i].ext {
			return bad(fmt.Sprintf("checksum of entry %d", e.Index))
		}
		a.Entries[i] = e
	}
	if len(bulk) > 0 {
		return bad("bytes behind the last entry")
	}
	return a, crcs, contacts, nil
}

// appendAnswerBytes is the length of an answer behind its status.
const appendAnswerBytes = 38

func encodeAppendAnswer(r *raft.AppendEntriesResponse, clock time.Time, free int64) []byte {
	be := binary.BigEndian
	b := append(make([]byte, 0, 1+appendAnswerBytes), statusOK)
	b = be.AppendUint32(b, uint32(r.ProtocolVersion))
	b = be.AppendUint64(b, r.Term)
	b = be.AppendUint64(b, r.LastLog)
	b = append(b, bit(r.Success), bit(r.NoRetryBackoff))
	b = be.AppendUint64(b, uint64(clock.UnixMilli()))
	return be.AppendUint64(b, uint64(free))
}

func bit(v bool) byte {
	if v {
		return 1
	}
	return 0
}

func decodeAppendAnswer(b []byte, r *raft.AppendEntriesResponse) (clock time.Time, free int64, err error) {
	if len(b) != appendAnswerBytes || b[20] > 1 || b[21] > 1 {
		return clock, 0, fmt.Errorf("%w: answer of %d bytes to an append", ErrFrame, len(b))
	}
	be := binary.BigEndian
	r.ProtocolVersion = raft.ProtocolVersion(be.Uint32(b))
	r.Term, r.LastLog = be.Uint64(b[4:]), be.Uint64(b[12:])
	r.Success, r.NoRetryBackoff = b[20] == 1, b[21] == 1
	return time.UnixMilli(int64(be.Uint64(b[22:]))), int64(be.Uint64(b[30:])), nil
}
