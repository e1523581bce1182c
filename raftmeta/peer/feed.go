package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
)

// Position is a place in a group's log as its state sees it: the last command that was applied, and the chain hash over all commands up to it.
type Position struct {
	Index uint64
	Chain [chainBytes]byte
}

// FeedEntry is a committed command.
type FeedEntry struct {
	// Prev is the index of the command before it: raft's indexes are sparse for a state.
	Prev        uint64
	Index, Term uint64
	// Chain is the chain hash behind it.
	Chain [chainBytes]byte
	Data  []byte
	// Payload is whole, or nil where it is not sent; PayloadCRC is its own, by the entry's header.
	Payload    []byte
	PayloadCRC uint32
}

// Place is where in an entry bytes lie.
type Place uint8

// The places.
const (
	PlaceData    Place = 0
	PlacePayload Place = 1
)

// BytesAsked names bytes of an entry.
type BytesAsked struct {
	Index, Term uint64
	Place       Place
	From, Len   uint32
}

// EntryBytes is the answer.
type EntryBytes struct {
	// Gone: the entry was freed. Whoever has applied all up to Applied finds it sealed, or deleted.
	Gone    bool
	Applied uint64
	// Total is how long the part is that was asked for, Bytes what there is of it from the asked place on.
	Total uint32
	Bytes []byte
}

// Reach is how far a group is.
type Reach struct {
	// Proven: Index covers all that was acknowledged before the question came. Only the leader can tell.
	Proven bool
	Index  uint64
	// Leader is the server that leads as far as the one that was asked knows, "" if none.
	Leader string
}

const (
	chainBytes = 16
	// bytesMax is what one question for bytes is answered with at most: with its header they are one frame.
	bytesMax = chunkMax - 64
	// stateMax bounds a state that is sent to a follower.
	stateMax = 1 << 30

	followBytes    = 9 + chainBytes
	bytesAskBytes  = 25
	bytesHeadBytes = 13
	stateMeta      = 22 + chainBytes
	entryPartMeta  = 41 + chainBytes
	idleMeta       = 9 + chainBytes

	followPayload = 1

	followGoesOn = 0
	followState  = 1
)

// part is the type of a part of a feed.
type part uint8

const (
	partState part = 1
	partEntry part = 2
	partIdle  part = 3
)

func appendPosition(b []byte, p Position) []byte {
	return append(binary.BigEndian.AppendUint64(b, p.Index), p.Chain[:]...)
}

func readPosition(b []byte) (p Position) {
	p.Index = binary.BigEndian.Uint64(b)
	copy(p.Chain[:], b[8:])
	return p
}

func encodeFollow(from Position, payload bool) []byte {
	return appendPosition([]byte{bit(payload) * followPayload}, from)
}

func decodeFollow(b []byte) (from Position, payload bool, err error) {
	if len(b) != followBytes || b[0]&^followPayload != 0 {
		return from, false, fmt.Errorf("%w: follow of %d bytes", ErrFrame, len(b))
	}
	return readPosition(b[1:]), b[0] == followPayload, nil
}

// partCall is a part as a message: its bulk is not copied.
func partCall(group uint32, meta []byte, bulk ...[]byte) *call {
	c := &call{kind: kindPart, group: group, meta: meta}
	for _, b := range bulk {
		if len(b) > 0 {
			c.bulk, c.size = append(c.bulk, b), c.size+len(b)
		}
	}
	return c
}

// cut encodes a message as frames.
func (c *call) cut() (bufs net.Buffers) {
	total := len(c.meta) + c.size
	heads := make([]byte, 0, frameHeader*max(1, (total+chunkMax-1)/chunkMax))
	for first := true; first || c.sent < total; first = false {
		heads, bufs, _ = c.chunk(heads, bufs)
	}
	return bufs
}

// encodeEntry makes the frames of an entry, which hold its bytes as they are.
func encodeEntry(group uint32, e *FeedEntry) net.Buffers {
	be := binary.BigEndian
	b := make([]byte, 0, entryPartMeta)
	b = append(b, byte(partEntry))
	for _, v := range []uint64{e.Prev, e.Index, e.Term} {
		b = be.AppendUint64(b, v)
	}
	b = append(b, e.Chain[:]...)
	for _, v := range []uint32{uint32(len(e.Data)), crcOf(e.Data), uint32(len(e.Payload)), e.PayloadCRC} {
		b = be.AppendUint32(b, v)
	}
	return partCall(group, b, e.Data, e.Payload).cut()
}

// encodeState makes the frames of a piece of a state.
func encodeState(group uint32, of Position, at uint64, last bool, piece []byte) net.Buffers {
	b := append(make([]byte, 0, stateMeta), byte(partState))
	b = binary.BigEndian.AppendUint64(appendPosition(b, of), at)
	b = binary.BigEndian.AppendUint32(append(b, bit(last)), crcOf(piece))
	return partCall(group, b, piece).cut()
}

func encodeIdle(group uint32, at Position) net.Buffers {
	return partCall(group, appendPosition(append(make([]byte, 0, idleMeta), byte(partIdle)), at)).cut()
}

// statePiece is a piece of a state: what lies from `at` on, of the state at a position.
type statePiece struct {
	of   Position
	at   uint64
	last bool
	data []byte
}

// decodePart reads a part, whose bytes alias the message: a statePiece, a FeedEntry, or the Position at which the sender is idle. Every byte has been checked when it returns, but
// for what the chain hash says.
func decodePart(m *message) (any, error) {
	bad := func(why string) (any, error) { return nil, fmt.Errorf("%w: part: %s", ErrFrame, why) }
	meta, bulk := m.metaPart(), m.bulk()
	if len(meta) < 1 {
		return bad("empty")
	}
	switch be := binary.BigEndian; part(meta[0]) {
	case partState:
		if len(meta) != stateMeta || meta[9+chainBytes+8] > 1 {
			return bad("piece of a state")
		}
		p := statePiece{readPosition(meta[1:]), be.Uint64(meta[9+chainBytes:]), meta[17+chainBytes] == 1, bulk}
		if be.Uint32(meta[18+chainBytes:]) != crcOf(bulk) {
			return bad("checksum of a piece of a state")
		}
		if p.at > stateMax-uint64(len(bulk)) || len(bulk) == 0 && !p.last {
			return bad(fmt.Sprintf("%d bytes of a state at %d", len(bulk), p.at))
		}
		return p, nil
	case partEntry:
		if len(meta) != entryPartMeta {
			return bad("entry")
		}
		e := FeedEntry{Prev: be.Uint64(meta[1:]), Index: be.Uint64(meta[9:]), Term: be.Uint64(meta[17:])}
		copy(e.Chain[:], meta[25:])
		b := meta[25+chainBytes:]
		dataLen, dataCRC, payloadLen := be.Uint32(b), be.Uint32(b[4:]), be.Uint32(b[8:])
		e.PayloadCRC = be.Uint32(b[12:])
		if uint64(dataLen)+uint64(payloadLen) != uint64(len(bulk)) || e.Prev >= e.Index {
			return bad(fmt.Sprintf("entry %d behind %d", e.Index, e.Prev))
		}
		if e.Data = bulk[:dataLen:dataLen]; payloadLen > 0 {
			e.Payload = bulk[dataLen:]
		}
		if crcOf(e.Data) != dataCRC || e.Payload != nil && crcOf(e.Payload) != e.PayloadCRC {
			return bad(fmt.Sprintf("checksum of entry %d", e.Index))
		}
		return e, nil
	case partIdle:
		if len(meta) != idleMeta || len(bulk) > 0 {
			return bad("idle")
		}
		return readPosition(meta[1:]), nil
	}
	return bad(fmt.Sprintf("type %d", meta[0]))
}

func encodeBytesAsked(a BytesAsked) []byte {
	be := binary.BigEndian
	b := be.AppendUint64(be.AppendUint64(nil, a.Index), a.Term)
	b = append(b, byte(a.Place))
	return be.AppendUint32(be.AppendUint32(b, a.From), a.Len)
}

func decodeBytesAsked(b []byte) (a BytesAsked, err error) {
	if len(b) != bytesAskBytes || Place(b[16]) > PlacePayload {
		return a, fmt.Errorf("%w: question of %d bytes for bytes", ErrFrame, len(b))
	}
	be := binary.BigEndian
	return BytesAsked{be.Uint64(b), be.Uint64(b[8:]), Place(b[16]), be.Uint32(b[17:]), be.Uint32(b[21:])}, nil
}

func encodeBytes(e *EntryBytes) []byte {
	be := binary.BigEndian
	b := append(make([]byte, 0, 1+bytesHeadBytes+len(e.Bytes)), statusOK, bit(e.Gone))
	b = be.AppendUint32(be.AppendUint64(b, e.Applied), e.Total)
	return append(b, e.Bytes...)
}

func decodeBytes(b []byte) (e EntryBytes, err error) {
	if len(b) < bytesHeadBytes || b[0] > 1 {
		return e, fmt.Errorf("%w: answer of %d bytes to a question for bytes", ErrFrame, len(b))
	}
	be := binary.BigEndian
	e = EntryBytes{Gone: b[0] == 1, Applied: be.Uint64(b[1:]), Total: be.Uint32(b[9:]), Bytes: b[bytesHeadBytes:]}
	if uint64(len(e.Bytes)) > uint64(e.Total) || e.Gone && e.Total > 0 {
		return e, fmt.Errorf("%w: %d bytes of %d", ErrFrame, len(e.Bytes), e.Total)
	}
	return e, nil
}

func encodeReach(r Reach) []byte {
	b := binary.BigEndian.AppendUint64([]byte{statusOK, bit(r.Proven)}, r.Index)
	return append(b, r.Leader[:min(len(r.Leader), nameMax)]...)
}

func decodeReach(b []byte) (r Reach, err error) {
	if len(b) < 9 || len(b) > 9+nameMax || b[0] > 1 {
		return r, fmt.Errorf("%w: reach of %d bytes", ErrFrame, len(b))
	}
	return Reach{b[0] == 1, binary.BigEndian.Uint64(b[1:]), string(b[9:])}, nil
}

// stateReader is a state that comes in pieces.
type stateReader struct {
	next func() (any, error)
	of   Position
	at   uint64
	left []byte
	last bool
}

// Read implements io.Reader.
func (r *stateReader) Read(b []byte) (int, error) {
	for len(r.left) == 0 {
		if r.last {
			return 0, io.EOF
		}
		x, err := r.next()
		if err != nil {
			return 0, err
		}
		if err := r.take(x); err != nil {
			return 0, err
		}
	}
	n := copy(b, r.left)
	r.left = r.left[n:]
	return n, nil
}

func (r *stateReader) take(x any) error {
	p, ok := x.(statePiece)
	if !ok || p.of != r.of || p.at != r.at || r.last {
		return fmt.Errorf("%w: a part that does not continue a state at byte %d", ErrFrame, r.at)
	}
	r.left, r.last, r.at = p.data, p.last, p.at+uint64(len(p.data))
	return nil
}

// drain makes sure that a state ended where its reader found its end.
func (r *stateReader) drain() error {
	n, err := io.Copy(io.Discard, r)
	if err == nil && n > 64 { // a decoder leaves what follows the value: a newline
		err = errors.New("peer: bytes behind a state")
	}
	return err
}
