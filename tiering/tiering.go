// Package tiering moves committed batches from the hot log into sealed objects and reads both as one log: sealer, reader, cache, retention
// and deletion. What it needs of the quorum it declares here (HotLog, Catalog); it knows no raft and no protocol.
//
// The invariants: nothing hot is given up before the object that holds it is committed; no object is deleted while a manifest refers to it,
// nor before its grace has passed; an offset is never skipped: what cannot be read is an error.
package tiering

import (
	"context"
	"errors"
	"time"

	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// Errors of reading.
var (
	// ErrUnknownPartition: this node has no such partition.
	ErrUnknownPartition = errors.New("tiering: unknown partition")
	// ErrOutOfRange: the offset lies below the log start or above the high watermark.
	ErrOutOfRange = errors.New("tiering: offset out of range")
	// ErrStorage: bytes that should be there cannot be read: the object is missing or corrupt, or the store does not answer.
	ErrStorage = errors.New("tiering: storage error")
	// ErrNotLocal: the offset is not in the hot log: go to the manifest.
	ErrNotLocal = errors.New("tiering: not in the hot log")
)

// Tier says where bytes came from.
type Tier uint8

// The tiers, fastest first.
const (
	TierMemory Tier = iota
	TierDisk
	TierObject
)

// String returns the label of estran_fetch_bytes_total.
func (t Tier) String() string { return [...]string{"memory", "disk", "object"}[t] }

// Limits bound one read.
type Limits struct {
	// MaxBytes: no batch is added that would pass it, except the first if AtLeastOne.
	MaxBytes   int
	AtLeastOne bool
	// UpTo is exclusive: the high watermark or the last stable offset. No batch that begins at or above it is returned.
	UpTo record.Offset
}

// Result is what was read: whole batches as they go to the socket. The first may begin before the offset that was asked for.
type Result struct {
	Buffers [][]byte
	Bytes   int
	// Next is the offset behind the last batch; the offset asked for if there is none.
	Next record.Offset
	Tier Tier // the slowest that was touched
	// Release gives the memory back: nil, or to be called once when the bytes are not needed any more.
	Release func()
}

// HotLog reads what has not been sealed, or was sealed a moment ago. Safe for concurrent use.
type HotLog interface {
	// ReadHot returns batches from the one that holds `from` on. ErrNotLocal: they are in the manifest only.
	ReadHot(ctx context.Context, tp record.TopicPartition, from record.Offset, l Limits) (Result, error)
}

// Bounds are a partition's offsets; SealedEnd, HighWatermark and LastStable are exclusive.
type Bounds struct{ LogStart, SealedEnd, HighWatermark, LastStable record.Offset }

// RunRef is a run with its object.
type RunRef struct {
	Run    segment.Run
	Object segment.Object
}

// HotRange is what one partition has to seal: all batches from Start up to its high watermark at the time.
type HotRange struct {
	TP         record.TopicPartition
	Start, End record.Offset // End inclusive
	Bytes      int64
	Class      segment.Class
	Oldest     record.Timestamp // shard clock when the oldest batch was appended
	Epochs     []segment.EpochStart
	Producers  []segment.ProducerState
}

// HotBatch is a batch to be sealed: its final header and where its bytes are.
type HotBatch struct {
	segment.Batch
	Index, Term uint64
	Pos         int64 // of the batch in the entry's payload
}

// PayloadSource reads bodies of hot batches. It is used by one goroutine at a time.
type PayloadSource interface {
	// ReadBody fills p with the bytes behind the batch's header.
	ReadBody(b *HotBatch, p []byte) error
	Close()
}

// PartitionStatus is what retention looks at.
type PartitionStatus struct {
	TP                          record.TopicPartition
	RetentionMs, RetentionBytes int64
	Compact                     bool
	Class                       segment.Class
	Bounds
	SealedBytes, HotBytes int64
	MaxTimestamp          record.Timestamp // largest record timestamp ever appended
}

// Verdict is the judgement on a run.
type Verdict uint8

// The verdicts.
const (
	Rejected Verdict = iota
	Accepted
	Trimmed
)

// View is the replicated state that reading looks at. Safe for concurrent use.
type View interface {
	Bounds(tp record.TopicPartition) (Bounds, bool)
	// ShardOf is the shard that a partition lives in.
	ShardOf(tp record.TopicPartition) (record.ShardID, bool)
	// Runs returns up to max runs from the one that holds `from`, or the first behind it.
	Runs(tp record.TopicPartition, from record.Offset, max int) []RunRef
	// HotRange is what a partition has that is not sealed; ok is false if it has nothing.
	HotRange(tp record.TopicPartition) (r HotRange, ok bool)
	// Batches lists the batches of a range from its Start on: whole batches up to about maxBytes, at least one.
	Batches(ctx context.Context, s record.ShardID, r HotRange, maxBytes int64) ([]HotBatch, error)
}

// Catalog is the replicated state that sealing and retention read and change. Changes return when they are committed. Safe for concurrent use.
type Catalog interface {
	View
	// Clock is the time that the shard goes by; trusted is false while nothing may expire by it.
	Clock(s record.ShardID) (now record.Timestamp, trusted bool)
	// Pinned is how much log the shard's hot batches keep from being freed, as written.
	Pinned(s record.ShardID) int64
	// HotBytes is how much a shard has that is not sealed.
	HotBytes(s record.ShardID) int64
	// WaitHot returns nil when HotBytes is at least `bytes` or the time has come.
	WaitHot(ctx context.Context, s record.ShardID, bytes int64, until time.Time) error
	// BeginRound takes a snapshot and then lists what is hot, by topic ID and partition.
	BeginRound(ctx context.Context, s record.ShardID) ([]HotRange, error)
	Payload(s record.ShardID) PayloadSource
	// Prepare is idempotent per UUID; Commit per object number.
	Prepare(ctx context.Context, s record.ShardID, p segment.Plan, ttl time.Duration) (segment.Object, error)
	Commit(ctx context.Context, o segment.Object, runs []segment.PartitionRun) ([]Verdict, error)
	// Rehome appends the same batches again, so that their old entries can be freed.
	Rehome(ctx context.Context, s record.ShardID, tp record.TopicPartition, batches []HotBatch) error
	// Repair does the same for what this node's copy has damaged, with the bytes of another; offset lies in the first batch that is.
	Repair(ctx context.Context, s record.ShardID, tp record.TopicPartition, offset record.Offset) error
	AdvanceLogStart(ctx context.Context, tp record.TopicPartition, to record.Offset) error
	Partitions(s record.ShardID) []PartitionStatus
	// Sweep expires what the shard's clock has passed.
	Sweep(ctx context.Context, s record.ShardID) error
	Doomed(s record.ShardID) []segment.Object
	Forget(ctx context.Context, s record.ShardID, numbers []segment.Number) error
	// ClusterUUID is the cluster's ID as it stands in footers.
	ClusterUUID() [16]byte
}
