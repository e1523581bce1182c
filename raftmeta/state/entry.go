// Package state holds the state machines of Estran: Meta (topics, nodes, configuration) and Shard (partitions, manifests, producers, groups).
// They are pure: the same entries give the same state and the same snapshot bytes. They read no clock and no configuration that is not in
// their own log, start no goroutine, and lock nothing: whoever applies also guards.
package state

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/estran/estran/tiering/record"
)

// RaftIndex and Term are raft's, kept apart from offsets.
type (
	RaftIndex uint64
	Term      uint64
)

const (
	entryVersion  = 1
	entryHeader   = 28
	sectionHeader = 8
	slotBytes     = 60
	flagIgnorable = 1
	// SlotsMax is the most batches that one entry may carry.
	SlotsMax = 1 << 15
)

// Kind is a command's kind. Kinds are appended, never renumbered.
type Kind uint8

// The kinds.
const (
	KindAppend          Kind = 1
	KindRehome          Kind = 2
	KindLeaderStart     Kind = 3
	KindMetaEffects     Kind = 4
	KindPrepare         Kind = 5
	KindCommit          Kind = 6
	KindAdvanceLogStart Kind = 7
	KindSweep           Kind = 8
	KindForget          Kind = 9
	KindPutGroup        Kind = 10
	KindCommitOffsets   Kind = 11
	KindDeleteGroup     Kind = 12
	KindDeleteOffsets   Kind = 13

	KindInitCluster    Kind = 64
	KindRegisterNode   Kind = 65
	KindCreateTopic    Kind = 66
	KindDeleteTopic    Kind = 67
	KindCreateParts    Kind = 68
	KindAlterConfigs   Kind = 69
	KindAllocProducers Kind = 70
	KindTrimOutbox     Kind = 71
	KindAlterMembers   Kind = 72
	KindDrain          Kind = 73
	KindPreferLeader   Kind = 74
	KindForgetNode     Kind = 75
	KindAddShards      Kind = 76
	KindRecover        Kind = 77
	KindSettleSlots    Kind = 78
	KindRaiseLevel     Kind = 79
)

// ErrEntry: the bytes are no entry.
var ErrEntry = errors.New("state: malformed entry")

// Header is what every command entry begins with.
type Header struct {
	Term       Term
	Version    uint8
	Place      uint8
	PayloadLen uint32
	PayloadCRC uint32
	TimeMs     record.Timestamp
}

func decodeHeader(data []byte) (h Header, rest []byte, err error) {
	if len(data) < entryHeader {
		return h, nil, fmt.Errorf("%w: %d bytes", ErrEntry, len(data))
	}
	be := binary.BigEndian
	h = Header{Term(be.Uint64(data)), data[8], data[9], be.Uint32(data[12:]), be.Uint32(data[16:]), record.Timestamp(be.Uint64(data[20:]))}
	if h.Version != entryVersion {
		return h, nil, fmt.Errorf("%w: version %d", ErrEntry, h.Version)
	}
	return h, data[entryHeader:], nil
}

// nextSection splits the first section off b.
func nextSection(b []byte) (kind Kind, flags uint8, body, rest []byte, err error) {
	if len(b) < sectionHeader {
		return 0, 0, nil, nil, fmt.Errorf("%w: section of %d bytes", ErrEntry, len(b))
	}
	n := binary.BigEndian.Uint32(b[4:])
	if uint64(n) > uint64(len(b)-sectionHeader) {
		return 0, 0, nil, nil, fmt.Errorf("%w: section of %d bytes, %d are left", ErrEntry, n, len(b)-sectionHeader)
	}
	end := sectionHeader + int(n)
	return Kind(b[0]), b[1], b[sectionHeader:end:end], b[end:], nil
}

// Slot is one batch of an entry, decoded.
type Slot struct {
	Handle          uint64
	Pos, Len, CRC   uint32
	Attributes      int16
	LastOffsetDelta int32
	BaseTimestamp   record.Timestamp
	MaxTimestamp    record.Timestamp
	ProducerID      record.ProducerID
	ProducerEpoch   record.ProducerEpoch
	BaseSequence    record.Sequence
	Count           int32
}

// SlotOf describes a validated batch; handle and position are the caller's.
func SlotOf(b record.Batch) Slot {
	return Slot{Len: uint32(len(b)), CRC: b.CRC(), Attributes: b.Attributes(), LastOffsetDelta: b.LastOffsetDelta(), BaseTimestamp: b.BaseTimestamp(),
		MaxTimestamp: b.MaxTimestamp(), ProducerID: b.ProducerID(), ProducerEpoch: b.ProducerEpoch(), BaseSequence: b.BaseSequence(), Count: b.Count()}
}

// Offsets is the number of offsets that the batch takes.
func (s *Slot) Offsets() record.Offset { return record.Offset(s.LastOffsetDelta) + 1 }

func (s *Slot) append(b []byte) []byte {
	be := binary.BigEndian
	b = be.AppendUint64(b, s.Handle)
	b = be.AppendUint32(b, s.Pos)
	b = be.AppendUint32(b, s.Len)
	b = be.AppendUint32(b, s.CRC)
	b = be.AppendUint16(b, uint16(s.Attributes))
	b = be.AppendUint32(b, uint32(s.LastOffsetDelta))
	b = be.AppendUint64(b, uint64(s.BaseTimestamp))
	b = be.AppendUint64(b, uint64(s.MaxTimestamp))
	b = be.AppendUint64(b, uint64(s.ProducerID))
	b = be.AppendUint16(b, uint16(s.ProducerEpoch))
	b = be.AppendUint32(b, uint32(s.BaseSequence))
	return be.AppendUint32(b, uint32(s.Count))
}

// Slots views the directory of an entry in place.
type Slots struct {
	raw   []byte
	bases []byte // of a rehome: the offset of each slot
}

// Len is the number of slots.
func (s Slots) Len() int { return len(s.raw) / slotBytes }

// At decodes slot i.
func (s Slots) At(i int) Slot {
	b := s.raw[i*slotBytes : (i+1)*slotBytes]
	be := binary.BigEndian
	return Slot{Handle: be.Uint64(b), Pos: be.Uint32(b[8:]), Len: be.Uint32(b[12:]), CRC: be.Uint32(b[16:]), Attributes: int16(be.Uint16(b[20:])),
		LastOffsetDelta: int32(be.Uint32(b[22:])), BaseTimestamp: record.Timestamp(be.Uint64(b[26:])), MaxTimestamp: record.Timestamp(be.Uint64(b[34:])),
		ProducerID: record.ProducerID(be.Uint64(b[42:])), ProducerEpoch: record.ProducerEpoch(be.Uint16(b[50:])),
		BaseSequence: record.Sequence(be.Uint32(b[52:])), Count: int32(be.Uint32(b[56:]))}
}

func (s Slots) base(i int) record.Offset {
	return record.Offset(binary.BigEndian.Uint64(s.bases[i*8:]))
}

func decodeSlots(kind Kind, body []byte) (Slots, error) {
	if len(body) < 4 {
		return Slots{}, fmt.Errorf("%w: directory of %d bytes", ErrEntry, len(body))
	}
	n, per := int(binary.BigEndian.Uint32(body)), slotBytes
	if kind == KindRehome {
		per += 8
	}
	body = body[4:]
	if n > SlotsMax || len(body) != n*per {
		return Slots{}, fmt.Errorf("%w: %d slots in %d bytes", ErrEntry, n, len(body))
	}
	return Slots{raw: body[:n*slotBytes], bases: body[n*slotBytes:]}, nil
}

// DecodeSlots finds the directory in an entry's Data; it has no slots if the entry carries no batches.
func DecodeSlots(data []byte) (Slots, error) {
	_, rest, err := decodeHeader(data)
	for err == nil && len(rest) > 0 {
		var kind Kind
		var body []byte
		if kind, _, body, rest, err = nextSection(rest); err == nil && (kind == KindAppend || kind == KindRehome) {
			return decodeSlots(kind, body)
		}
	}
	return Slots{}, err
}

// Entry collects the commands of one entry. The zero value is empty. It is used by one goroutine at a time.
type Entry struct {
	slots  []Slot
	bases  []record.Offset // rehome
	rehome bool
	other  []byte // encoded sections
	count  int    // of other
}

// AddSlot appends a batch that stands at position pos of the payload and returns its place in arrival order.
func (e *Entry) AddSlot(s Slot) int {
	e.slots = append(e.slots, s)
	return len(e.slots) - 1
}

// AddRehomed appends a batch that already has an offset. It is not mixed with AddSlot.
func (e *Entry) AddRehomed(s Slot, base record.Offset) {
	e.rehome = true
	e.slots, e.bases = append(e.slots, s), append(e.bases, base)
}

// Add appends a command and returns its place among the commands that are not batches.
func (e *Entry) Add(c Command) (int, error) {
	body, err := json.Marshal(c)
	if err != nil {
		return 0, fmt.Errorf("state: encoding %T: %w", c, err)
	}
	e.other = append(e.other, byte(c.kind()), 0, 0, 0)
	e.other = binary.BigEndian.AppendUint32(e.other, uint32(len(body)))
	e.other = append(e.other, body...)
	e.count++
	return e.count - 1, nil
}

// Slots is the number of batches; Commands that of the others.
func (e *Entry) Slots() int { return len(e.slots) }

// Commands is the number of commands that are not batches.
func (e *Entry) Commands() int { return e.count }

// Bytes is about how long Data will be.
func (e *Entry) Bytes() int {
	return entryHeader + sectionHeader + 4 + len(e.slots)*slotBytes + len(e.other)
}

// Cut encodes the entry. The slots are ordered by handle, keeping the order of arrival within one; perm[i] is where the slot that arrived
// as number i went. It may be reused for each call.
func (e *Entry) Cut(term Term, payload []byte, timeMs record.Timestamp, perm []int32) (data []byte, newPerm []int32) {
	be := binary.BigEndian
	place := uint8(0)
	if len(payload) > 0 {
		place = 1
	}
	data = make([]byte, 0, e.Bytes()+8*len(e.bases))
	data = be.AppendUint64(data, uint64(term))
	data = append(data, entryVersion, place, 0, 0)
	data = be.AppendUint32(data, uint32(len(payload)))
	data = be.AppendUint32(data, record.CRC(payload))
	data = be.AppendUint64(data, uint64(max(timeMs, 0)))
	perm = perm[:0]
	for i := range e.slots {
		perm = append(perm, int32(i))
	}
	if len(e.slots) > 0 {
		data, perm = e.cutSlots(data, perm)
	}
	return append(data, e.other...), perm
}

func (e *Entry) cutSlots(data []byte, perm []int32) ([]byte, []int32) {
	be := binary.BigEndian
	order := slices.Clone(perm)
	slices.SortStableFunc(order, func(a, b int32) int {
		switch x, y := e.slots[a].Handle, e.slots[b].Handle; {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return 0
	})
	kind, per := KindAppend, slotBytes
	if e.rehome {
		kind, per = KindRehome, slotBytes+8
	}
	data = append(data, byte(kind), 0, 0, 0)
	data = be.AppendUint32(data, uint32(4+len(order)*per))
	data = be.AppendUint32(data, uint32(len(order)))
	for to, from := range order {
		perm[from] = int32(to)
		data = e.slots[from].append(data)
	}
	if e.rehome {
		for _, from := range order {
			data = be.AppendUint64(data, uint64(e.bases[from]))
		}
	}
	return data, perm
}

// Reset empties the entry and keeps its memory.
func (e *Entry) Reset() {
	e.slots, e.bases, e.other = e.slots[:0], e.bases[:0], e.other[:0]
	e.rehome, e.count = false, 0
}
