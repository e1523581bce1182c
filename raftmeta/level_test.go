package raftmeta

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// levels are the feature levels of a node's groups.
func (h *Host) levels() (out []uint32) {
	for _, g := range h.groups() {
		g.mu.RLock()
		out = append(out, g.machine.level())
		g.mu.RUnlock()
	}
	return out
}

// Three voters get a newer program one after the other. The level stays until the last one has it, then it is raised in every group of every node, and the older program is let in no more.
func TestFeatureLevelIsRaised(t *testing.T) {
	knows := []uint32{state.LevelFirst, state.LevelFirst, state.LevelFirst}
	c := newTrio(t, 3)
	c.change = func(i int, cfg *Config) { cfg.FeatureLevel = knows[i] }
	c.start(0, 1, 2)
	topic := newTopic(t, c.hosts[0], "t", 2)
	tp := record.TopicPartition{Topic: topic.ID}
	c.append(tp, batchOf(t, 7, 0, "a"))
	if err := c.hosts[0].RaiseFeatureLevel(t.Context(), state.LevelNewest); !errors.Is(err, state.ErrLevel) {
		t.Errorf("an older program raises it: %v", err)
	}
	for i, behind := range [][]string{{"node 2 ", "node 3 "}, {"node 3 "}, nil} {
		c.stop(i)
		knows[i] = state.LevelNewest
		c.start(i)
		err := c.hosts[i].RaiseFeatureLevel(t.Context(), 0)
		if (err != nil) != (behind != nil) || behind != nil && !errors.Is(err, ErrBehindLevel) {
			t.Fatalf("with %d newer programs: %v", i+1, err)
		}
		for _, name := range behind {
			if !strings.Contains(err.Error(), name) {
				t.Errorf("%q does not name %s", err, name)
			}
		}
	}
	c.append(tp, batchOf(t, 7, 1, "b"))
	c.agree(tp, []string{"a", "b"})
	for _, h := range c.hosts {
		if err := h.await(t.Context(), "the level", func() bool {
			for _, l := range h.levels() {
				if l != state.LevelNewest {
					return false
				}
			}
			return true
		}); err != nil {
			t.Errorf("node %d: %v: %v", h.NodeID(), h.levels(), err)
		}
	}
	if got := c.hosts[1].Status(t.Context()).FeatureLevel; got != state.LevelNewest {
		t.Errorf("its status says level %d", got)
	}
	if f := c.hosts[0].features()[featureLevel]; f[0] != int(state.LevelNewest) || f[1] != int(state.LevelNewest) {
		t.Errorf("it tells peers %v", f)
	}
}

// A program that does not know the level of a directory does not open it, wherever it reads it first, and says which levels there are.
func TestOlderProgramDoesNotOpen(t *testing.T) {
	for _, where := range []string{"node.json", "snapshot", "log"} {
		t.Run(where, func(t *testing.T) {
			dir := t.TempDir()
			h := openHost(t, dir, func(c *Config) { c.FeatureLevel = state.LevelFirst })
			_ = h.Close(t.Context())
			h = openHost(t, dir, nil)
			if err := h.RaiseFeatureLevel(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
			if where == "snapshot" {
				if err := h.meta.snapshot(); err != nil {
					t.Fatal(err)
				}
			}
			_ = h.Close(t.Context())
			if where != "node.json" { // as after a crash before it was written
				path := filepath.Join(dir, identityFile)
				id, _, err := readIdentity(dir, h.cfg.NodeID, true)
				if err != nil {
					t.Fatal(err)
				}
				id.Level = 0
				if err := writeIdentity(path, id); err != nil {
					t.Fatal(err)
				}
			}
			cfg := h.cfg
			cfg.FeatureLevel, cfg.Registerer = state.LevelFirst, nil
			var fatal error
			cfg.OnFatal = func(err error) { fatal = err }
			older, err := Open(t.Context(), cfg)
			if !errors.Is(err, ErrLevel) || !strings.Contains(err.Error(), "is at level 2, this program knows 1 to 1") {
				t.Errorf("opened: %v, %v", older, err)
			}
			if where != "node.json" && !errors.Is(fatal, ErrLevel) {
				t.Errorf("the node is told to end with %v", fatal)
			}
			cfg.FeatureLevel = 0
			cfg.OnFatal = h.cfg.OnFatal
			newer, err := Open(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			if l := newer.levels(); l[0] != state.LevelNewest {
				t.Errorf("levels %v", l)
			}
			_ = newer.Close(context.Background())
		})
	}
}
