package raftmeta

import (
	"context"
	"fmt"
	"sync"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// TopicSpec is a topic to be created. The configuration has been checked; Parsed is what shards must know of it.
type TopicSpec struct {
	Name              string
	Partitions        int32
	ReplicationFactor int16
	Configs           map[string]string
	Parsed            state.PartitionConfig
}

func code(c state.Code) error {
	switch c {
	case state.OK, state.Duplicate:
		return nil
	case state.Exists:
		return ErrTopicExists
	case state.NotFound:
		return ErrUnknownTopic
	case state.UnknownPartition:
		return ErrUnknownPartition
	case state.OffsetOutOfRange:
		return ErrOffsetOutOfRange
	case state.Moved:
		return ErrNotLeader
	case state.Stale:
		return fmt.Errorf("%w: stale", ErrInvalid)
	}
	return fmt.Errorf("%w: code %d", ErrInvalid, c)
}

// decide commits a command of meta and waits until the shards have applied what follows from it.
func (h *Host) decide(ctx context.Context, c state.Command) (state.Result, error) {
	d := h.decideAll(ctx, []state.Command{c})[0]
	return d.r, d.err
}

// decideAll is decide for many: they are decided together.
func (h *Host) decideAll(ctx context.Context, cs []state.Command) []decision {
	out := h.proposeAll(ctx, h.meta, cs)
	var done []int
	for i := range out {
		d := &out[i]
		if d.err == nil {
			d.err = code(d.r.Code)
		}
		if d.err == nil {
			done = append(done, i)
		}
	}
	if len(done) > 0 {
		err := h.settle(ctx)
		for _, i := range done {
			out[i].err = err
		}
	}
	return out
}

// Created is what became of a topic that was asked for.
type Created struct {
	Topic *state.Topic
	Err   error
}

// CreateTopics creates topics; when it returns, their partitions can be written to.
func (h *Host) CreateTopics(ctx context.Context, specs []TopicSpec) []Created {
	cs := make([]state.Command, len(specs))
	for i, s := range specs {
		var id record.TopicID
		copy(id[:], random(16))
		id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // a version 4 UUID, as Kafka's
		s.Parsed.Class = segment.ClassForRetention(s.Parsed.RetentionMs, s.Parsed.Compact)
		cs[i] = state.CreateTopic{ID: id, Name: s.Name, Partitions: s.Partitions, ReplicationFactor: s.ReplicationFactor, Configs: s.Configs, Config: s.Parsed}
	}
	out := make([]Created, len(specs))
	for i, d := range h.decideAll(ctx, cs) {
		if out[i].Err = d.err; d.err == nil {
			out[i].Topic = d.r.Value.(*state.Topic)
		}
	}
	return out
}

// DeleteTopics drops topics; their records are gone when it returns.
func (h *Host) DeleteTopics(ctx context.Context, ids []record.TopicID) []error {
	cs, out := make([]state.Command, len(ids)), make([]error, len(ids))
	for i, id := range ids {
		cs[i] = state.DeleteTopic{ID: id}
	}
	for i, d := range h.decideAll(ctx, cs) {
		out[i] = d.err
	}
	return out
}

// CreatePartitions grows a topic to total partitions.
func (h *Host) CreatePartitions(ctx context.Context, id record.TopicID, total int32) error {
	_, err := h.decide(ctx, state.CreatePartitions{ID: id, Total: total})
	return err
}

// AlterConfigs sets and deletes settings of a topic, or with a zero topic of the cluster. parsed is the topic's configuration after the change.
func (h *Host) AlterConfigs(ctx context.Context, topic record.TopicID, set map[string]string, del []string, parsed state.PartitionConfig) error {
	parsed.Class = segment.ClassForRetention(parsed.RetentionMs, parsed.Compact)
	_, err := h.decide(ctx, state.AlterConfigs{Topic: topic, Set: set, Delete: del, Config: parsed})
	return err
}

// DeleteRecords raises a partition's log start to `before` (-1 = the high watermark) and returns it.
func (h *Host) DeleteRecords(ctx context.Context, tp record.TopicPartition, before record.Offset) (record.Offset, error) {
	g := h.groupOf(tp)
	if g == nil {
		return -1, ErrUnknownPartition
	}
	r, err := g.propose(ctx, state.AdvanceLogStart{TP: tp, To: before})
	if err != nil {
		return -1, err
	}
	if err := code(r.Code); err != nil {
		return -1, err
	}
	return r.Value.(record.Offset), nil
}

// producerIDBlock is how many IDs are reserved at once: what is left of a block at a restart is never used.
const producerIDBlock = 1000

type producerIDs struct {
	mu        sync.Mutex
	next, end record.ProducerID
}

// AllocateProducerID returns an ID that no producer of the cluster ever had.
func (h *Host) AllocateProducerID(ctx context.Context) (record.ProducerID, error) {
	p := &h.ids
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.next == p.end {
		r, err := h.propose(ctx, h.meta, state.AllocateProducerIDs{Count: producerIDBlock})
		if err != nil {
			return -1, err
		}
		p.next = r.Value.(record.ProducerID)
		p.end = p.next + producerIDBlock
	}
	p.next++
	return p.next - 1, nil
}
