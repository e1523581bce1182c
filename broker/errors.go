package broker

import (
	"context"
	"errors"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
)

// Kafka's error codes, as far as they are used.
const (
	codeUnknownServerError       int16 = -1
	codeNone                     int16 = 0
	codeOffsetOutOfRange         int16 = 1
	codeCorruptMessage           int16 = 2
	codeUnknownTopicOrPartition  int16 = 3
	codeLeaderNotAvailable       int16 = 5
	codeNotLeaderOrFollower      int16 = 6
	codeRequestTimedOut          int16 = 7
	codeMessageTooLarge          int16 = 10
	codeOffsetMetadataTooLarge   int16 = 12
	codeCoordinatorLoading       int16 = 14
	codeCoordinatorNotAvailable  int16 = 15
	codeNotCoordinator           int16 = 16
	codeInvalidTopic             int16 = 17
	codeNotEnoughReplicas        int16 = 19
	codeInvalidRequiredAcks      int16 = 21
	codeIllegalGeneration        int16 = 22
	codeInconsistentProtocol     int16 = 23
	codeInvalidGroupID           int16 = 24
	codeUnknownMember            int16 = 25
	codeInvalidSessionTimeout    int16 = 26
	codeRebalanceInProgress      int16 = 27
	codeInvalidTimestamp         int16 = 32
	codeUnsupportedVersion       int16 = 35
	codeTopicExists              int16 = 36
	codeInvalidPartitions        int16 = 37
	codeInvalidReplicationFactor int16 = 38
	codeInvalidReplicaAssignment int16 = 39
	codeInvalidConfig            int16 = 40
	codeNotController            int16 = 41
	codeInvalidRequest           int16 = 42
	codeUnsupportedForFormat     int16 = 43
	codePolicyViolation          int16 = 44
	codeOutOfOrderSequence       int16 = 45
	codeInvalidProducerEpoch     int16 = 47
	codeInvalidTransactionState  int16 = 48
	codeTransactionalIDAuth      int16 = 53
	codeStorageError             int16 = 56
	codeNonEmptyGroup            int16 = 68
	codeGroupIDNotFound          int16 = 69
	codeFetchSessionNotFound     int16 = 70
	codeInvalidFetchSessionEpoch int16 = 71
	codeFencedLeaderEpoch        int16 = 74
	codeUnknownLeaderEpoch       int16 = 75
	codeUnsupportedCompression   int16 = 76
	codeOffsetNotAvailable       int16 = 78
	codeMemberIDRequired         int16 = 79
	codeGroupMaxSize             int16 = 81
	codeFencedInstanceID         int16 = 82
	codeInvalidRecord            int16 = 87
	codeUnknownTopicID           int16 = 100
	codeInconsistentTopicID      int16 = 103
)

// errorTable maps what the layers below return to Kafka's codes, in one place. An unknown outcome is never a definite error.
var errorTable = []struct {
	err  error
	code int16
}{
	{raftmeta.ErrTimeout, codeRequestTimedOut}, // whatever was waited for
	{raftmeta.ErrUnknownPartition, codeUnknownTopicOrPartition},
	{raftmeta.ErrUnknownTopic, codeUnknownTopicOrPartition},
	{raftmeta.ErrNotLeader, codeNotLeaderOrFollower},
	{raftmeta.ErrStopped, codeNotLeaderOrFollower},
	{raftmeta.ErrNoQuorum, codeNotEnoughReplicas},
	{raftmeta.ErrBudget, codeStorageError},
	{raftmeta.ErrOutOfOrderSequence, codeOutOfOrderSequence},
	{raftmeta.ErrInvalidProducerEpoch, codeInvalidProducerEpoch},
	{raftmeta.ErrTopicExists, codeTopicExists},
	{raftmeta.ErrOffsetOutOfRange, codeOffsetOutOfRange},
	{raftmeta.ErrTooLarge, codeMessageTooLarge},
	{raftmeta.ErrInvalid, codeInvalidRequest},
	{raftmeta.ErrUnknownOutcome, codeRequestTimedOut},
	{tiering.ErrUnknownPartition, codeUnknownTopicOrPartition},
	{tiering.ErrOutOfRange, codeOffsetOutOfRange},
	{tiering.ErrStorage, codeStorageError},
	{record.ErrMagic, codeInvalidRecord},
	{record.ErrCRC, codeCorruptMessage},
	{record.ErrTruncated, codeCorruptMessage},
	{record.ErrCodec, codeUnsupportedCompression},
	{record.ErrTooLarge, codeMessageTooLarge},
	{record.ErrNullKey, codeInvalidRecord},
	{record.ErrControl, codeInvalidRecord},
	{record.ErrInvalid, codeInvalidRecord},
	{context.DeadlineExceeded, codeRequestTimedOut},
	{context.Canceled, codeRequestTimedOut},
}

// codeOf is Kafka's code for an error.
func codeOf(err error) int16 {
	if err == nil {
		return codeNone
	}
	if c, ok := errors.AsType[codedError](err); ok {
		return c.code
	}
	for _, e := range errorTable {
		if errors.Is(err, e.err) {
			return e.code
		}
	}
	return codeUnknownServerError
}

// groupCodeOf is the code where a coordinator's change failed.
func groupCodeOf(err error) int16 {
	switch c := codeOf(err); c {
	case codeNotLeaderOrFollower:
		return codeNotCoordinator
	case codeStorageError, codeRequestTimedOut, codeNotEnoughReplicas:
		return codeCoordinatorNotAvailable
	default:
		return c
	}
}
