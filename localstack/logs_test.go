package localstack

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/hashicorp/raft"
)

// logEntry is an entry of a voter's log as it was read from its disk.
type logEntry struct {
	index, term uint64
	sum         [sha256.Size]byte // of type, Data and payload
}

// readLog reads a group's log from the directory of a voter that does not run; each is told the payload of every entry. raftlog checks every checksum.
func readLog(dir string, each func(payload []byte)) (base uint64, out []logEntry, err error) {
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
		if err := l.GetLog(i, &e); err != nil {
			return 0, nil, fmt.Errorf("entry %d: %w", i, err)
		}
		p, err := l.Payload(i, e.Term)
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
		out = append(out, logEntry{i, e.Term, [sha256.Size]byte(h.Sum(nil))})
	}
	return base, out, nil
}

// groupOfDir is the number that the records of a group's directory carry.
func groupOfDir(dir string) (id uint32) {
	_, _ = fmt.Sscanf(filepath.Base(dir), "shard-%d", &id) // else meta, which is 0
	return id
}

// compareLogs compares the logs of voters that do not run. Entries with one index and term are the same bytes in each; of what was committed every log that reaches so
// far has the same, and a majority has all. A log that begins behind an index is taken to have what was there: it was given up by rule.
func compareLogs(dirs []string, committed map[string]uint64) error {
	if len(committed) == 0 {
		return errors.New("nothing to compare: no group is known")
	}
	var errs []error
	for name, commit := range committed {
		holders := 0
		seen := map[uint64]map[uint64]logEntry{} // index -> term -> the first one seen
		for _, dir := range dirs {
			base, entries, err := readLog(filepath.Join(dir, name), nil)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s of %s: %w", name, dir, err))
				continue
			}
			if base+uint64(len(entries)) >= commit {
				holders++
			}
			for _, e := range entries {
				if seen[e.index] == nil {
					seen[e.index] = map[uint64]logEntry{}
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

// groupLabels are the groups of a node, as its metrics name them, and their directories.
func groupLabels(t *testing.T, n *Node) map[string]string {
	t.Helper()
	out := map[string]string{"meta": "meta"}
	entries, err := os.ReadDir(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if id, ok := strings.CutPrefix(e.Name(), "shard-"); ok {
			out[id] = e.Name()
		}
	}
	return out
}

func groupMetric(t *testing.T, n *Node, name, group string) float64 {
	t.Helper()
	return metric(t, n, name, fmt.Sprintf("{group=%q", group))
}

// sameLogs ends a test: it waits until every voter knows what is committed, kills them all and compares their logs as they lie on their disks.
func sameLogs(t *testing.T, nodes []*Node) {
	t.Helper()
	committed := map[string]uint64{}
	var dirs []string
	for label, dir := range groupLabels(t, nodes[0]) {
		commit := 0.0
		for _, n := range nodes {
			commit = max(commit, groupMetric(t, n, "estran_raft_commit_index", label))
		}
		for i, n := range nodes {
			until(t, fmt.Sprintf("node %d to have entry %.0f of group %s", i+1, commit, label), func() bool { return groupMetric(t, n, "estran_raft_commit_index", label) >= commit })
		}
		committed[dir] = uint64(commit)
	}
	for _, n := range nodes {
		dirs = append(dirs, n.dir)
		if err := n.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	if err := compareLogs(dirs, committed); err != nil {
		t.Errorf("the logs differ: %v", err)
	}
}

// The comparison sees a changed byte, a changed entry whose checksums are right, a committed entry that too few have, and one that was committed in two terms.
func TestLogComparisonSees(t *testing.T) {
	const n = 40
	entry := func(i, term uint64, body string) *raft.Log {
		data := raftlog.AppendEntryHeader(nil, raftlog.EntryHeader{Term: term, Version: 1})
		return &raft.Log{Index: i, Term: term, Type: raft.LogCommand, Data: append(data, body...), AppendedAt: time.Unix(1, 0)}
	}
	write := func(t *testing.T, dir string, change func(i uint64) *raft.Log) {
		l, err := raftlog.Open(raftlog.Config{Dir: filepath.Join(dir, "shard-1"), Group: 1, FileBytes: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		for i := uint64(1); i <= n; i++ {
			e := change(i)
			if e == nil {
				break
			}
			if err := l.StoreLog(e); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	good := func(i uint64) *raft.Log { return entry(i, 1, fmt.Sprint("body of ", i)) }
	except := func(at uint64, bad *raft.Log) func(uint64) *raft.Log {
		return func(i uint64) *raft.Log {
			if i >= at {
				if bad == nil || i > at {
					return nil
				}
				return bad
			}
			return good(i)
		}
	}
	flip := func(t *testing.T, dir string) {
		files, err := filepath.Glob(filepath.Join(dir, "shard-1", "*.log"))
		if err != nil || len(files) == 0 {
			t.Fatal(files, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			if at := bytes.Index(b, []byte("body of 20")); at >= 0 {
				b[at] ^= 1
				if err := os.WriteFile(f, b, 0o600); err != nil {
					t.Fatal(err)
				}
				return
			}
		}
		t.Fatal("the entry is nowhere")
	}
	for _, c := range []struct {
		name   string
		second func(uint64) *raft.Log
		third  func(uint64) *raft.Log
		damage bool
		want   string
	}{
		{"equal", good, good, false, ""},
		{"one is behind", good, except(30, nil), false, ""},
		{"an uncommitted tail of another term", good, except(n, entry(n, 2, "not committed")), false, ""},
		{"a flipped bit", good, good, true, "corrupt"},
		{"another entry", good, except(n-1, entry(n-1, 1, "another")), false, "other bytes"},
		{"another term", good, except(n-1, entry(n-1, 2, "body of 39")), false, "in 2 terms"},
		{"two are behind", except(30, nil), except(31, nil), false, "1 of 3 logs"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dirs := []string{t.TempDir(), t.TempDir(), t.TempDir()}
			write(t, dirs[0], good)
			write(t, dirs[1], c.second)
			write(t, dirs[2], c.third)
			if c.damage {
				flip(t, dirs[2])
			}
			err := compareLogs(dirs, map[string]uint64{"shard-1": n - 1})
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}
