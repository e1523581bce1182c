package record

import "encoding/binary"

// Builder makes one batch from records: for tools, tests and load.
type Builder struct {
	Codec         Codec
	ProducerID    ProducerID // use NoProducer for none
	ProducerEpoch ProducerEpoch
	BaseSequence  Sequence
	Transactional bool
	Control       bool

	records []byte
	count   int32
	base    Timestamp
	maxTime Timestamp
}

// NoProducer marks a batch without idempotence.
const NoProducer = noProducer

// NewBuilder returns a builder of batches without a producer.
func NewBuilder(c Codec) *Builder {
	return &Builder{Codec: c, ProducerID: noProducer, ProducerEpoch: -1, BaseSequence: -1}
}

// Add appends a record; its offset delta is the number of records before it.
func (w *Builder) Add(ts Timestamp, key, value []byte, headers ...Header) {
	if w.count == 0 {
		w.base, w.maxTime = ts, ts
	}
	w.maxTime = max(w.maxTime, ts)
	var r []byte
	r = append(r, 0)
	r = binary.AppendVarint(r, int64(ts-w.base))
	r = binary.AppendVarint(r, int64(w.count))
	r = appendField(r, key)
	r = appendField(r, value)
	r = binary.AppendVarint(r, int64(len(headers)))
	for _, h := range headers {
		r = appendField(r, []byte(h.Key))
		r = appendField(r, h.Value)
	}
	w.records = binary.AppendVarint(w.records, int64(len(r)))
	w.records = append(w.records, r...)
	w.count++
}

func appendField(b, v []byte) []byte {
	if v == nil {
		return binary.AppendVarint(b, -1)
	}
	return append(binary.AppendVarint(b, int64(len(v))), v...)
}

// Batch returns the batch and empties the builder; the fields that were set stay.
func (w *Builder) Batch() (Batch, error) {
	body, err := Compress(w.Codec, w.records)
	if err != nil {
		return nil, err
	}
	b := make(Batch, HeaderBytes, HeaderBytes+len(body))
	b = append(b, body...)
	attrs := uint16(w.Codec)
	if w.Transactional {
		attrs |= transactionalBit
	}
	if w.Control {
		attrs |= controlBit
	}
	be := binary.BigEndian
	be.PutUint32(b[lengthAt:], uint32(len(b)-lengthOverhead))
	PatchHeader(b, 0, -1)
	b[magicAt] = magicV2
	be.PutUint16(b[attributesAt:], attrs)
	be.PutUint32(b[lastDeltaAt:], uint32(w.count-1))
	be.PutUint64(b[baseTimestampAt:], uint64(w.base))
	be.PutUint64(b[maxTimestampAt:], uint64(w.maxTime))
	be.PutUint64(b[producerIDAt:], uint64(w.ProducerID))
	be.PutUint16(b[producerEpochAt:], uint16(w.ProducerEpoch))
	be.PutUint32(b[baseSequenceAt:], uint32(w.BaseSequence))
	be.PutUint32(b[countAt:], uint32(w.count))
	b.SealCRC()
	w.records, w.count = nil, 0
	return b, nil
}
