// Package planted names known mistakes, and has a clock that can be wrong. A program that is built with the tag `planted` makes the one that ESTRAN_TEST_PLANTED names, so that `make planted` can show that
// `make faults` finds it; its wall clock can be moved while it runs. Without the tag On is a constant and the compiler drops what it guards.
package planted

// Mistakes; each is made where On is asked for it.
const (
	AckBeforeCommit      = "ack-before-commit"      // an answer when raft has the entry
	AckAfterOwnFsync     = "ack-after-own-fsync"    // an answer when this node alone has it
	OffsetBeforeApply    = "offset-before-apply"    // offsets are those that were due when the entry was proposed
	DedupOff             = "dedup-off"              // sequences are not looked at
	GuessedOutOfRange    = "guessed-out-of-range"   // the log's end is believed without asking a majority
	LeaderStartSkipped   = "leaderstart-skipped"    // a node leads as soon as raft says so, before the term's LeaderStart is applied
	VerifyLeaderAsProof  = "verifyleader-as-proof"  // raft's VerifyLeader stands for the question to a majority
	EpochUnchecked       = "epoch-unchecked"        // a fetch with another leader epoch is served
	CommitUnchecked      = "commit-unchecked"       // a sealed run is taken whatever offsets it has
	CommitIndexUnclamped = "commit-index-unclamped" // the leader's commit index is believed beyond what the request checked
	LentPayloadKept      = "lent-payload-kept"      // a payload from a peer stays in memory that is used again: what is sent and served of its entry is another's
	GraceSkipped         = "grace-skipped"          // an object is deleted as soon as nothing refers to it
	CRCSkipped           = "crc-skipped"            // what the store says it has is not compared with what was sent, and blocks are not checked
	SnapshotShownEarly   = "snapshot-shown-early"   // a snapshot is installable though what was hot at its index is not sealed
	FreeOnHint           = "free-on-hint"           // the log frees what raft's DeleteRange names
	DeleteRangeByMax     = "deleterange-by-max"     // a DeleteRange up to the log's end is a truncation
	LocalClock           = "local-clock"            // time in entries is this node's, trusted or not
	LostOutboxEntry      = "lost-outbox-entry"      // a shard passes over the last of several effects of meta
	PutUnchecked         = "put-unchecked"          // an object is committed though its PUT failed
	StockHeartbeat       = "stock-heartbeat"        // raft handles heartbeats beside its main loop, and the log takes commands of another term
	NoFsync              = "no-fsync"               // what is written to the log is not synced
	DeleteFirst          = "delete-first"           // objects are deleted before it is committed that their records have expired
)

// All lists them.
var All = []string{AckBeforeCommit, AckAfterOwnFsync, OffsetBeforeApply, DedupOff, GuessedOutOfRange,
	LeaderStartSkipped, VerifyLeaderAsProof, EpochUnchecked, CommitUnchecked, CommitIndexUnclamped, LentPayloadKept, GraceSkipped, CRCSkipped, SnapshotShownEarly, FreeOnHint, DeleteRangeByMax, LocalClock, LostOutboxEntry, PutUnchecked, StockHeartbeat, NoFsync, DeleteFirst}
