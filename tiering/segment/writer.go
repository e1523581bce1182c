package segment

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sort"
	"sync"

	"github.com/estran/estran/tiering/record"
)

const (
	magic        = "ESTRNSEG"
	endMagic     = "ESTRNEND"
	version      = 1
	headerBytes  = 16
	blockEntry   = 40
	footerHead   = 65
	footerRun    = 100
	trailerBytes = 32
	// blockMin is the least size of an index block but for a run's last.
	blockMin = 64 << 10
	// maxObject bounds what a reader believes.
	maxObject = 8 << 30
)

// Batch is a batch to be sealed: its header with final base offset and leader epoch, and its size in bytes, header included.
type Batch struct {
	Header [record.HeaderBytes]byte
	Size   int32
}

func (b *Batch) view() record.Batch { return record.Batch(b.Header[:]) }

// crc is that of the whole batch, without seeing its body: a batch's own CRC covers all but its first bytes.
func (b *Batch) crc() uint32 {
	return record.CombineCRC(record.CRC(b.Header[:record.CRCStart]), b.view().CRC(), int64(b.Size)-record.CRCStart)
}

// RunInput is a run to be sealed.
type RunInput struct {
	TP        record.TopicPartition
	Batches   []Batch
	Epochs    []EpochStart
	Producers []ProducerState
	Aborted   []Aborted
}

// Source gives the bodies of the batches: the bytes behind the header of batch number `batch` of run number `run`.
type Source interface {
	ReadBody(run, batch int, p []byte) error
}

// Meta is what the footer says about the object as a whole.
type Meta struct {
	Cluster [16]byte
	Shard   record.ShardID
	Number  Number
	Term    uint64
	UUID    UUID
	Class   Class
	Written record.Timestamp
}

// Built is an object ready to be uploaded: its layout is fixed, its bodies are read when it is.
type Built struct {
	Size      int64
	CRC32C    uint32
	FooterLen uint32
	Runs      []PartitionRun

	runs   []RunInput
	flat   []flatBatch
	tail   []byte // everything behind the runs
	tailAt int64
	src    Source

	mu   sync.Mutex
	last int // batch that buf holds; -1 = none
	buf  []byte
}

type flatBatch struct {
	at         int64
	run, batch int
}

// Build lays out an object. It needs headers only; bodies are read from src when the object is.
func Build(m Meta, runs []RunInput, src Source) (*Built, error) {
	b := &Built{runs: runs, src: src, last: -1}
	head := make([]byte, headerBytes)
	copy(head, magic)
	binary.BigEndian.PutUint32(head[8:], version)
	crc, at := record.CRC(head), int64(headerBytes)
	var indexes, details [][]byte
	for i := range runs {
		r := &runs[i]
		if err := checkRun(r); err != nil {
			return nil, err
		}
		pr := PartitionRun{TP: r.TP, Run: Run{Object: m.Number, Position: at, StartOffset: r.Batches[0].view().BaseOffset(),
			EndOffset: r.Batches[len(r.Batches)-1].view().LastOffset(), MaxTimestamp: -1, Aborted: uint32(len(r.Aborted))}}
		index, runCRC, size := indexOf(r, at, &pr.MaxTimestamp)
		for j := range r.Batches {
			b.flat = append(b.flat, flatBatch{at, i, j})
			at += int64(r.Batches[j].Size)
		}
		pr.SizeBytes, pr.IndexBytes = size, uint32(len(index))
		crc = record.CombineCRC(crc, runCRC, size)
		b.Runs = append(b.Runs, pr)
		indexes, details = append(indexes, index), append(details, detailsOf(r))
	}
	b.tailAt = at
	b.tail = b.tailOf(m, indexes, details)
	b.Size = at + int64(len(b.tail))
	b.CRC32C = record.UpdateCRC(crc, b.tail)
	for i := range b.Runs { // positions of the indexes count from the end, known only now
		b.Runs[i].IndexAt = uint32(b.Size - int64(b.Runs[i].IndexAt) - b.tailAt)
	}
	return b, nil
}

func checkRun(r *RunInput) error {
	if len(r.Batches) == 0 {
		return fmt.Errorf("segment: empty run of %s", r.TP)
	}
	next := r.Batches[0].view().BaseOffset()
	for i := range r.Batches {
		v := r.Batches[i].view()
		if v.BaseOffset() < next || v.Size() != int(r.Batches[i].Size) {
			return fmt.Errorf("segment: batch %d of %s: base offset %d where %d is due, size %d of %d", i, r.TP, v.BaseOffset(), next, v.Size(), r.Batches[i].Size)
		}
		next = v.LastOffset() + 1
	}
	return nil
}

// indexOf makes a run's index and returns the CRC of the run's bytes and their number.
func indexOf(r *RunInput, at int64, maxTS *record.Timestamp) (index []byte, runCRC uint32, size int64) {
	be := binary.BigEndian
	var blockCRC uint32
	var blockLen int64
	first, blockTS := r.Batches[0].view().BaseOffset(), record.Timestamp(-1)
	for i := range r.Batches {
		b := &r.Batches[i]
		v := b.view()
		if blockLen == 0 {
			first, blockTS = v.BaseOffset(), -1
		}
		blockCRC = record.CombineCRC(blockCRC, b.crc(), int64(b.Size))
		blockLen += int64(b.Size)
		blockTS = max(blockTS, v.MaxTimestamp())
		if blockLen < blockMin && i < len(r.Batches)-1 {
			continue
		}
		index = be.AppendUint64(index, uint64(first))
		index = be.AppendUint64(index, uint64(v.LastOffset()))
		index = be.AppendUint64(index, uint64(blockTS))
		index = be.AppendUint64(index, uint64(at+size))
		index = be.AppendUint32(index, uint32(blockLen))
		index = be.AppendUint32(index, blockCRC)
		runCRC = record.CombineCRC(runCRC, blockCRC, blockLen)
		size += blockLen
		*maxTS = max(*maxTS, blockTS)
		blockCRC, blockLen = 0, 0
	}
	return be.AppendUint32(index, record.CRC(index)), runCRC, size
}

func detailsOf(r *RunInput) []byte {
	be := binary.BigEndian
	b := be.AppendUint32(nil, uint32(len(r.Epochs)))
	for _, e := range r.Epochs {
		b = be.AppendUint32(b, uint32(e.Epoch))
		b = be.AppendUint64(b, uint64(e.Start))
	}
	b = be.AppendUint32(b, uint32(len(r.Producers)))
	for _, p := range r.Producers {
		b = be.AppendUint64(b, uint64(p.ID))
		b = be.AppendUint16(b, uint16(p.Epoch))
		b = be.AppendUint32(b, uint32(p.LastSequence))
		b = be.AppendUint64(b, uint64(p.LastOffset))
		b = be.AppendUint64(b, uint64(p.Timestamp))
	}
	b = be.AppendUint32(b, uint32(len(r.Aborted)))
	for _, a := range r.Aborted {
		b = be.AppendUint64(b, uint64(a.Producer))
		b = be.AppendUint64(b, uint64(a.First))
		b = be.AppendUint64(b, uint64(a.Last))
		b = be.AppendUint64(b, uint64(a.LastStableOffset))
	}
	return be.AppendUint32(b, record.CRC(b))
}

// tailOf makes indexes, details, footer and trailer; it leaves each index's position relative to the tail in Run.IndexAt.
func (b *Built) tailOf(m Meta, indexes, details [][]byte) []byte {
	be := binary.BigEndian
	var tail []byte
	detailAt := make([]int64, len(details))
	for i, x := range indexes {
		b.Runs[i].IndexAt = uint32(len(tail))
		tail = append(tail, x...)
	}
	for i, d := range details {
		detailAt[i] = b.tailAt + int64(len(tail))
		tail = append(tail, d...)
	}
	footerAt := len(tail)
	tail = append(tail, m.Cluster[:]...)
	tail = be.AppendUint32(tail, uint32(m.Shard))
	tail = be.AppendUint64(tail, uint64(m.Number))
	tail = be.AppendUint64(tail, m.Term)
	tail = append(tail, m.UUID[:]...)
	tail = append(tail, byte(m.Class))
	tail = be.AppendUint64(tail, uint64(m.Written))
	tail = be.AppendUint32(tail, uint32(len(b.Runs)))
	for i, r := range b.Runs {
		tail = append(tail, r.TP.Topic[:]...)
		tail = be.AppendUint32(tail, uint32(r.TP.Partition))
		tail = be.AppendUint64(tail, uint64(r.StartOffset))
		tail = be.AppendUint64(tail, uint64(r.EndOffset))
		tail = be.AppendUint64(tail, uint64(r.Position))
		tail = be.AppendUint64(tail, uint64(r.SizeBytes))
		tail = be.AppendUint64(tail, uint64(b.tailAt)+uint64(r.IndexAt))
		tail = be.AppendUint32(tail, r.IndexBytes)
		tail = be.AppendUint64(tail, uint64(detailAt[i]))
		tail = be.AppendUint32(tail, uint32(len(details[i])))
		tail = be.AppendUint64(tail, uint64(r.MaxTimestamp))
		records := int64(0)
		for j := range b.runs[i].Batches {
			records += int64(b.runs[i].Batches[j].view().Count())
		}
		tail = be.AppendUint64(tail, uint64(records))
		tail = be.AppendUint32(tail, r.Aborted)
		tail = be.AppendUint32(tail, 0)
	}
	footer := tail[footerAt:]
	footerLen, footerCRC := len(footer), record.CRC(footer)
	t := len(tail)
	tail = be.AppendUint64(tail, uint64(b.tailAt)+uint64(footerAt))
	tail = be.AppendUint32(tail, uint32(footerLen))
	tail = be.AppendUint32(tail, footerCRC)
	tail = be.AppendUint32(tail, version)
	tail = be.AppendUint32(tail, record.CRC(tail[t:]))
	tail = append(tail, endMagic...)
	b.FooterLen = uint32(footerLen + trailerBytes)
	return tail
}

// ErrBody: a batch read back for sealing does not match its checksum. The object must not be committed.
var ErrBody = errors.New("segment: batch body does not match its checksum")

// BodyError names the batch that could not be sealed.
type BodyError struct {
	TP     record.TopicPartition
	Offset record.Offset
	Err    error
}

// Error names partition and offset.
func (e *BodyError) Error() string {
	return fmt.Sprintf("batch at offset %d of %s: %v", e.Offset, e.TP, e.Err)
}

// Unwrap returns the cause.
func (e *BodyError) Unwrap() error { return e.Err }

// ReadAt implements io.ReaderAt over the whole object. Every batch is checked against its CRC before any of it is given out. It holds
// one batch at a time; reading forward is cheap, and it may begin again at any position.
func (b *Built) ReadAt(p []byte, off int64) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for n < len(p) {
		at := off + int64(n)
		switch {
		case at >= b.Size:
			return n, io.EOF
		case at >= b.tailAt:
			n += copy(p[n:], b.tail[at-b.tailAt:])
		case at < headerBytes:
			head := make([]byte, headerBytes)
			copy(head, magic)
			binary.BigEndian.PutUint32(head[8:], version)
			n += copy(p[n:], head[at:])
		default:
			i := sort.Search(len(b.flat), func(i int) bool { return b.flat[i].at > at }) - 1
			if err := b.load(i); err != nil {
				return n, err
			}
			n += copy(p[n:], b.buf[at-b.flat[i].at:])
		}
	}
	return n, nil
}

func (b *Built) load(i int) error {
	if b.last == i {
		return nil
	}
	f := b.flat[i]
	r := &b.runs[f.run]
	in := &r.Batches[f.batch]
	if cap(b.buf) < int(in.Size) {
		b.buf = make([]byte, in.Size)
	}
	b.buf, b.last = b.buf[:in.Size], -1
	copy(b.buf, in.Header[:])
	err := b.src.ReadBody(f.run, f.batch, b.buf[record.HeaderBytes:])
	if err == nil && record.Batch(b.buf).CheckCRC() != nil {
		err = ErrBody
	}
	if err != nil {
		return &BodyError{r.TP, in.view().BaseOffset(), err}
	}
	b.last = i
	return nil
}
