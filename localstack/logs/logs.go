// Package logs compares what voters have left on their disks: their logs, and the states that these come to.
package logs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/hashicorp/raft"
)

// Entry is one of a voter's log as it was read from its disk.
type Entry struct {
	index, term uint64
	sum         [sha256.Size]byte // of type, Data and payload
	lost        bool              // its bytes are damaged, as is allowed: nothing is known of it but the index
}

// Read reads a group's log from the directory of a voter that does not run; each, if not nil, is told the payload of every entry. raftlog checks every checksum; as many entries as damaged says may fail that.
func Read(dir string, damaged int, each func(payload []byte)) (base uint64, out []Entry, err error) {
	l, err := raftlog.Open(raftlog.Config{Dir: dir, Group: groupOfDir(dir), TailBytes: 1})
	if err != nil {
		return 0, nil, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	base, _ = l.Base()
	last, err := l.LastIndex()
	if err != nil {
		return 0, nil, err
	}
	for i := base + 1; i <= last; i++ {
		var e raft.Log
		var p []byte
		if err = l.GetLog(i, &e); err == nil {
			p, err = l.Payload(i, e.Term)
		}
		if errors.Is(err, raftlog.ErrCorrupt) && damaged > 0 {
			damaged--
			out = append(out, Entry{index: i, lost: true})
			continue
		}
		if err != nil {
			return 0, nil, fmt.Errorf("entry %d: %w", i, err)
		}
		if each != nil {
			each(p)
		}
		h := sha256.New()
		fmt.Fprintf(h, "%d %d %d ", e.Type, len(e.Data), len(p))
		h.Write(e.Data)
		h.Write(p)
		out = append(out, Entry{index: i, term: e.Term, sum: [sha256.Size]byte(h.Sum(nil))})
	}
	return base, out, nil
}

// groupOfDir is the number that the records of a group's directory carry.
func groupOfDir(dir string) (id uint32) {
	_, _ = fmt.Sscanf(filepath.Base(dir), "shard-%d", &id) // else meta, which is 0
	return id
}

// Compare compares the logs of voters that do not run. Entries with one index and term are the same bytes in each; of what was committed every log that reaches so
// far has the same, and a majority has all (committed: the index, by the group's directory). A log that begins behind an index is taken to have what was there: it was given up by rule.
// damaged is how many entries of a voter's logs somebody has damaged on purpose: nobody may have read them since, and nothing is asked of them.
func Compare(dirs []string, committed map[string]uint64, damaged map[string]int) error {
	if len(committed) == 0 {
		return errors.New("nothing to compare: no group is known")
	}
	var errs []error
	for name, commit := range committed {
		holders := 0
		seen := map[uint64]map[uint64]Entry{} // index -> term -> the first one seen
		for _, dir := range dirs {
			base, entries, err := Read(filepath.Join(dir, name), damaged[dir], nil)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s of %s: %w", name, dir, err))
				continue
			}
			if base+uint64(len(entries)) >= commit {
				holders++
			}
			for _, e := range entries {
				if e.lost {
					continue
				}
				if seen[e.index] == nil {
					seen[e.index] = map[uint64]Entry{}
				}
				if old, ok := seen[e.index][e.term]; ok && old != e {
					errs = append(errs, fmt.Errorf("%s of %s: entry %d of term %d has other bytes than another voter's", name, dir, e.index, e.term))
				}
				seen[e.index][e.term] = e
			}
		}
		for i, terms := range seen {
			if i <= commit && len(terms) > 1 {
				errs = append(errs, fmt.Errorf("%s: entry %d is committed and there in %d terms", name, i, len(terms)))
			}
		}
		if holders < len(dirs)/2+1 {
			errs = append(errs, fmt.Errorf("%s: %d is committed, %d of %d logs reach so far", name, commit, holders, len(dirs)))
		}
	}
	return errors.Join(errs...)
}

// Groups are the groups that a voter's directory holds: the directory of each by its label in metrics.
func Groups(dir string) (map[string]string, error) {
	out := map[string]string{"meta": "meta"}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("logs: %w", err)
	}
	for _, e := range entries {
		if id, ok := strings.CutPrefix(e.Name(), "shard-"); ok {
			out[id] = e.Name()
		}
	}
	return out, nil
}
