package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/state"
)

// featureLevel is the name under which peers compare feature levels: from the one that this node has seen in force to the newest that its program knows.
const featureLevel = "level"

func (h *Host) features() map[string]peer.Levels {
	return map[string]peer.Levels{featureLevel: {int(h.level.Load()), int(h.cfg.FeatureLevel)}}
}

// checkLevel refuses a group whose state has reached a level that this program does not know: what follows might mean something else. It is called with mu held, after every change of the state.
func (g *group) checkLevel() {
	level := g.machine.level()
	if g.id == 0 {
		g.host.level.Store(max(level, g.host.level.Load()))
	}
	if err := state.CheckLevel(level, g.host.cfg.FeatureLevel); err != nil {
		g.refused = fmt.Errorf("raftmeta: group %s: %w", g.name(), err)
	}
}

// refuse ends the node because its program is too old for its cluster. The group stands where it is: nothing more is applied, and no snapshot is taken.
func (h *Host) refuse(err error) {
	h.refuseOnce.Do(func() {
		h.refusal = err
		close(h.refused)
	})
	h.cfg.OnFatal(err)
}

// recordLevel remembers the level for the next start, whose program may be older.
func (h *Host) recordLevel() error {
	now := h.level.Load()
	if h.recordedLevel == now {
		return nil
	}
	h.recordedLevel = now
	return h.recordIdentity()
}

// ErrBehindLevel: not every node knows the feature level.
var ErrBehindLevel = fmt.Errorf("%w: not every node's program knows the feature level", ErrInvalid)

// RaiseFeatureLevel raises the cluster's feature level, 0 to the newest that this program knows. It is refused with ErrBehindLevel while a node that votes does not know it; it never falls.
func (h *Host) RaiseFeatureLevel(ctx context.Context, to uint32) error {
	if to == 0 {
		to = h.cfg.FeatureLevel
	}
	if err := state.CheckLevel(to, h.cfg.FeatureLevel); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	r, err := h.decide(ctx, state.RaiseFeatureLevel{To: to})
	if !errors.Is(err, ErrInvalid) || r.Code != state.Invalid {
		return err
	}
	var behind []string
	for _, n := range h.Cluster().Behind(to) {
		behind = append(behind, fmt.Sprintf("node %d knows levels up to %d", n.ID, max(n.Level, state.LevelFirst)))
	}
	return fmt.Errorf("%w %d: %s", ErrBehindLevel, to, strings.Join(behind, ", "))
}
