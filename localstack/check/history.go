// Package check judges what clients saw of a Kafka-compatible cluster: a history of sends, polls, transactions, assignments and commits, and the anomalies in it.
package check

// Kind is what a client did.
type Kind uint8

// Kinds of operations.
const (
	// Send wrote Records; one for each record, or for each that began at the same moment.
	Send Kind = iota + 1
	// Poll read Records.
	Poll
	// Txn did both in a transaction: a record is written if Write is set, else read.
	Txn
	// Assign took the keys of Records, at positions of the client's own choice: Offset, or -1 if that is not known.
	Assign
	// Subscribe joined Group: its positions may change with every rebalance.
	Subscribe
	// Commit committed the offsets of Records for Group.
	Commit
	// Committed read them.
	Committed
	// Lookup asked for the first offset at a timestamp: Value is the timestamp.
	Lookup
	// Served is a fetch that voter Group answered for a client that knows Generation as the leader epoch of the keys of Records.
	Served
	// OutOfRange is a fetch at the offsets of Records that voter Group refused because of them.
	OutOfRange
)

// Outcome is what the client knows of an operation.
type Outcome uint8

// Outcomes.
const (
	// OK: it happened.
	OK Outcome = iota + 1
	// Info: it may have happened.
	Info
	// Fail: it has not happened and never will.
	Fail
)

// Record is one record that an operation wrote or read.
type Record struct {
	Key    int32  // the topic-partition, numbered from 0
	Write  bool   // in a transaction
	Offset int64  // -1 = not known
	Value  uint64 // unique, numbered from 1; 0 = bytes that nobody wrote
	Hash   uint32 // of the record's bytes; 0 = not known
}

// Mark is what an answer told of a partition's bounds; -1 = nothing.
type Mark struct {
	Key                    int32
	LogStart, Stable, High int64
}

// Op is one operation of one client. Times are nanoseconds of one clock.
type Op struct {
	Process, Group, Generation int32
	Kind                       Kind
	Outcome                    Outcome
	Start, End                 int64
	Records                    []Record
	Marks                      []Mark
}

func (o *Op) writes(r *Record) bool { return o.Kind == Send || o.Kind == Txn && r.Write }
func (o *Op) reads(r *Record) bool  { return o.Kind == Poll || o.Kind == Txn && !r.Write }
