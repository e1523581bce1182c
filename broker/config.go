// Package broker speaks the Kafka protocol: connections, one file per API key, groups. It decodes and checks requests and gives them to what stands
// below through small interfaces; it owns no record and no state that must survive.
//
// The invariant: an answer says only what the layers below have said, in the order of the requests of its connection.
package broker

import (
	"context"
	"log/slog"
	"time"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
)

// Appender takes every partition of a produce request. It has copied all bytes when it returns, and calls done once, which must not block.
type Appender interface {
	Append(ctx context.Context, r raftmeta.AppendRequest, done func([]raftmeta.AppendResult))
}

// Reader reads a partition as one log.
type Reader interface {
	Read(ctx context.Context, tp record.TopicPartition, from record.Offset, l tiering.Limits) (tiering.Result, error)
	OffsetForTimestamp(ctx context.Context, tp record.TopicPartition, ts record.Timestamp, upTo record.Offset) (record.Offset, record.Timestamp, bool, error)
	MaxTimestamp(ctx context.Context, tp record.TopicPartition, upTo record.Offset) (record.Offset, record.Timestamp, bool, error)
}

// Cluster is what a broker sees of the cluster.
type Cluster interface {
	Cluster() *state.Cluster
	NodeID() int32
	Down(node int32) bool
	Leader(record.ShardID) (node int32, ok bool)
	// AwaitLeader returns when Leader knows one, or ctx ends.
	AwaitLeader(context.Context, record.ShardID)
	Partition(record.TopicPartition) (state.PartitionInfo, error)
	EpochEnd(record.TopicPartition, record.LeaderEpoch) (record.LeaderEpoch, record.Offset, error)
	Watch(tps []record.TopicPartition, wake func()) (stop func())
	Prove(context.Context, record.ShardID) error
	// Current returns when this node's Cluster has all that any node has acknowledged before the call.
	Current(context.Context) error
	// Replicas are the nodes that have a shard; Voters is how many nodes the quorum has.
	Replicas(record.ShardID) raftmeta.Replicas
	Voters() int
}

// Admin changes the cluster.
type Admin interface {
	CreateTopics(context.Context, []raftmeta.TopicSpec) []raftmeta.Created
	DeleteTopics(context.Context, []record.TopicID) []error
	CreatePartitions(ctx context.Context, id record.TopicID, total int32) error
	AlterConfigs(ctx context.Context, topic record.TopicID, set map[string]string, del []string, parsed state.PartitionConfig) error
	DeleteRecords(ctx context.Context, tp record.TopicPartition, before record.Offset) (record.Offset, error)
	AllocateProducerID(context.Context) (record.ProducerID, error)
}

// Groups is the durable state of consumer groups.
type Groups interface {
	GroupShard(group string) record.ShardID
	Group(group string) *state.Group
	Groups(record.ShardID) []*state.Group
	ProposeGroup(s record.ShardID, cmds []state.Command, done func(error))
}

// Backend is everything that a Server works on.
type Backend interface {
	Appender
	Cluster
	Admin
	Groups
}

// Config are a broker's settings. Zero values take the defaults named, Kafka's own unless a comment says otherwise.
type Config struct {
	Logger     *slog.Logger
	Registerer prometheus.Registerer

	NumPartitions       int32         // num.partitions: 1 in Kafka, 3 here
	AutoCreateTopics    bool          // auto.create.topics.enable
	RetentionMs         int64         // log.retention.ms: 7 days
	RetentionBytes      int64         // log.retention.bytes: -1
	MaxMessageBytes     int32         // message.max.bytes: 1048588
	CompressionType     string        // compression.type: producer
	TimestampType       string        // log.message.timestamp.type: CreateTime
	TimestampBeforeMs   int64         // log.message.timestamp.before.max.ms: no limit
	TimestampAfterMs    int64         // log.message.timestamp.after.max.ms: 1 h
	RetentionCheckMs    int64         // log.retention.check.interval.ms: 30 s; it concerns who deletes, and is told here
	OffsetsRetention    time.Duration // offsets.retention.minutes: 7 days
	OffsetMetadataMax   int           // offset.metadata.max.bytes: 4096
	GroupInitialDelay   time.Duration // group.initial.rebalance.delay.ms: 3 s
	GroupMinSession     time.Duration // group.min.session.timeout.ms: 6 s
	GroupMaxSession     time.Duration // group.max.session.timeout.ms: 30 min
	GroupMaxSize        int           // group.max.size: no limit
	RequestMaxBytes     int32         // socket.request.max.bytes: 100 MiB
	MaxConnections      int           // max.connections: 20000 here
	MaxConnectionsPerIP int           // max.connections.per.ip: no limit

	// FrameBudget bounds request bytes in memory (64 MiB); ResponseBudget bytes of answers that are being sent (64 MiB).
	FrameBudget, ResponseBudget int64
	// IdleTimeout closes a connection without requests (10 min: connections.max.idle.ms); HeaderTimeout one whose request does not come in; WriteTimeout one
	// that does not read. FetchWait is the longest that a fetch waits for records, whatever its max_wait is (10 s): nobody reads from the connection meanwhile, so that its end is
	// not seen.
	IdleTimeout, HeaderTimeout, WriteTimeout, FetchWait time.Duration
	// Now is the wall clock.
	Now func() time.Time
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), NumPartitions: 3, RetentionMs: 604_800_000, RetentionBytes: -1,
		MaxMessageBytes: 1_048_588, CompressionType: "producer", TimestampType: "CreateTime", TimestampBeforeMs: 1<<63 - 1, TimestampAfterMs: 3_600_000,
		RetentionCheckMs: 30_000, OffsetsRetention: 7 * 24 * time.Hour, OffsetMetadataMax: 4096, GroupInitialDelay: 3 * time.Second, GroupMinSession: 6 * time.Second,
		GroupMaxSession: 30 * time.Minute, GroupMaxSize: 1<<31 - 1, RequestMaxBytes: 100 << 20, MaxConnections: 20_000, MaxConnectionsPerIP: 1<<31 - 1,
		FrameBudget: 64 << 20, ResponseBudget: 64 << 20, IdleTimeout: 10 * time.Minute, HeaderTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second, FetchWait: 10 * time.Second,
		Now: time.Now}
}
