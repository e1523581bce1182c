package record

import (
	"encoding/hex"
	"fmt"
	"strconv"
)

// The named integers keep Kafka offsets, raft indexes and byte positions apart: there is no arithmetic between them
// without a named method.
type (
	// Offset is the position of a record in a partition. A run's or batch's end is its last offset, inclusive, unless a
	// name says otherwise.
	Offset int64
	// LeaderEpoch counts leader changes of a partition. It never decreases.
	LeaderEpoch int32
	// Timestamp is in milliseconds since the Unix epoch; -1 means none.
	Timestamp int64
	// ProducerID identifies an idempotent producer; -1 means none.
	ProducerID int64
	// ProducerEpoch fences older instances of a producer; -1 means none.
	ProducerEpoch int16
	// Sequence numbers a producer's records in a partition; 2^31-1 is followed by 0. -1 means none.
	Sequence int32
	// ShardID numbers a Raft group of a cluster: 0 is meta, 1..S are the shards that hold partitions.
	ShardID uint32
)

// TopicID is Kafka's topic UUID (KIP-516). The zero value means none.
type TopicID [16]byte

// String returns the ID as 32 lower-case hex digits: object keys and logs use this form, never Kafka's base64.
func (t TopicID) String() string { return hex.EncodeToString(t[:]) }

// MarshalText implements encoding.TextMarshaler with the form of String.
func (t TopicID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, t[:]), nil }

// UnmarshalText is the inverse of MarshalText.
func (t *TopicID) UnmarshalText(b []byte) error {
	if len(b) != 2*len(t) {
		return fmt.Errorf("topic ID of %d characters", len(b))
	}
	_, err := hex.Decode(t[:], b)
	return err
}

// IsZero reports whether no topic is named.
func (t TopicID) IsZero() bool { return t == TopicID{} }

// TopicPartition identifies a partition by topic ID. Topic names exist only at the protocol's edge.
type TopicPartition struct {
	Topic     TopicID
	Partition int32
}

// String returns "<topic id>-<partition>".
func (tp TopicPartition) String() string {
	return tp.Topic.String() + "-" + strconv.Itoa(int(tp.Partition))
}

// Add returns the sequence n records after s; it wraps from 2^31-1 to 0 as Kafka's does.
func (s Sequence) Add(n int32) Sequence {
	return Sequence((int64(s) + int64(n)) & 0x7fffffff)
}
