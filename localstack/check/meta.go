package check

import (
	"time"

	"github.com/anishathalye/porcupine"
)

// Command is what was asked about one name: a topic, or a group's offset of a partition.
type Command uint8

// Commands of a register that may be absent: -1.
const (
	// Create makes it with Value; it fails if it is there.
	Create Command = iota + 1
	// Delete removes it; it fails if it is not there.
	Delete
	// Set writes Value (a committed offset).
	Set
	// Get reads Value; -1 if it is not there.
	Get
)

// Metadata is one operation on a name. With Info it may have happened, at any later time.
type Metadata struct {
	Name       string
	Process    int
	Command    Command
	Value      int64
	Outcome    Outcome
	Start, End int64
}

// Linearizable judges the operations on each name; false with decided says that no order explains them. Undecided after limit.
func Linearizable(ops []Metadata, limit time.Duration) (ok, decided bool) {
	last := int64(0)
	for _, o := range ops {
		last = max(last, o.End)
	}
	var history []porcupine.Operation
	for _, o := range ops {
		end := o.End
		if o.Outcome == Info {
			end = last + 1
		}
		history = append(history, porcupine.Operation{ClientId: o.Process, Input: o, Call: o.Start, Return: end})
	}
	r := porcupine.CheckOperationsTimeout(register.ToModel(), history, limit)
	return r == porcupine.Ok, r != porcupine.Unknown
}

// register branches where it is not known whether an operation happened.
var register = porcupine.NondeterministicModel{
	Partition: func(all []porcupine.Operation) (out [][]porcupine.Operation) {
		at := map[string]int{}
		for _, o := range all {
			name := o.Input.(Metadata).Name
			if _, ok := at[name]; !ok {
				at[name] = len(out)
				out = append(out, nil)
			}
			out[at[name]] = append(out[at[name]], o)
		}
		return out
	},
	Init: func() []any { return []any{int64(-1)} },
	Step: func(state, input, _ any) []any {
		was, o := state.(int64), input.(Metadata)
		next, can := was, true
		switch o.Command {
		case Create:
			next, can = o.Value, was == -1
		case Delete:
			next, can = -1, was != -1
		case Set:
			next = o.Value
		case Get:
			can = was == o.Value
		}
		switch {
		case o.Command == Get && o.Outcome != OK:
			return []any{was}
		case o.Outcome == Info && can:
			return []any{was, next}
		case o.Outcome == Info:
			return []any{was}
		case o.Outcome == OK && can:
			return []any{next}
		case o.Outcome == Fail && (!can || o.Command == Set):
			return []any{was}
		}
		return nil
	},
	Equal: func(a, b any) bool { return a == b },
}
