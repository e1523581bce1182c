package record

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// HeaderBytes is the length of a batch's header, up to and including the record count.
const HeaderBytes = 61

// Positions in the header, as in Kafka's DefaultRecordBatch. The CRC covers everything from attributesAt on, so base offset and
// leader epoch can be patched without touching it.
const (
	baseOffsetAt    = 0
	lengthAt        = 8
	leaderEpochAt   = 12
	magicAt         = 16
	crcAt           = 17
	attributesAt    = 21
	lastDeltaAt     = 23
	baseTimestampAt = 27
	maxTimestampAt  = 35
	producerIDAt    = 43
	producerEpochAt = 51
	baseSequenceAt  = 53
	countAt         = 57
	// CRCStart is where the bytes that a batch's CRC covers begin.
	CRCStart = attributesAt
	// lengthOverhead is what the length field does not count.
	lengthOverhead = 12
)

// Bits of the attributes.
const (
	codecMask         = 0x07
	logAppendTimeBit  = 0x08
	transactionalBit  = 0x10
	controlBit        = 0x20
	deleteHorizonBit  = 0x40
	attributesInUse   = codecMask | logAppendTimeBit | transactionalBit | controlBit | deleteHorizonBit
	magicV2           = 2
	minRecordBytes    = 7
	noTimestamp       = Timestamp(-1)
	noProducer        = ProducerID(-1)
	maxVarintBytes    = 10
	recordHeaderLimit = 1 << 20
)

// Why a batch is refused. Every error of this package wraps one of them.
var (
	// ErrTruncated: there are fewer bytes than the batch says it has.
	ErrTruncated = errors.New("truncated batch")
	// ErrMagic: the batch has an older (0, 1) or unknown format.
	ErrMagic = errors.New("unsupported magic")
	// ErrCRC: the bytes do not match the batch's checksum.
	ErrCRC = errors.New("CRC mismatch")
	// ErrInvalid: the batch contradicts itself.
	ErrInvalid = errors.New("invalid batch")
	// ErrControl: a client sent a control batch.
	ErrControl = errors.New("control batch from a client")
	// ErrTooLarge: the batch or what it decompresses to is above the limit.
	ErrTooLarge = errors.New("batch too large")
	// ErrCodec: the compression codec is unknown.
	ErrCodec = errors.New("unknown compression codec")
	// ErrNullKey: a record without a key in a compacted topic.
	ErrNullKey = errors.New("record without key in a compacted topic")
)

// Batch is one v2 record batch (KIP-98), viewed in place. Its accessors must be used only after Next or Parse accepted it.
type Batch []byte

// Next splits the first batch off buf. It checks only that the length is sound and the bytes are there.
func Next(buf []byte) (b Batch, rest []byte, err error) {
	if len(buf) < HeaderBytes {
		return nil, buf, fmt.Errorf("%w: %d bytes, a header has %d", ErrTruncated, len(buf), HeaderBytes)
	}
	n := int64(int32(binary.BigEndian.Uint32(buf[lengthAt:]))) + lengthOverhead
	if n < HeaderBytes {
		return nil, buf, fmt.Errorf("%w: length field says %d bytes, a header has %d", ErrInvalid, n, HeaderBytes)
	}
	if n > int64(len(buf)) {
		return nil, buf, fmt.Errorf("%w: %d of %d bytes", ErrTruncated, len(buf), n)
	}
	return Batch(buf[:n:n]), buf[n:], nil
}

// BaseOffset is the offset of the first record.
func (b Batch) BaseOffset() Offset { return Offset(binary.BigEndian.Uint64(b[baseOffsetAt:])) }

// LastOffset is the offset of the last record, inclusive.
func (b Batch) LastOffset() Offset { return b.BaseOffset() + Offset(b.LastOffsetDelta()) }

// Size is the batch's length in bytes, header included, as its length field says.
func (b Batch) Size() int { return int(int32(binary.BigEndian.Uint32(b[lengthAt:]))) + lengthOverhead }

// LeaderEpoch is the partition leader epoch that the broker wrote.
func (b Batch) LeaderEpoch() LeaderEpoch {
	return LeaderEpoch(binary.BigEndian.Uint32(b[leaderEpochAt:]))
}

// Magic is the format version: 2.
func (b Batch) Magic() int8 { return int8(b[magicAt]) }

// CRC is the stored CRC32C of everything from CRCStart on.
func (b Batch) CRC() uint32 { return binary.BigEndian.Uint32(b[crcAt:]) }

// Attributes are the raw attribute bits.
func (b Batch) Attributes() int16 { return int16(binary.BigEndian.Uint16(b[attributesAt:])) }

// Codec is the compression of the records.
func (b Batch) Codec() Codec { return Codec(b.Attributes() & codecMask) }

// IsTransactional reports whether the batch belongs to a transaction.
func (b Batch) IsTransactional() bool { return b.Attributes()&transactionalBit != 0 }

// IsControl reports whether the batch is a broker's marker.
func (b Batch) IsControl() bool { return b.Attributes()&controlBit != 0 }

// HasLogAppendTime reports whether the timestamps are the broker's.
func (b Batch) HasLogAppendTime() bool { return b.Attributes()&logAppendTimeBit != 0 }

// LastOffsetDelta is the last record's offset minus the base offset.
func (b Batch) LastOffsetDelta() int32 { return int32(binary.BigEndian.Uint32(b[lastDeltaAt:])) }

// BaseTimestamp is the timestamp that record deltas count from.
func (b Batch) BaseTimestamp() Timestamp {
	return Timestamp(binary.BigEndian.Uint64(b[baseTimestampAt:]))
}

// MaxTimestamp is the largest timestamp of the batch.
func (b Batch) MaxTimestamp() Timestamp {
	return Timestamp(binary.BigEndian.Uint64(b[maxTimestampAt:]))
}

// ProducerID is -1 without idempotence.
func (b Batch) ProducerID() ProducerID { return ProducerID(binary.BigEndian.Uint64(b[producerIDAt:])) }

// ProducerEpoch is -1 without idempotence.
func (b Batch) ProducerEpoch() ProducerEpoch {
	return ProducerEpoch(binary.BigEndian.Uint16(b[producerEpochAt:]))
}

// BaseSequence is the sequence of the first record; -1 without idempotence.
func (b Batch) BaseSequence() Sequence { return Sequence(binary.BigEndian.Uint32(b[baseSequenceAt:])) }

// Count is the number of records.
func (b Batch) Count() int32 { return int32(binary.BigEndian.Uint32(b[countAt:])) }

// Records are the bytes behind the header: compressed if Codec says so.
func (b Batch) Records() []byte { return b[HeaderBytes:] }

// PatchHeader writes base offset and leader epoch into a header of at least 16 bytes; the CRC stays valid.
func PatchHeader(h []byte, base Offset, epoch LeaderEpoch) {
	binary.BigEndian.PutUint64(h[baseOffsetAt:], uint64(base))
	binary.BigEndian.PutUint32(h[leaderEpochAt:], uint32(epoch))
}

// SetLogAppendTime makes now the timestamp of every record, as message.timestamp.type=LogAppendTime asks, and renews the CRC.
func (b Batch) SetLogAppendTime(now Timestamp) {
	binary.BigEndian.PutUint16(b[attributesAt:], uint16(b.Attributes())|logAppendTimeBit)
	binary.BigEndian.PutUint64(b[maxTimestampAt:], uint64(now))
	b.SealCRC()
}

// SealCRC computes and stores the CRC.
func (b Batch) SealCRC() { binary.BigEndian.PutUint32(b[crcAt:], CRC(b[CRCStart:])) }

// CheckCRC compares the stored CRC with the bytes.
func (b Batch) CheckCRC() error {
	if got := CRC(b[CRCStart:]); got != b.CRC() {
		return fmt.Errorf("%w: header says %08x, bytes have %08x", ErrCRC, b.CRC(), got)
	}
	return nil
}

// CheckHeader checks what the header alone can prove; strict also refuses what only a broker may write.
func (b Batch) CheckHeader(fromClient bool) error {
	switch {
	case b.Magic() != magicV2:
		return fmt.Errorf("%w: %d", ErrMagic, b.Magic())
	case b.Attributes()&^attributesInUse != 0:
		return fmt.Errorf("%w: unknown attribute bits %#x", ErrInvalid, b.Attributes())
	case b.Codec() > CodecZstd:
		return fmt.Errorf("%w: %d", ErrCodec, b.Codec())
	case b.LastOffsetDelta() < 0:
		return fmt.Errorf("%w: last offset delta %d", ErrInvalid, b.LastOffsetDelta())
	case b.Count() < 0:
		return fmt.Errorf("%w: %d records", ErrInvalid, b.Count())
	}
	if !fromClient {
		return nil
	}
	switch {
	case b.IsControl():
		return ErrControl
	case b.Attributes()&deleteHorizonBit != 0:
		return fmt.Errorf("%w: delete horizon set by a client", ErrInvalid)
	case b.Count() == 0:
		return fmt.Errorf("%w: no records", ErrInvalid)
	case b.LastOffsetDelta() != b.Count()-1:
		return fmt.Errorf("%w: last offset delta %d with %d records", ErrInvalid, b.LastOffsetDelta(), b.Count())
	case b.ProducerID() < noProducer:
		return fmt.Errorf("%w: producer ID %d", ErrInvalid, b.ProducerID())
	case b.ProducerID() != noProducer && (b.BaseSequence() < 0 || b.ProducerEpoch() < 0):
		return fmt.Errorf("%w: producer %d with epoch %d and sequence %d", ErrInvalid, b.ProducerID(), b.ProducerEpoch(), b.BaseSequence())
	case b.IsTransactional() && b.ProducerID() == noProducer:
		return fmt.Errorf("%w: transactional batch without producer ID", ErrInvalid)
	case b.Codec() == CodecNone && int64(b.Count())*minRecordBytes > int64(len(b)-HeaderBytes):
		return fmt.Errorf("%w: %d records in %d bytes", ErrInvalid, b.Count(), len(b)-HeaderBytes)
	}
	return nil
}
