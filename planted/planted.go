// Package planted names known mistakes. A program that is built with the tag `planted` makes the one that ESTRAN_TEST_PLANTED names, so that `make planted` can show that
// `make faults` finds it. Without the tag On is a constant and the compiler drops what it guards.
package planted

// Mistakes; each is made where On is asked for it.
const (
	AckBeforeCommit   = "ack-before-commit"    // an answer when raft has the entry
	AckAfterOwnFsync  = "ack-after-own-fsync"  // an answer when this node alone has it
	OffsetBeforeApply = "offset-before-apply"  // offsets are those that were due when the entry was proposed
	DedupOff          = "dedup-off"            // sequences are not looked at
	GuessedOutOfRange = "guessed-out-of-range" // the log's end is believed without asking a majority
)

// All lists them.
var All = []string{AckBeforeCommit, AckAfterOwnFsync, OffsetBeforeApply, DedupOff, GuessedOutOfRange}
