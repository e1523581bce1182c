package segment

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/tiering/record"
)

// FooterRun is a run as the footer describes it.
type FooterRun struct {
	PartitionRun
	Records      int64
	IndexPos     int64
	DetailsPos   int64
	DetailsBytes uint32
}

// Footer is what the end of an object says.
type Footer struct {
	Meta
	Runs []FooterRun
}

// Details are the per-run parts that a later leader or a reader of transactions needs.
type Details struct {
	Epochs    []EpochStart
	Producers []ProducerState
	Aborted   []Aborted
}

// Block is an index entry: whole batches that one checksum covers.
type Block struct {
	First, Last  record.Offset // inclusive
	MaxTimestamp record.Timestamp
	Position     int64
	Length       uint32
	CRC          uint32
}

// Check compares the block's bytes with its checksum.
func (b *Block) Check(data []byte) error {
	if !planted.On(planted.CRCSkipped) && (uint32(len(data)) != b.Length || record.CRC(data) != b.CRC) {
		return fmt.Errorf("%w: block of offsets %d to %d at %d", ErrCorrupt, b.First, b.Last, b.Position)
	}
	return nil
}

// ParseFooter reads the footer from the last bytes of an object of size bytes. If tail is too short for the footer, need says how many
// bytes from the end are wanted and err is nil.
func ParseFooter(tail []byte, size int64) (f Footer, need int64, err error) {
	be := binary.BigEndian
	if len(tail) < trailerBytes || int64(len(tail)) > size {
		if size < headerBytes+trailerBytes {
			return f, 0, fmt.Errorf("%w: object of %d bytes", ErrCorrupt, size)
		}
		return f, min(size, 64<<10), nil
	}
	t := tail[len(tail)-trailerBytes:]
	if string(t[24:]) != endMagic {
		return f, 0, fmt.Errorf("%w: no trailer", ErrCorrupt)
	}
	if be.Uint32(t[20:]) != record.CRC(t[:20]) {
		return f, 0, fmt.Errorf("%w: trailer", ErrCorrupt)
	}
	if v := be.Uint32(t[16:]); v != version {
		return f, 0, fmt.Errorf("%w: %d, this program knows %d", ErrVersion, v, version)
	}
	pos, n := int64(be.Uint64(t)), int64(be.Uint32(t[8:]))
	if size > maxObject || n < footerHead || pos < headerBytes || pos+n+trailerBytes != size {
		return f, 0, fmt.Errorf("%w: footer of %d bytes at %d in an object of %d", ErrCorrupt, n, pos, size)
	}
	if int64(len(tail)) < n+trailerBytes {
		return f, n + trailerBytes, nil
	}
	b := tail[int64(len(tail))-trailerBytes-n : len(tail)-trailerBytes]
	if record.CRC(b) != be.Uint32(t[12:]) {
		return f, 0, fmt.Errorf("%w: footer", ErrCorrupt)
	}
	return decodeFooter(b, size)
}

func decodeFooter(b []byte, size int64) (f Footer, need int64, err error) {
	be := binary.BigEndian
	copy(f.Cluster[:], b)
	f.Shard, f.Number, f.Term = record.ShardID(be.Uint32(b[16:])), Number(be.Uint64(b[20:])), be.Uint64(b[28:])
	copy(f.UUID[:], b[36:])
	f.Class, f.Written = Class(b[52]), record.Timestamp(be.Uint64(b[53:]))
	n := int(be.Uint32(b[61:]))
	if len(b) != footerHead+n*footerRun || !f.Class.Valid() {
		return f, 0, fmt.Errorf("%w: footer of %d bytes with %d runs", ErrCorrupt, len(b), n)
	}
	f.Runs = make([]FooterRun, n)
	for i := range f.Runs {
		e := b[footerHead+i*footerRun:]
		r := &f.Runs[i]
		copy(r.TP.Topic[:], e)
		r.TP.Partition = int32(be.Uint32(e[16:]))
		r.Object = f.Number
		r.StartOffset, r.EndOffset = record.Offset(be.Uint64(e[20:])), record.Offset(be.Uint64(e[28:]))
		r.Position, r.SizeBytes = int64(be.Uint64(e[36:])), int64(be.Uint64(e[44:]))
		r.IndexPos, r.IndexBytes = int64(be.Uint64(e[52:])), be.Uint32(e[60:])
		r.DetailsPos, r.DetailsBytes = int64(be.Uint64(e[64:])), be.Uint32(e[72:])
		r.MaxTimestamp, r.Records, r.Run.Aborted = record.Timestamp(be.Uint64(e[76:])), int64(be.Uint64(e[84:])), be.Uint32(e[92:])
		r.IndexAt = uint32(size - r.IndexPos)
		inside := func(pos, n int64) bool { return pos >= headerBytes && n >= 0 && pos <= size && n <= size-pos }
		if !inside(r.Position, r.SizeBytes) || !inside(r.IndexPos, int64(r.IndexBytes)) || !inside(r.DetailsPos, int64(r.DetailsBytes)) || r.EndOffset < r.StartOffset {
			return f, 0, fmt.Errorf("%w: run %d of the footer", ErrCorrupt, i)
		}
	}
	return f, 0, nil
}

// ParseIndex decodes a run's index and checks it.
func ParseIndex(b []byte) ([]Block, error) {
	be := binary.BigEndian
	if len(b) < 4 || (len(b)-4)%blockEntry != 0 || record.CRC(b[:len(b)-4]) != be.Uint32(b[len(b)-4:]) {
		return nil, fmt.Errorf("%w: index of %d bytes", ErrCorrupt, len(b))
	}
	out := make([]Block, (len(b)-4)/blockEntry)
	for i := range out {
		e := b[i*blockEntry:]
		out[i] = Block{First: record.Offset(be.Uint64(e)), Last: record.Offset(be.Uint64(e[8:])), MaxTimestamp: record.Timestamp(be.Uint64(e[16:])),
			Position: int64(be.Uint64(e[24:])), Length: be.Uint32(e[32:]), CRC: be.Uint32(e[36:])}
	}
	return out, nil
}

// ParseDetails decodes a run's details and checks them.
func ParseDetails(b []byte) (d Details, err error) {
	be := binary.BigEndian
	if len(b) < 16 || record.CRC(b[:len(b)-4]) != be.Uint32(b[len(b)-4:]) {
		return d, fmt.Errorf("%w: details of %d bytes", ErrCorrupt, len(b))
	}
	b = b[:len(b)-4]
	next := func(size int) (n int) {
		if err != nil || len(b) < 4 {
			err = fmt.Errorf("%w: details end early", ErrCorrupt)
			return 0
		}
		n, b = int(be.Uint32(b)), b[4:]
		if n < 0 || n > len(b)/size {
			err = fmt.Errorf("%w: %d details in %d bytes", ErrCorrupt, n, len(b))
			return 0
		}
		return n
	}
	d.Epochs = make([]EpochStart, next(12))
	for i := range d.Epochs {
		d.Epochs[i] = EpochStart{record.LeaderEpoch(be.Uint32(b)), record.Offset(be.Uint64(b[4:]))}
		b = b[12:]
	}
	d.Producers = make([]ProducerState, next(30))
	for i := range d.Producers {
		d.Producers[i] = ProducerState{record.ProducerID(be.Uint64(b)), record.ProducerEpoch(be.Uint16(b[8:])), record.Sequence(be.Uint32(b[10:])),
			record.Offset(be.Uint64(b[14:])), record.Timestamp(be.Uint64(b[22:]))}
		b = b[30:]
	}
	d.Aborted = make([]Aborted, next(32))
	for i := range d.Aborted {
		d.Aborted[i] = Aborted{record.ProducerID(be.Uint64(b)), record.Offset(be.Uint64(b[8:])), record.Offset(be.Uint64(b[16:])), record.Offset(be.Uint64(b[24:]))}
		b = b[32:]
	}
	if err == nil && len(b) != 0 {
		err = fmt.Errorf("%w: %d bytes behind the details", ErrCorrupt, len(b))
	}
	return d, err
}

// OpenFooter reads the footer of a whole object.
func OpenFooter(r io.ReaderAt, size int64) (Footer, error) {
	for need := min(size, 64<<10); ; {
		tail := make([]byte, need)
		if _, err := r.ReadAt(tail, size-need); err != nil && err != io.EOF {
			return Footer{}, fmt.Errorf("segment: reading the footer: %w", err)
		}
		f, more, err := ParseFooter(tail, size)
		if err != nil || more == 0 {
			return f, err
		}
		if more <= need {
			return f, fmt.Errorf("%w: footer", ErrCorrupt)
		}
		need = more
	}
}

// ReadIndex reads and checks a run's index.
func ReadIndex(r io.ReaderAt, run *FooterRun) ([]Block, error) {
	b := make([]byte, run.IndexBytes)
	if _, err := r.ReadAt(b, run.IndexPos); err != nil && err != io.EOF {
		return nil, fmt.Errorf("segment: reading an index: %w", err)
	}
	return ParseIndex(b)
}

// ReadDetails reads and checks a run's details.
func ReadDetails(r io.ReaderAt, run *FooterRun) (Details, error) {
	b := make([]byte, run.DetailsBytes)
	if _, err := r.ReadAt(b, run.DetailsPos); err != nil && err != io.EOF {
		return Details{}, fmt.Errorf("segment: reading details: %w", err)
	}
	return ParseDetails(b)
}

// EachBatch reads a run block by block, checks every block and batch, and calls f for each batch.
func EachBatch(r io.ReaderAt, run *FooterRun, f func(record.Batch) error) error {
	blocks, err := ReadIndex(r, run)
	if err != nil {
		return err
	}
	next := run.StartOffset
	for i := range blocks {
		b := &blocks[i]
		if b.Position < run.Position || int64(b.Length) > run.SizeBytes-(b.Position-run.Position) {
			return fmt.Errorf("%w: block outside its run", ErrCorrupt)
		}
		data := make([]byte, b.Length)
		if _, err := r.ReadAt(data, b.Position); err != nil && err != io.EOF {
			return fmt.Errorf("segment: reading a block: %w", err)
		}
		if err := b.Check(data); err != nil {
			return err
		}
		for len(data) > 0 {
			batch, rest, err := record.Next(data)
			if err == nil {
				err = batch.CheckCRC()
			}
			if err != nil {
				return fmt.Errorf("%w: %v", ErrCorrupt, err)
			}
			if batch.BaseOffset() < next {
				return fmt.Errorf("%w: batch at %d where %d is due", ErrCorrupt, batch.BaseOffset(), next)
			}
			if err := f(batch); err != nil {
				return err
			}
			next, data = batch.LastOffset()+1, rest
		}
	}
	if next != run.EndOffset+1 {
		return fmt.Errorf("%w: run ends at %d, its entry says %d", ErrCorrupt, next-1, run.EndOffset)
	}
	return nil
}

// CheckHeader checks the first bytes of an object.
func CheckHeader(b []byte) error {
	if len(b) < headerBytes || string(b[:8]) != magic {
		return fmt.Errorf("%w: no header", ErrCorrupt)
	}
	if v := binary.BigEndian.Uint32(b[8:]); v != version {
		return fmt.Errorf("%w: %d, this program knows %d", ErrVersion, v, version)
	}
	if binary.BigEndian.Uint32(b[12:]) != 0 {
		return fmt.Errorf("%w: header", ErrCorrupt)
	}
	return nil
}
