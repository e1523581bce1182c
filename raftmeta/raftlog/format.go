package raftlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/hashicorp/raft"
)

// blockBytes is the unit that batches are aligned to.
const blockBytes = 4096

// formatVersion is the version of FORMAT.md.
const formatVersion = 1

const (
	fileMagic    = "ESTRNLOG"
	indexMagic   = "ESTRNIDX"
	recordMagic  = 0x52454331 // REC1
	fileHeader   = 36
	recordHeader = 76
	indexEntry   = 20
	trailerBytes = 48

	flagLast = 1
)

// Errors of opening and reading.
var (
	// ErrCorrupt: bytes that were durable once are not what was written.
	ErrCorrupt = errors.New("raftlog: corrupt")
	// ErrVersion: the files are of a newer version of the format.
	ErrVersion = errors.New("raftlog: unknown format version")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crcOf(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

func crcUpdate(crc uint32, b []byte) uint32 { return crc32.Update(crc, castagnoli, b) }

func alignUp(n int64) int64 { return (n + blockBytes - 1) &^ (blockBytes - 1) }

func encodeFileHeader(group uint32, gen uint64, size int64) []byte {
	h := make([]byte, blockBytes)
	copy(h, fileMagic)
	be := binary.BigEndian
	be.PutUint32(h[8:], formatVersion)
	be.PutUint32(h[12:], group)
	be.PutUint64(h[16:], gen)
	be.PutUint64(h[24:], uint64(size))
	be.PutUint32(h[32:], crcOf(h[:32]))
	return h
}

// errNoHeader: the file was being made when the process died.
var errNoHeader = errors.New("no file header")

func decodeFileHeader(h []byte, group uint32) (gen uint64, size int64, err error) {
	be := binary.BigEndian
	if string(h[:8]) != fileMagic {
		return 0, 0, errNoHeader
	}
	if be.Uint32(h[32:]) != crcOf(h[:32]) {
		return 0, 0, errNoHeader
	}
	if v := be.Uint32(h[8:]); v != formatVersion {
		return 0, 0, fmt.Errorf("%w: log file of version %d, this program knows %d", ErrVersion, v, formatVersion)
	}
	if g := be.Uint32(h[12:]); g != group {
		return 0, 0, fmt.Errorf("%w: log file of group %d in the directory of group %d", ErrCorrupt, g, group)
	}
	if n := be.Uint64(h[24:]); n < 2*blockBytes || n%blockBytes != 0 || n > 1<<32 { // positions have 32 bits
		return 0, 0, fmt.Errorf("%w: log file of %d bytes", ErrCorrupt, n)
	}
	return be.Uint64(h[16:]), int64(be.Uint64(h[24:])), nil
}

// recHeader is a decoded record header.
type recHeader struct {
	group           uint32
	gen, batch      uint64
	index, term     uint64
	typ, flags      uint8
	appended        int64
	dataLen, extLen uint32
	dataCRC, extCRC uint32
	start           uint32 // block of the file in which the batch begins
}

func (h *recHeader) size() int64 { return recordHeader + int64(h.dataLen) + int64(h.extLen) }

func (h *recHeader) encode(b []byte) {
	be := binary.BigEndian
	be.PutUint32(b[0:], recordMagic)
	be.PutUint32(b[4:], h.group)
	be.PutUint64(b[8:], h.gen)
	be.PutUint64(b[16:], h.batch)
	be.PutUint64(b[24:], h.index)
	be.PutUint64(b[32:], h.term)
	b[40], b[41], b[42], b[43] = h.typ, h.flags, 0, 0
	be.PutUint64(b[44:], uint64(h.appended))
	be.PutUint32(b[52:], h.dataLen)
	be.PutUint32(b[56:], h.extLen)
	be.PutUint32(b[60:], h.dataCRC)
	be.PutUint32(b[64:], h.extCRC)
	be.PutUint32(b[68:], h.start)
	be.PutUint32(b[72:], crcOf(b[:72]))
}

// decodeRecord reads a record header; ok is false if b does not begin with a valid one.
func decodeRecord(b []byte) (h recHeader, ok bool) {
	be := binary.BigEndian
	if len(b) < recordHeader || be.Uint32(b) != recordMagic || be.Uint32(b[72:]) != crcOf(b[:72]) {
		return h, false
	}
	return recHeader{group: be.Uint32(b[4:]), gen: be.Uint64(b[8:]), batch: be.Uint64(b[16:]), index: be.Uint64(b[24:]), term: be.Uint64(b[32:]),
		typ: b[40], flags: b[41], appended: int64(be.Uint64(b[44:])), dataLen: be.Uint32(b[52:]), extLen: be.Uint32(b[56:]),
		dataCRC: be.Uint32(b[60:]), extCRC: be.Uint32(b[64:]), start: be.Uint32(b[68:])}, true
}

func (h *recHeader) log(out *raft.Log, data []byte) {
	*out = raft.Log{Index: h.index, Term: h.term, Type: raft.LogType(h.typ), Data: data}
	if h.appended != 0 {
		out.AppendedAt = time.Unix(0, h.appended)
	}
}

// HeaderBytes is the length of the header that the Data of every command entry begins with.
const HeaderBytes = 28

// Place says where an entry's payload is.
type Place uint8

// Places of a payload.
const (
	PlaceNone   Place = 0
	PlaceInline Place = 1 // in the entry's Extensions
	PlaceObject Place = 2 // in an object of the bucket
)

// EntryHeader is the fixed header at the start of the Data of every LogCommand: all that this package knows of an entry.
type EntryHeader struct {
	// Term is the term in which the entry was proposed. An entry that is stored under another term is refused.
	Term       uint64
	Version    uint8
	Place      Place
	PayloadLen uint32
	PayloadCRC uint32
	// TimeMs is the proposer's time, 0 if it did not trust its clock.
	TimeMs uint64
}

// ParseEntryHeader decodes the header; ok is false if data is too short for one.
func ParseEntryHeader(data []byte) (h EntryHeader, ok bool) {
	if len(data) < HeaderBytes {
		return h, false
	}
	be := binary.BigEndian
	return EntryHeader{Term: be.Uint64(data), Version: data[8], Place: Place(data[9]), PayloadLen: be.Uint32(data[12:]),
		PayloadCRC: be.Uint32(data[16:]), TimeMs: be.Uint64(data[20:])}, true
}

// AppendEntryHeader encodes h at the end of b.
func AppendEntryHeader(b []byte, h EntryHeader) []byte {
	be := binary.BigEndian
	b = be.AppendUint64(b, h.Term)
	b = append(b, h.Version, byte(h.Place), 0, 0)
	b = be.AppendUint32(b, h.PayloadLen)
	b = be.AppendUint32(b, h.PayloadCRC)
	return be.AppendUint64(b, h.TimeMs)
}
