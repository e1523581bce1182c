package wal

import (
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"testing"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftwal "github.com/hashicorp/raft-wal"
)

// kept is how many bytes of entries stay in the log; what is older is freed, so that a long run needs no large disk.
const kept = 128 << 20

// A log is what is compared, with a way to free the entries up to an index.
type log struct {
	raft.LogStore
	free  func(index uint64) error
	close func() error
}

var logs = []struct {
	name string
	open func(dir string) (log, error)
}{
	{"raftlog", func(dir string) (log, error) {
		l, err := raftlog.Open(raftlog.Config{Dir: dir, Group: 1})
		if err != nil {
			return log{}, err
		}
		return log{l, func(i uint64) error { l.Permit(i); return l.Poisoned() }, l.Close}, nil
	}},
	{"raft-wal", func(dir string) (log, error) {
		w, err := raftwal.Open(dir, raftwal.WithLogger(hclog.NewNullLogger()))
		if err != nil {
			return log{}, err
		}
		return log{w, func(i uint64) error { return w.DeleteRange(1, i) }, w.Close}, nil
	}},
}

// BenchmarkStoreLogs stores batches of entries as raft does: one call, durable when it returns. Run it on the disk in question:
// TMPDIR=/there go test -bench .
func BenchmarkStoreLogs(b *testing.B) {
	for _, batch := range []struct{ entries, bytes int }{{1, 1 << 20}, {16, 64 << 10}, {1, 1 << 10}} {
		for _, kind := range logs {
			b.Run(fmt.Sprintf("%dx%dKiB/%s", batch.entries, batch.bytes>>10, kind.name), func(b *testing.B) {
				l, err := kind.open(b.TempDir())
				if err != nil {
					b.Fatal(err)
				}
				defer func() {
					if err := l.close(); err != nil {
						b.Error(err)
					}
				}()
				run(b, l, batch.entries, batch.bytes)
			})
		}
	}
}

func run(b *testing.B, l log, entries, bytes int) {
	rng := rand.NewChaCha8([32]byte{})
	payload := make([]byte, bytes)
	_, _ = rng.Read(payload)
	const term = 1
	data := raftlog.AppendEntryHeader(nil, raftlog.EntryHeader{Term: term, Version: 1, Place: raftlog.PlaceInline, PayloadLen: uint32(bytes),
		PayloadCRC: crc32.Checksum(payload, crc32.MakeTable(crc32.Castagnoli))})
	batch := make([]*raft.Log, entries)
	size := int64(entries * bytes)
	every := uint64(max(1, kept/size/2))
	b.SetBytes(size)
	b.ReportAllocs()
	next, calls := uint64(1), uint64(0)
	for b.Loop() {
		for i := range batch { // a log keeps what it was given: new ones each time
			batch[i] = &raft.Log{Index: next, Term: term, Type: raft.LogCommand, Data: data, Extensions: payload}
			next++
		}
		if err := l.StoreLogs(batch); err != nil {
			b.Fatal(err)
		}
		if calls++; calls%every == 0 && next > uint64(kept/bytes) {
			if err := l.free(next - uint64(kept/bytes)); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// What the comparison relies on: both read back what they were given, also after they were opened again.
func TestBothKeepWhatTheyAreGiven(t *testing.T) {
	for _, kind := range logs {
		t.Run(kind.name, func(t *testing.T) {
			dir := t.TempDir()
			for range 2 {
				l, err := kind.open(dir)
				if err != nil {
					t.Fatal(err)
				}
				last, err := l.LastIndex()
				if err != nil {
					t.Fatal(err)
				}
				for i := last + 1; i <= last+3; i++ {
					if err := l.StoreLogs([]*raft.Log{{Index: i, Term: 1, Type: raft.LogNoop, Data: []byte(fmt.Sprint(i))}}); err != nil {
						t.Fatal(err)
					}
				}
				for i := uint64(1); i <= last+3; i++ {
					var got raft.Log
					if err := l.GetLog(i, &got); err != nil || string(got.Data) != fmt.Sprint(i) {
						t.Errorf("entry %d: %q %v", i, got.Data, err)
					}
				}
				if err := l.close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
