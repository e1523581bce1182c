// Package segment is the format of a sealed object: runs of record batches with an index, written once and never changed. It owns the
// bytes (FORMAT.md) and the keys; it knows no bucket, no file and no cluster.
//
// The invariant: every byte of an object is covered by a checksum, and a reader with only the object can rebuild its manifest entries.
package segment

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/estran/estran/tiering/record"
)

// Errors of reading.
var (
	// ErrCorrupt: the bytes are not what was written.
	ErrCorrupt = errors.New("segment: corrupt")
	// ErrVersion: a newer program wrote the object.
	ErrVersion = errors.New("segment: unknown version")
	// ErrKey: not the key of a sealed object.
	ErrKey = errors.New("segment: not an object key")
)

// Number identifies an object in its shard's object table; never reused.
type Number uint64

// UUID is drawn by whoever prepares an upload; every attempt has its own.
type UUID [16]byte

// String returns 32 hex digits.
func (u UUID) String() string { return hex.EncodeToString(u[:]) }

// MarshalText implements encoding.TextMarshaler with the form of String.
func (u UUID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, u[:]), nil }

// UnmarshalText is the inverse of MarshalText.
func (u *UUID) UnmarshalText(b []byte) error {
	if len(b) != 2*len(u) {
		return fmt.Errorf("UUID of %d characters", len(b))
	}
	_, err := hex.Decode(u[:], b)
	return err
}

// Class is a retention class: the prefix under which an object's key stands, so that one lifecycle rule covers all objects of a class.
type Class uint8

// classDays are the classes with an end; class 0 is keep.
var classDays = [...]int{0, 1, 3, 7, 14, 30, 60, 90, 180, 365}

// ClassKeep holds what no rule may delete.
const ClassKeep Class = 0

const dayMs = 24 * 60 * 60 * 1000

// ClassForRetention returns the class for a topic's retention.ms (-1 = unlimited): the first that is not shorter. Compacted topics and
// those beyond the longest class are kept.
func ClassForRetention(retentionMs int64, compact bool) Class {
	if compact || retentionMs < 0 {
		return ClassKeep
	}
	for c := 1; c < len(classDays); c++ {
		if retentionMs <= int64(classDays[c])*dayMs {
			return Class(c)
		}
	}
	return ClassKeep
}

// Valid reports whether c is a class of this version.
func (c Class) Valid() bool { return int(c) < len(classDays) }

// Days returns the age in days after which the class's records are expired; 0 for ClassKeep.
func (c Class) Days() int { return classDays[c] }

// String returns the key component: ttl-007d or keep.
func (c Class) String() string {
	switch {
	case c == ClassKeep:
		return "keep"
	case !c.Valid():
		return fmt.Sprintf("class(%d)", uint8(c))
	}
	return fmt.Sprintf("ttl-%03dd", classDays[c])
}

func parseClass(s string) (Class, bool) {
	for c := range Class(len(classDays)) {
		if c.String() == s {
			return c, true
		}
	}
	return 0, false
}

// Owner says what an object is for: one partition alone, or many (Shared).
type Owner struct {
	Shared      bool
	TP          record.TopicPartition
	First, Last record.Offset // of the partition's records in the object, both inclusive
}

// Plan is what is decided before an upload.
type Plan struct {
	Class Class
	Owner Owner
	UUID  UUID
}

// ObjectState is a step of an object's life; it only goes up.
type ObjectState uint8

// The steps, Kafka's RemoteLogSegmentState in brackets.
const (
	Prepared   ObjectState = 1 // an upload may be under way [COPY_SEGMENT_STARTED]
	Committed  ObjectState = 2 // runs refer to it [COPY_SEGMENT_FINISHED]
	Tombstoned ObjectState = 3 // nothing refers to it; deleted after the grace [DELETE_SEGMENT_STARTED]
)

// Object is an entry of the object table.
type Object struct {
	Shard     record.ShardID
	Number    Number
	Plan      Plan
	Term      uint64 // of the leader that prepared it
	State     ObjectState
	Size      int64
	CRC32C    uint32
	FooterLen uint32 // footer and trailer: the last bytes of the object
	// UploadedAt is the shard's time of the upload; 0 = no clock was trusted.
	UploadedAt record.Timestamp
	// Since is the shard's clock when the state was entered.
	Since record.Timestamp
	// ExpiresAt is when a Prepared object that was not committed may be deleted.
	ExpiresAt record.Timestamp
	LiveRuns  uint32
}

// Run is a partition's contiguous batches in one object: an entry of its manifest.
type Run struct {
	Object       Number
	StartOffset  record.Offset // trimming moves only this
	EndOffset    record.Offset // inclusive
	Position     int64         // of the first batch in the object
	SizeBytes    int64
	IndexAt      uint32 // position of the index, counted back from the object's end
	IndexBytes   uint32
	MaxTimestamp record.Timestamp
	Aborted      uint32 // aborted transactions whose markers are in the run
}

// PartitionRun is a run with the partition that it belongs to.
type PartitionRun struct {
	TP record.TopicPartition
	Run
}

// EpochStart is the first offset of a leader epoch.
type EpochStart struct {
	Epoch record.LeaderEpoch
	Start record.Offset
}

// ProducerState is what a later leader must know of a producer to go on from a run's end.
type ProducerState struct {
	ID           record.ProducerID
	Epoch        record.ProducerEpoch
	LastSequence record.Sequence
	LastOffset   record.Offset
	Timestamp    record.Timestamp
}

// Aborted is an aborted transaction (KIP-98), as a fetch with read_committed lists it.
type Aborted struct {
	Producer         record.ProducerID
	First, Last      record.Offset
	LastStableOffset record.Offset
}

// Key returns the object's key below <root>/<cluster id>/.
func (o *Object) Key() string {
	var b [20]byte
	p := o.Plan
	if p.Owner.Shared {
		binary.BigEndian.PutUint64(b[:], uint64(o.Number))
		return fmt.Sprintf("v1/data/%s/%02x/shared/%d/%020d-%020d-%s.seg", p.Class, byte(record.CRC(b[:8])), o.Shard, o.Number, o.Term, p.UUID)
	}
	tp := p.Owner.TP
	copy(b[:], tp.Topic[:])
	binary.BigEndian.PutUint32(b[16:], uint32(tp.Partition))
	return fmt.Sprintf("v1/data/%s/%02x/%s/%d/%020d-%020d-%020d-%s.seg", p.Class, byte(record.CRC(b[:])), tp.Topic, tp.Partition,
		p.Owner.First, p.Owner.Last, o.Term, p.UUID)
}

// ParseKey reads back what a key says: class, owner, UUID, term, and number and shard of a shared object.
func ParseKey(key string) (Object, error) {
	bad := fmt.Errorf("%w: %q", ErrKey, key)
	parts := strings.Split(key, "/")
	if len(parts) != 7 || parts[0] != "v1" || parts[1] != "data" || !strings.HasSuffix(parts[6], ".seg") {
		return Object{}, bad
	}
	var o Object
	var ok bool
	if o.Plan.Class, ok = parseClass(parts[2]); !ok {
		return Object{}, bad
	}
	names := strings.Split(strings.TrimSuffix(parts[6], ".seg"), "-")
	nums := make([]uint64, 0, 3)
	for _, n := range names[:len(names)-1] {
		v, err := strconv.ParseUint(n, 10, 63)
		if err != nil || len(n) != 20 {
			return Object{}, bad
		}
		nums = append(nums, v)
	}
	if n, err := hex.Decode(o.Plan.UUID[:], []byte(names[len(names)-1][:min(32, len(names[len(names)-1]))])); err != nil || n != 16 {
		return Object{}, bad
	}
	part, err := strconv.ParseUint(parts[5], 10, 31)
	if err != nil {
		return Object{}, bad
	}
	switch {
	case parts[4] == "shared" && len(nums) == 2:
		o.Plan.Owner.Shared, o.Shard, o.Number, o.Term = true, record.ShardID(part), Number(nums[0]), nums[1]
	case len(nums) == 3 && len(parts[4]) == 32:
		own := &o.Plan.Owner
		if _, err := hex.Decode(own.TP.Topic[:], []byte(parts[4])); err != nil {
			return Object{}, bad
		}
		own.TP.Partition, own.First, own.Last, o.Term = int32(part), record.Offset(nums[0]), record.Offset(nums[1]), nums[2]
	default:
		return Object{}, bad
	}
	if o.Key() != key {
		return Object{}, bad
	}
	return o, nil
}
