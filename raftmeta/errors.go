package raftmeta

import (
	"errors"

	"github.com/estran/estran/raftmeta/state"
)

// Why an operation failed. The first group is definite: nothing was appended or changed.
var (
	ErrNotLeader            = errors.New("raftmeta: not the leader")
	ErrUnknownPartition     = errors.New("raftmeta: unknown partition")
	ErrUnknownTopic         = errors.New("raftmeta: unknown topic")
	ErrTopicExists          = errors.New("raftmeta: topic exists")
	ErrInvalid              = errors.New("raftmeta: invalid request")
	ErrNoQuorum             = errors.New("raftmeta: no quorum")
	ErrBudget               = errors.New("raftmeta: hot budget is used up")
	ErrOutOfOrderSequence   = errors.New("raftmeta: out of order sequence")
	ErrInvalidProducerEpoch = errors.New("raftmeta: invalid producer epoch")
	ErrOffsetOutOfRange     = errors.New("raftmeta: offset out of range")
	ErrNotFound             = errors.New("raftmeta: not found")
	ErrStopped              = errors.New("raftmeta: stopped")
	// ErrRemoved: this node is no member of its cluster any more.
	ErrRemoved = errors.New("raftmeta: this node was removed from the cluster")
	// ErrLevel: the cluster is at a feature level that this program does not know.
	ErrLevel    = state.ErrLevel
	ErrTooLarge = errors.New("raftmeta: batch is larger than an entry may be")

	// ErrTimeout and ErrUnknownOutcome: the change may have happened or may still happen.
	ErrTimeout        = errors.New("raftmeta: timed out")
	ErrUnknownOutcome = errors.New("raftmeta: outcome unknown")
)
