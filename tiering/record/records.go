package record

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Limits bound what Validate accepts.
type Limits struct {
	// BatchBytes is the largest batch as sent, header included; 0 = no limit.
	BatchBytes int
	// RecordsBytes is the most that the records may decompress to; 0 = DefaultRecordsBytes.
	RecordsBytes int64
	// Walk decompresses and checks every record; without it only header and CRC are checked.
	Walk bool
	// NeedKeys refuses records without a key (compacted topics). It implies Walk.
	NeedKeys bool
}

// DefaultRecordsBytes bounds decompression where Limits says nothing.
const DefaultRecordsBytes = 256 << 20

// RecordError is a fault of one record of a batch.
type RecordError struct {
	Index int32 // of the record in the batch
	Err   error
}

// Error names the record.
func (e *RecordError) Error() string { return fmt.Sprintf("record %d: %v", e.Index, e.Err) }

// Unwrap returns the cause.
func (e *RecordError) Unwrap() error { return e.Err }

// Validate checks a batch that a client sent, in the order in which Kafka does: size, magic, CRC, header, records. b must have
// come from Next.
func Validate(b Batch, l Limits) error {
	if l.BatchBytes > 0 && len(b) > l.BatchBytes {
		return fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, len(b), l.BatchBytes)
	}
	if b.Magic() != magicV2 {
		return fmt.Errorf("%w: %d", ErrMagic, b.Magic())
	}
	if err := b.CheckCRC(); err != nil {
		return err
	}
	if err := b.CheckHeader(true); err != nil {
		return err
	}
	if !l.Walk && !l.NeedKeys {
		return nil
	}
	if b.Codec() == CodecNone {
		return walkPlain(b, l)
	}
	return walk(b, l)
}

// walkPlain is walk for uncompressed batches: it checks the same in place, without a reader in between.
func walkPlain(b Batch, l Limits) error {
	in := []byte(b.Records())
	for i := int32(0); i < b.Count(); i++ {
		size, n := binary.Varint(in)
		if n <= 0 || size < 0 || size > int64(len(in)-n) {
			return &RecordError{i, fmt.Errorf("%w: record of %d bytes with %d left", ErrInvalid, size, len(in))}
		}
		delta, key, ok := checkPlain(in[n : n+int(size)])
		switch {
		case !ok:
			return &RecordError{i, fmt.Errorf("%w: malformed record", ErrInvalid)}
		case delta != int64(i):
			return &RecordError{i, fmt.Errorf("%w: offset delta %d", ErrInvalid, delta)}
		case l.NeedKeys && !key:
			return &RecordError{i, ErrNullKey}
		}
		in = in[n+int(size):]
	}
	if len(in) > 0 {
		return fmt.Errorf("%w: %d bytes behind the last record", ErrInvalid, len(in))
	}
	return nil
}

// checkPlain walks one record's bytes; it returns its offset delta and whether it has a key.
func checkPlain(r []byte) (delta int64, key, ok bool) {
	if len(r) < 1 {
		return 0, false, false
	}
	r = r[1:] // attributes, unused
	var n int
	if _, n = binary.Varint(r); n <= 0 {
		return 0, false, false
	}
	r = r[n:]
	if delta, n = binary.Varint(r); n <= 0 {
		return 0, false, false
	}
	r = r[n:]
	if r, key, ok = skipField(r, true); !ok {
		return 0, false, false
	}
	if r, _, ok = skipField(r, true); !ok {
		return 0, false, false
	}
	headers, n := binary.Varint(r)
	if n <= 0 || headers < 0 || headers*2 > int64(len(r)) {
		return 0, false, false
	}
	r = r[n:]
	for range headers {
		if r, _, ok = skipField(r, false); !ok {
			return 0, false, false
		}
		if r, _, ok = skipField(r, true); !ok {
			return 0, false, false
		}
	}
	return delta, key, len(r) == 0
}

func skipField(r []byte, nullable bool) (rest []byte, present, ok bool) {
	size, n := binary.Varint(r)
	if n <= 0 || size > int64(len(r)-n) || size < -1 || size == -1 && !nullable {
		return nil, false, false
	}
	if size < 0 {
		return r[n:], false, true
	}
	return r[n+int(size):], true, true
}

// walk checks every record without keeping any.
func walk(b Batch, l Limits) error {
	it, err := newIterator(b, l.RecordsBytes)
	if err != nil {
		return err
	}
	defer it.Close()
	var r Record
	for i := int32(0); i < b.Count(); i++ {
		if err := it.skip(&r); err != nil {
			return &RecordError{i, err}
		}
		if r.OffsetDelta != i {
			return &RecordError{i, fmt.Errorf("%w: offset delta %d", ErrInvalid, r.OffsetDelta)}
		}
		if l.NeedKeys && r.Key == nil {
			return &RecordError{i, ErrNullKey}
		}
	}
	return it.end()
}

// Header is one header of a record.
type Header struct {
	Key   string
	Value []byte // nil is Kafka's null
}

// Record is one record of a batch. Key and Value are nil where Kafka has null.
type Record struct {
	OffsetDelta int32
	Timestamp   Timestamp
	Key, Value  []byte
	Headers     []Header
}

// iterator reads the records of a batch as a stream, so that a small batch which decompresses to gigabytes costs no memory.
type iterator struct {
	b     Batch
	dec   *decompressor
	in    *bufio.Reader
	left  int64 // bytes that the batch may still decompress to
	count int32
}

var bufferPool = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 16<<10) }}

func newIterator(b Batch, limit int64) (*iterator, error) {
	dec, err := newDecompressor(b.Codec(), b.Records())
	if err != nil {
		return nil, err
	}
	if limit <= 0 {
		limit = DefaultRecordsBytes
	}
	in := bufferPool.Get().(*bufio.Reader)
	in.Reset(dec)
	return &iterator{b: b, dec: dec, in: in, left: limit}, nil
}

// Close gives the decoder back.
func (it *iterator) Close() {
	it.in.Reset(nil)
	bufferPool.Put(it.in)
	it.dec.Close()
}

func (it *iterator) use(n int64) error {
	if it.left -= n; it.left < 0 {
		return fmt.Errorf("%w: the records decompress to more than allowed", ErrTooLarge)
	}
	return nil
}

func (it *iterator) fault(what string, err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: records end in %s", ErrInvalid, what)
	}
	return fmt.Errorf("%w: %s: %v", ErrInvalid, what, err)
}

func (it *iterator) varint(what string) (int64, int64, error) {
	var u uint64
	for n := int64(1); n <= maxVarintBytes; n++ {
		c, err := it.in.ReadByte()
		if err != nil {
			return 0, n, it.fault(what, err)
		}
		u |= uint64(c&0x7f) << (7 * (n - 1))
		if c < 0x80 {
			return int64(u>>1) ^ -int64(u&1), n, nil
		}
	}
	return 0, 0, fmt.Errorf("%w: %s is not a varint", ErrInvalid, what)
}

// field reads or skips a length-prefixed field of a record with `left` bytes; it returns what is left. null is nil, empty is not.
func (it *iterator) field(what string, left int64, keep bool) (v []byte, null bool, rest int64, err error) {
	n, used, err := it.varint(what)
	if err != nil {
		return nil, false, 0, err
	}
	left -= used
	if n < -1 || n > left {
		return nil, false, 0, fmt.Errorf("%w: %s of %d bytes in a record with %d left", ErrInvalid, what, n, left)
	}
	if n < 0 {
		return nil, true, left, nil
	}
	if keep {
		v = make([]byte, n)
		if _, err = io.ReadFull(it.in, v); err != nil {
			return nil, false, 0, it.fault(what, err)
		}
	} else if err = it.discard(n); err != nil {
		return nil, false, 0, it.fault(what, err)
	}
	return v, false, left - n, nil
}

func (it *iterator) discard(n int64) error {
	for n > 0 {
		k, err := it.in.Discard(int(min(n, 1<<20)))
		n -= int64(k)
		if err != nil {
			return err
		}
	}
	return nil
}

// present stands for a key that was skipped: not nil.
var present = []byte{}

// skip reads a record's frame and checks it without keeping key, value or headers.
func (it *iterator) skip(r *Record) error { return it.read(r, false) }

func (it *iterator) read(r *Record, keep bool) error {
	size, used, err := it.varint("length")
	if err != nil {
		return err
	}
	if size < 0 {
		return fmt.Errorf("%w: record of %d bytes", ErrInvalid, size)
	}
	if err := it.use(size + used); err != nil {
		return err
	}
	if keep && it.b.Codec() == CodecNone && size > int64(len(it.b)) {
		return fmt.Errorf("%w: record of %d bytes in a batch of %d", ErrInvalid, size, len(it.b))
	}
	if _, err := it.in.ReadByte(); err != nil { // attributes, unused
		return it.fault("attributes", err)
	}
	left := size - 1
	tsDelta, n1, err := it.varint("timestamp delta")
	if err != nil {
		return err
	}
	offDelta, n2, err := it.varint("offset delta")
	if err != nil {
		return err
	}
	left -= n1 + n2
	r.OffsetDelta, r.Timestamp = int32(offDelta), it.b.BaseTimestamp()+Timestamp(tsDelta)
	if int64(r.OffsetDelta) != offDelta {
		return fmt.Errorf("%w: offset delta %d", ErrInvalid, offDelta)
	}
	if it.b.HasLogAppendTime() {
		r.Timestamp = it.b.MaxTimestamp()
	}
	var null bool
	if r.Key, null, left, err = it.field("key", left, keep); err != nil {
		return err
	} else if !null && !keep {
		r.Key = present
	}
	if r.Value, _, left, err = it.field("value", left, keep); err != nil {
		return err
	}
	if left, err = it.headers(r, left, keep); err != nil {
		return err
	}
	if left != 0 {
		return fmt.Errorf("%w: record length is off by %d bytes", ErrInvalid, left)
	}
	it.count++
	return nil
}

func (it *iterator) headers(r *Record, left int64, keep bool) (int64, error) {
	n, used, err := it.varint("header count")
	if err != nil {
		return 0, err
	}
	left -= used
	if n < 0 || n*2 > left {
		return 0, fmt.Errorf("%w: %d headers in %d bytes", ErrInvalid, n, left)
	}
	r.Headers = r.Headers[:0]
	for range n {
		k, null, rest, err := it.field("header key", left, keep)
		if err != nil {
			return 0, err
		}
		if null {
			return 0, fmt.Errorf("%w: header without key", ErrInvalid)
		}
		v, _, rest, err := it.field("header value", rest, keep)
		if err != nil {
			return 0, err
		}
		left = rest
		if keep {
			r.Headers = append(r.Headers, Header{string(k), v})
		}
	}
	return left, nil
}

// end checks that nothing follows the last record.
func (it *iterator) end() error {
	if it.count != it.b.Count() {
		return fmt.Errorf("%w: %d records, the header says %d", ErrInvalid, it.count, it.b.Count())
	}
	switch _, err := it.in.ReadByte(); {
	case err == nil:
		return fmt.Errorf("%w: bytes behind the last record", ErrInvalid)
	case errors.Is(err, io.EOF):
		return nil
	default:
		return it.fault("end", err)
	}
}

// Each calls f for every record of b with its offset until f returns false. The record is valid only during the call. limit bounds
// what the batch may decompress to; 0 = DefaultRecordsBytes.
func Each(b Batch, limit int64, f func(Offset, *Record) bool) error {
	it, err := newIterator(b, limit)
	if err != nil {
		return err
	}
	defer it.Close()
	var r Record
	for i := int32(0); i < b.Count(); i++ {
		if err := it.read(&r, true); err != nil {
			return &RecordError{i, err}
		}
		if !f(b.BaseOffset()+Offset(r.OffsetDelta), &r) {
			return nil
		}
	}
	return nil
}

// FirstAtOrAfter returns the first record of b from offset `from` on whose timestamp is at least ts; ok is false if none is.
func FirstAtOrAfter(b Batch, ts Timestamp, from Offset) (off Offset, at Timestamp, ok bool, err error) {
	if b.MaxTimestamp() < ts {
		return 0, 0, false, nil
	}
	err = eachTime(b, func(o Offset, t Timestamp) bool {
		if t >= ts && o >= from {
			off, at, ok = o, t, true
		}
		return !ok
	})
	return off, at, ok, err
}

// MaxRecord returns the first record of b from offset `from` on with the largest timestamp of these.
func MaxRecord(b Batch, from Offset) (off Offset, at Timestamp, err error) {
	at = noTimestamp
	err = eachTime(b, func(o Offset, t Timestamp) bool {
		if t > at && o >= from {
			off, at = o, t
		}
		return true
	})
	return off, at, err
}

func eachTime(b Batch, f func(Offset, Timestamp) bool) error {
	it, err := newIterator(b, 0)
	if err != nil {
		return err
	}
	defer it.Close()
	var r Record
	for i := int32(0); i < b.Count(); i++ {
		if err := it.skip(&r); err != nil {
			return &RecordError{i, err}
		}
		if !f(b.BaseOffset()+Offset(r.OffsetDelta), r.Timestamp) {
			return nil
		}
	}
	return nil
}

// Recompress returns b with its records compressed by c instead; offsets, timestamps and producer fields stay.
func Recompress(b Batch, c Codec, limit int64) (Batch, error) {
	it, err := newIterator(b, limit)
	if err != nil {
		return nil, err
	}
	defer it.Close()
	plain, err := io.ReadAll(io.LimitReader(it.in, it.left+1))
	if err != nil {
		return nil, it.fault("records", err)
	}
	if int64(len(plain)) > it.left {
		return nil, fmt.Errorf("%w: the records decompress to more than %d bytes", ErrTooLarge, it.left)
	}
	body, err := Compress(c, plain)
	if err != nil {
		return nil, err
	}
	out := make(Batch, HeaderBytes, HeaderBytes+len(body))
	copy(out, b[:HeaderBytes])
	out = append(out, body...)
	binary.BigEndian.PutUint32(out[lengthAt:], uint32(len(out)-lengthOverhead))
	binary.BigEndian.PutUint16(out[attributesAt:], uint16(b.Attributes())&^codecMask|uint16(c))
	out.SealCRC()
	return out, nil
}
