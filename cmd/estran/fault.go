package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// Exit codes of every command.
const (
	exitError     = 1
	exitUsage     = 2
	exitNotReady  = 3
	exitUnhealthy = 10
)

// fault is an error as a person reads it: what failed and with which value, where the value came from, what to do, and a
// stable code for scripts.
type fault struct {
	Code    string // E_…; stable
	What    string // one line, with the value that failed
	Excerpt string // source excerpt, already formatted; "" if none
	Notes   []note // "seen", "held by", "from"…
	Fix     string // what to do about it
	Exit    int
	Err     error // the cause, for errors.Is
}

type note struct{ key, text string }

func (f *fault) Error() string { return f.What }
func (f *fault) Unwrap() error { return f.Err }

// printError writes err in the anatomy of a fault and returns the exit code that belongs to it.
func printError(w io.Writer, err error) int {
	for _, e := range flatten(err) {
		f, ok := errors.AsType[*fault](e)
		if !ok {
			fmt.Fprintf(w, "error: %v\n", e)
			continue
		}
		fmt.Fprintf(w, "error: %s\n", f.What)
		if f.Excerpt != "" {
			fmt.Fprintln(w, strings.TrimRight(f.Excerpt, "\n"))
		}
		for _, n := range f.Notes {
			fmt.Fprintf(w, "  %-9s %s\n", n.key+":", n.text)
		}
		if f.Fix != "" {
			fmt.Fprintf(w, "  %-9s %s\n", "fix:", f.Fix)
		}
		fmt.Fprintf(w, "  %-9s %s\n", "code:", f.Code)
	}
	return exitCode(err)
}

func exitCode(err error) int {
	if f, ok := errors.AsType[*fault](err); ok && f.Exit != 0 {
		return f.Exit
	}
	return exitError
}

// flatten returns the parts of a joined error, so that all faults of a configuration are shown at once.
func flatten(err error) []error {
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		var out []error
		for _, e := range j.Unwrap() {
			out = append(out, flatten(e)...)
		}
		return out
	}
	return []error{err}
}

// nearest returns the candidate that is likely meant by got, or "".
func nearest(got string, candidates []string) string {
	best, bestDist := "", max(2, len(got)/3)+1
	for _, c := range candidates {
		if d := distance(got, c); d < bestDist {
			best, bestDist = c, d
		}
	}
	return best
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diag := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diag
			if a[i-1] != b[j-1] {
				cost++
			}
			diag, row[j] = row[j], min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
