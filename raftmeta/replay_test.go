package raftmeta

import (
	"bytes"
	"io"
	"testing"

	"github.com/estran/estran/tiering/record"
)

// What the directories of stopped nodes give at an index is what a node had applied at it, with and without a snapshot before it.
func TestReplay(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	w, shard := newCounter(c, "t")
	w.write(20)
	for _, g := range c.hosts[2].groups() {
		if err := g.snapshot(); err != nil {
			t.Fatal(err)
		}
	}
	w.write(20)
	c.agree(w.tp, w.want)
	type frozen struct {
		index uint64
		state []byte
	}
	written := func(f io.WriterTo) []byte {
		var b bytes.Buffer
		if _, err := f.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	live := map[record.ShardID]frozen{}
	for _, g := range c.hosts[0].groups() {
		g.mu.Lock()
		f := g.machine.freeze()
		g.mu.Unlock()
		live[g.id] = frozen{uint64(f.Index()), written(f)}
	}
	until(t, "all to have applied that", func() bool {
		for _, h := range c.hosts {
			for _, g := range h.groups() {
				if g.applied.Load() < live[g.id].index {
					return false
				}
			}
		}
		return true
	})
	if live[shard].index == 0 {
		t.Fatal("the shard has applied nothing")
	}
	w.write(5) // beyond what is asked for
	for i := range c.hosts {
		c.stop(i)
	}
	for id, want := range live {
		for _, dir := range c.dirs {
			var got []byte
			if id == 0 {
				m, err := ReplayMeta(dir, want.index)
				if err != nil {
					t.Fatal(err)
				}
				f := m.Freeze()
				got = written(&f)
			} else {
				s, err := ReplayShard(dir, id, want.index)
				if err != nil {
					t.Fatal(err)
				}
				f := s.Freeze()
				got = written(&f)
			}
			if !bytes.Equal(got, want.state) {
				t.Errorf("group %d of %s at %d:\n%s\nit was\n%s", id, dir, want.index, got, want.state)
			}
		}
	}
}
