package raftlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
)

// directory is a group's directory on the memory file system, and all that was ever written into it.
type directory struct {
	fs     *memFS
	names  []string                // of its files, sorted
	ever   map[[2]uint64]*raft.Log // by index and term
	states map[string]string       // of snapshots, by name
}

// lived is the directory of a log that has rolled over files, replaced entries, made snapshots and freed what is below them.
func lived(t testing.TB) directory {
	d := directory{fs: newMemFS(), ever: map[[2]uint64]*raft.Log{}, states: map[string]string{}}
	change := func(c *Config) { c.FileBytes = 16 << 10 }
	l := open(t, d.fs, change)
	put := func(from, to, term uint64) {
		for i := from; i <= to; i++ {
			es := []*raft.Log{command(i, term, int(i), int(i*700%5000)), command(i+1, term, 0, 0)}
			store(t, l, es...)
			for _, e := range es {
				d.ever[[2]uint64{e.Index, e.Term}] = e
			}
			i++
		}
	}
	put(1, 8, 1)
	s, err := OpenSnapshots(l)
	if err != nil {
		t.Fatal(err)
	}
	snapshot := func(index uint64) {
		k, err := s.Store().Create(1, index, 1, raft.Configuration{}, 1, nil)
		if err != nil {
			t.Fatal(err)
		}
		d.states[k.ID()] = strings.Repeat("state ", int(index))
		if _, err := io.WriteString(k, d.states[k.ID()]); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(k.Close(), s.Applied(index, index+1)); err != nil {
			t.Fatal(err)
		}
	}
	snapshot(6)
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	put(9, 12, 1)
	put(11, 14, 2) // replaces the end
	snapshot(10)
	stable, err := OpenStable(d.fs, "/log", func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	for _, term := range []uint64{1, 2} {
		if err := errors.Join(stable.SetUint64([]byte(keyCurrentTerm), term), stable.SetUint64([]byte(keyLastVoteTerm), term), stable.Set([]byte(keyLastVoteCand), []byte("one"))); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(stable.Close(), l.Close()); err != nil {
		t.Fatal(err)
	}
	l = open(t, d.fs, change) // the file that was written to gets its index, and another is begun
	put(15, 18, 3)
	if base, _ := l.Base(); base == 0 || len(l.order) < 3 {
		t.Fatalf("base %d, %d files", base, len(l.order))
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	d.names = slices.Sorted(maps.Keys(d.fs.files))
	return d
}

// recovered is a log behind its recovery, without its goroutines.
func recovered(fs *memFS) (*Log, error) {
	l := newLog(Config{Dir: "/log", Group: 7, FS: fs, FileBytes: 16 << 10})
	return l, l.recover()
}

// check reads all that a recovered log has, and compares it with what was written.
func (d *directory) check(t *testing.T, l *Log) error {
	for i := l.base + 1; i <= l.lastLocked(); i++ {
		e, err := l.Entry(i, l.ents[i-l.base-1].term)
		if errors.Is(err, ErrCorrupt) {
			continue // found when it is read
		}
		if err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
		key := [2]uint64{i, l.ents[i-l.base-1].term}
		want := d.ever[key]
		p := make([]byte, e.PayloadLen)
		if err := e.ReadPayload(p, 0); err != nil {
			t.Fatalf("payload of entry %d: %v", i, err)
		}
		if want == nil || e.Type != want.Type || !e.AppendedAt.Equal(want.AppendedAt) || !bytes.Equal(e.Data, want.Data) || crcOf(p) == e.payloadCRC && !bytes.Equal(p, want.Extensions) {
			t.Fatalf("entry %d of term %d was never written so", i, key[1])
		}
		e.Release()
	}
	s, err := OpenSnapshots(l)
	if err != nil {
		return err
	}
	for _, x := range s.snaps {
		meta, r, err := s.Open(x.name)
		if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrVersion) {
			continue
		}
		if err != nil {
			t.Fatalf("snapshot %s: %v", x.name, err)
		}
		if state, err := io.ReadAll(r); err != nil || string(state) != d.states[meta.ID] || state == nil {
			t.Fatalf("snapshot %s: another state, %v", x.name, err)
		}
	}
	st, err := OpenStable(l.fs, "/log", nil)
	if err != nil {
		return err
	}
	if cand, err := st.Get([]byte(keyLastVoteCand)); err == nil && string(cand) != "one" || st.Term() > 2 || st.voteTerm > st.Term() {
		t.Fatalf("term %d, vote for %q in term %d", st.Term(), cand, st.voteTerm)
	}
	return nil
}

// damage changes files as data says: a byte at a place, a block of zeros, a block from elsewhere, a shorter file, none, two that change places.
func (d *directory) damage(fs *memFS, data []byte) {
	be := binary.BigEndian
	for ; len(data) >= 6; data = data[6:] {
		name := d.names[int(data[0])%len(d.names)]
		f := fs.files[name]
		if f == nil || len(f.data) == 0 {
			continue
		}
		at := int(be.Uint16(data[2:])) % len(f.data)
		block := at / blockBytes * blockBytes
		switch data[1] % 8 {
		case 0, 1:
			f.data[at] ^= data[4]
		case 2:
			clear(f.data[block:min(block+blockBytes, len(f.data))])
		case 3:
			if other := fs.files[d.names[int(data[4])%len(d.names)]]; other != nil {
				copy(f.data[block:], other.data[min(int(data[5])*blockBytes, len(other.data)):min((int(data[5])+1)*blockBytes, len(other.data))])
			}
		case 4:
			f.data = f.data[:at]
		case 5:
			delete(fs.files, name)
		case 6:
			if other := d.names[int(data[4])%len(d.names)]; fs.files[other] != nil {
				fs.files[name], fs.files[other] = fs.files[other], f
			}
		case 7:
			copy(f.data[at:], data[4:6])
		}
	}
}

// FuzzRecovery damages a directory in several places. Opening it then either says what is corrupt, or gives entries, snapshots and votes that were written, as they were; and what
// was opened once opens again to the same.
func FuzzRecovery(f *testing.F) {
	d := lived(f)
	for i := range d.names {
		for op := range byte(8) {
			f.Add([]byte{byte(i), op, 0x10, 8, 1, 1})
		}
	}
	f.Add([]byte{0, 0, 0, 8, 1, 0, 2, 7, 0x11, 0, 0, 1})
	f.Add([]byte{})
	debug.SetGCPercent(1000)
	room := map[string][]byte{} // of the copies, by name; no execution keeps its own
	f.Fuzz(func(t *testing.T, data []byte) {
		fs := newMemFS()
		for name, f := range d.fs.files {
			room[name] = append(room[name][:0], f.data...)
			fs.files[name] = &memInode{data: room[name], dirty: map[int64]bool{}}
		}
		d.damage(fs, data[:min(len(data), 60)])
		l, err := recovered(fs)
		if err == nil {
			err = d.check(t, l)
		}
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
				t.Fatalf("refused without saying that it is damage: %v", err)
			}
			return
		}
		if len(data) < 6 && l.lastLocked() != 18 {
			t.Fatalf("nothing is damaged, and the log ends at %d", l.lastLocked())
		}
		again, err := recovered(fs)
		if err != nil || again.base != l.base || !slices.EqualFunc(l.ents, again.ents, func(a, b ent) bool { return a.term == b.term }) {
			t.Fatalf("opened once %d entries above %d, again %d above %d: %v", len(l.ents), l.base, len(again.ents), again.base, err)
		}
	})
}
