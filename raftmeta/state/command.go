package state

import (
	"encoding/json"
	"fmt"

	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// Command is a change of a state machine. Its fields are its format (JSON): they are added to, never given another meaning.
type Command interface{ kind() Kind }

// KindOf is a command's number.
func KindOf(c Command) Kind { return c.kind() }

// LeaderStart is a leader's first own proposal: only a term whose LeaderStart has been applied is advertised.
type LeaderStart struct {
	Term Term
	Node int32
}

// PartitionConfig is what a shard must know of a topic's configuration.
type PartitionConfig struct {
	RetentionMs    int64 // -1 = unlimited
	RetentionBytes int64 // -1 = unlimited
	Compact        bool
	Class          segment.Class
}

// Effect is a change that meta decided and a shard carries out. Exactly one field is set.
type Effect struct {
	EnsurePartition   *EnsurePartition   `json:",omitempty"`
	DropTopic         *DropTopic         `json:",omitempty"`
	SetConfig         *SetConfig         `json:",omitempty"`
	ReleaseSlots      *ReleaseSlots      `json:",omitempty"`
	RaiseFeatureLevel *RaiseFeatureLevel `json:",omitempty"`
}

// EnsurePartition creates a partition if it is not there.
type EnsurePartition struct {
	TP        record.TopicPartition
	EpochBase record.LeaderEpoch
	Config    PartitionConfig
}

// DropTopic drops the partitions of a topic and what groups committed for it. It goes to every shard.
type DropTopic struct{ Topic record.TopicID }

// SetConfig changes the configuration of all partitions of a topic.
type SetConfig struct {
	Topic  record.TopicID
	Config PartitionConfig
}

// MetaEffects carries the effects From..To (inclusive) of the outbox; it is accepted only if From follows the shard's cursor.
type MetaEffects struct {
	From, To uint64
	Effects  []Effect
}

// Prepare announces an upload. It is idempotent per UUID.
type Prepare struct {
	Plan segment.Plan
	Term Term
	// TTLMs after the shard's clock the object may be deleted if it was not committed.
	TTLMs int64
}

// Commit makes an uploaded object's runs part of the manifests. Each run is judged for itself.
type Commit struct {
	Number     segment.Number
	Size       int64
	CRC32C     uint32
	FooterLen  uint32
	UploadedAt record.Timestamp
	Runs       []segment.PartitionRun
}

// AdvanceLogStart raises a partition's log start; what lies below it is gone.
type AdvanceLogStart struct {
	TP record.TopicPartition
	To record.Offset
}

// Sweep expires what the shard's clock has passed: prepared objects, idle producers, offsets of empty groups.
type Sweep struct {
	ProducerMs int64 // producers idle longer than this are forgotten; 0 = none
	OffsetsMs  int64 // offsets of groups empty longer than this are dropped; 0 = none
}

// Forget removes deleted objects from the table.
type Forget struct{ Numbers []segment.Number }

// PutGroup stores a group's record; its content is the coordinator's.
type PutGroup struct {
	ID           string
	ProtocolType string
	Record       []byte
	Empty        bool
}

// OffsetCommit is one committed offset.
type OffsetCommit struct {
	TP       record.TopicPartition
	Offset   record.Offset
	Epoch    record.LeaderEpoch // -1 = unknown
	Metadata string
	At       record.Timestamp // commit time as the coordinator saw it
}

// CommitOffsets stores offsets of a group; an unknown group is created empty.
type CommitOffsets struct {
	Group   string
	Offsets []OffsetCommit
}

// DeleteGroup removes a group and its offsets.
type DeleteGroup struct{ ID string }

// DeleteOffsets removes some of a group's offsets.
type DeleteOffsets struct {
	Group string
	TPs   []record.TopicPartition
}

// InitCluster is meta's first command; repeated ones change nothing.
type InitCluster struct {
	ClusterID string
	Shards    uint32
	// Members are the first voters.
	Members []int32 `json:",omitempty"`
	// Level is the feature level that the cluster begins with: what the program of its founders writes.
	Level uint32 `json:",omitempty"`
}

// AlterMembers adds nodes to the members or removes them. Only a registered node is added, and one member always stays: else nothing is changed.
type AlterMembers struct {
	Add    []int32 `json:",omitempty"`
	Remove []int32 `json:",omitempty"`
}

// Drain says whether a member gives up leading and takes no group's leadership.
type Drain struct {
	Node int32
	On   bool
}

// PreferLeader names the member that should lead a group; Node 0 leaves it to the spreading.
type PreferLeader struct {
	Group record.ShardID
	Node  int32
}

// Recover makes Node the only member, after the majority was lost and Node's log was made the cluster's. It is done once per epoch.
type Recover struct {
	Epoch uint64
	Node  int32
}

// ForgetNode removes the registration of a node that is no member.
type ForgetNode struct{ Node int32 }

// AddShards makes new shards up to Total. Their first voters are Founders, server IDs: fixed for ever.
type AddShards struct {
	Total    uint32
	Founders []string
}

// RegisterNode stores a node's address.
type RegisterNode struct{ Node Node }

// Node is a node as it registered itself.
type Node struct {
	ID          int32
	Incarnation string
	Host        string
	Port        int32
	Rack        string
	Peer        string `json:",omitempty"` // where other nodes reach it
	// Left: it was removed from the members and has not registered since.
	Left bool `json:",omitempty"`
	// Level is the highest feature level that its program knows.
	Level uint32 `json:",omitempty"`
}

// CreateTopic creates a topic.
type CreateTopic struct {
	ID                record.TopicID
	Name              string
	Partitions        int32
	ReplicationFactor int16
	Configs           map[string]string
	Config            PartitionConfig
}

// DeleteTopic drops a topic.
type DeleteTopic struct{ ID record.TopicID }

// CreatePartitions grows a topic to Total partitions.
type CreatePartitions struct {
	ID    record.TopicID
	Total int32
}

// AlterConfigs changes a topic's configuration, or with a zero Topic the cluster's.
type AlterConfigs struct {
	Topic  record.TopicID
	Set    map[string]string
	Delete []string
	// Config is the topic's parsed configuration after the change.
	Config PartitionConfig
}

// AllocateProducerIDs reserves Count producer IDs.
type AllocateProducerIDs struct{ Count int64 }

// TrimOutbox removes the effects up to To, which the shard has applied.
type TrimOutbox struct {
	Shard record.ShardID
	To    uint64
}

func (LeaderStart) kind() Kind         { return KindLeaderStart }
func (MetaEffects) kind() Kind         { return KindMetaEffects }
func (Prepare) kind() Kind             { return KindPrepare }
func (Commit) kind() Kind              { return KindCommit }
func (AdvanceLogStart) kind() Kind     { return KindAdvanceLogStart }
func (Sweep) kind() Kind               { return KindSweep }
func (Forget) kind() Kind              { return KindForget }
func (PutGroup) kind() Kind            { return KindPutGroup }
func (CommitOffsets) kind() Kind       { return KindCommitOffsets }
func (DeleteGroup) kind() Kind         { return KindDeleteGroup }
func (DeleteOffsets) kind() Kind       { return KindDeleteOffsets }
func (InitCluster) kind() Kind         { return KindInitCluster }
func (RegisterNode) kind() Kind        { return KindRegisterNode }
func (AlterMembers) kind() Kind        { return KindAlterMembers }
func (Drain) kind() Kind               { return KindDrain }
func (PreferLeader) kind() Kind        { return KindPreferLeader }
func (ForgetNode) kind() Kind          { return KindForgetNode }
func (Recover) kind() Kind             { return KindRecover }
func (SettleSlots) kind() Kind         { return KindSettleSlots }
func (AddShards) kind() Kind           { return KindAddShards }
func (CreateTopic) kind() Kind         { return KindCreateTopic }
func (DeleteTopic) kind() Kind         { return KindDeleteTopic }
func (CreatePartitions) kind() Kind    { return KindCreateParts }
func (AlterConfigs) kind() Kind        { return KindAlterConfigs }
func (AllocateProducerIDs) kind() Kind { return KindAllocProducers }
func (TrimOutbox) kind() Kind          { return KindTrimOutbox }
func (RaiseFeatureLevel) kind() Kind   { return KindRaiseLevel }

// Code is the outcome of a command.
type Code uint8

// The outcomes.
const (
	OK Code = iota
	// Duplicate: the batch was appended before; the result has its original offset.
	Duplicate
	OutOfOrderSequence
	InvalidProducerEpoch
	UnknownPartition
	// Stale: the command came too late, or from a term that has ended.
	Stale
	NotFound
	Exists
	Invalid
	OffsetOutOfRange
	// Moved: the group's slot is another shard's.
	Moved
)

// Result is what a command that is not a batch returns. Value is the command's own result, if it has one.
type Result struct {
	Code  Code
	Value any
}

// AppendResult is the outcome of one batch.
type AppendResult struct {
	Code     Code
	Base     record.Offset
	LogStart record.Offset
}

// Verdict is the judgement on a run of a Commit.
type Verdict uint8

// The verdicts.
const (
	Rejected Verdict = iota
	Accepted
	Trimmed // accepted from a later first offset on
)

// decode reads a command's body. A command that this program wrote and cannot read would make replicas diverge.
func decode[C any](body []byte) C {
	var c C
	if err := json.Unmarshal(body, &c); err != nil {
		panic(fmt.Sprintf("state: command %T: %v", c, err))
	}
	return c
}
