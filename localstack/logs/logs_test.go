package logs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/hashicorp/raft"
)

// The comparison sees a changed byte, a changed entry whose checksums are right, a committed entry that too few have, and one that was committed in two terms.
func TestComparisonSees(t *testing.T) {
	const n = 40
	entry := func(i, term uint64, body string) *raft.Log {
		data := raftlog.AppendEntryHeader(nil, raftlog.EntryHeader{Term: term, Version: 1})
		return &raft.Log{Index: i, Term: term, Type: raft.LogCommand, Data: append(data, body...), AppendedAt: time.Unix(1, 0)}
	}
	write := func(t *testing.T, dir string, change func(i uint64) *raft.Log) {
		l, err := raftlog.Open(raftlog.Config{Dir: filepath.Join(dir, "shard-1"), Group: 1, FileBytes: 64 << 10}) // a closed file is not read when a log is opened
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
		known  int // of the damage
		want   string
	}{
		{"equal", good, good, false, 0, ""},
		{"one is behind", good, except(30, nil), false, 0, ""},
		{"an uncommitted tail of another term", good, except(n, entry(n, 2, "not committed")), false, 0, ""},
		{"a flipped bit", good, good, true, 0, "corrupt"},
		{"a bit that was flipped on purpose", good, good, true, 1, ""},
		{"another entry beside it", good, except(n-1, entry(n-1, 1, "another")), true, 1, "other bytes"},
		{"too few beside it", except(30, nil), except(31, nil), true, 1, "1 of 3 logs"},
		{"another entry", good, except(n-1, entry(n-1, 1, "another")), false, 0, "other bytes"},
		{"another term", good, except(n-1, entry(n-1, 2, "body of 39")), false, 0, "in 2 terms"},
		{"two are behind", except(30, nil), except(31, nil), false, 0, "1 of 3 logs"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dirs := []string{t.TempDir(), t.TempDir(), t.TempDir()}
			write(t, dirs[0], good)
			write(t, dirs[1], c.second)
			write(t, dirs[2], c.third)
			if c.damage {
				flip(t, dirs[2])
			}
			err := Compare(dirs, map[string]uint64{"shard-1": n - 1}, map[string]int{dirs[2]: c.known})
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}
