package raftmeta

import (
	"context"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// What a follower refuses: whatever changes something is the voters' to do.

// Append refuses every batch: nothing is appended.
func (f *Follower) Append(_ context.Context, r AppendRequest, done func([]AppendResult)) {
	out := make([]AppendResult, len(r.Batches))
	for i := range out {
		out[i] = AppendResult{Err: ErrNotLeader, Base: -1, LogStart: -1}
	}
	done(out)
}

// CreateTopics creates nothing.
func (f *Follower) CreateTopics(_ context.Context, specs []TopicSpec) []Created {
	out := make([]Created, len(specs))
	for i := range out {
		out[i].Err = ErrNotLeader
	}
	return out
}

// DeleteTopics deletes nothing.
func (f *Follower) DeleteTopics(_ context.Context, ids []record.TopicID) []error {
	out := make([]error, len(ids))
	for i := range out {
		out[i] = ErrNotLeader
	}
	return out
}

// CreatePartitions creates nothing.
func (f *Follower) CreatePartitions(context.Context, record.TopicID, int32) error {
	return ErrNotLeader
}

// AlterConfigs changes nothing.
func (f *Follower) AlterConfigs(context.Context, record.TopicID, map[string]string, []string, state.PartitionConfig) error {
	return ErrNotLeader
}

// DeleteRecords deletes nothing.
func (f *Follower) DeleteRecords(context.Context, record.TopicPartition, record.Offset) (record.Offset, error) {
	return -1, ErrNotLeader
}

// AllocateProducerID gives none.
func (f *Follower) AllocateProducerID(context.Context) (record.ProducerID, error) {
	return -1, ErrNotLeader
}

// ProposeGroup proposes nothing.
func (f *Follower) ProposeGroup(_ record.ShardID, _ []state.Command, done func(error)) {
	done(ErrNotLeader)
}

// Group returns a group's durable state, which must not be changed; nil if there is none.
func (f *Follower) Group(group string) *state.Group {
	m := f.shardByID(f.GroupShard(group))
	if m == nil {
		return nil
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.shard.Group(group)
}

// Groups returns the groups of a shard, by ID.
func (f *Follower) Groups(s record.ShardID) (out []*state.Group) {
	m := f.shardByID(s)
	if m == nil {
		return nil
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	for x := range m.shard.Groups() {
		out = append(out, x)
	}
	return out
}
