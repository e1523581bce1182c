package state

import (
	"errors"
	"fmt"

	"github.com/estran/estran/tiering/record"
)

// Each group's state has a feature level. It selects which commands may be proposed, what Apply does and the format of the snapshot: a program writes the level's, not its own newest. Levels
// are appended, never renumbered, and what one means never changes.
const (
	// LevelFirst is that of a state that was told no other.
	LevelFirst uint32 = 1
	// LevelStood: what an entry without a time stamps is stamped anew when the time goes on (time.go), and a shard's snapshot says that it must be.
	LevelStood uint32 = 2
	// LevelNewest is the highest that this program knows; a new cluster begins with it.
	LevelNewest = LevelStood
)

// ErrLevel: a newer program has raised the feature level.
var ErrLevel = errors.New("unknown feature level")

// CheckLevel refuses a state of a level that a program does not know that knows all up to newest.
func CheckLevel(level, newest uint32) error {
	if level >= LevelFirst && level <= newest {
		return nil
	}
	return fmt.Errorf("%w: the cluster is at level %d, this program knows %d to %d", ErrLevel, level, LevelFirst, newest)
}

// RaiseFeatureLevel raises the level of a group to To: of meta if every node that votes, or may still, has registered with a program that knows it, and then, as an effect, of every shard. A
// level is never lowered.
type RaiseFeatureLevel struct{ To uint32 }

// FeatureLevel is the feature level of meta; the shards follow.
func (c *Cluster) FeatureLevel() uint32 { return c.level }

// Behind are the nodes that keep the cluster from a level: members, and who was one and may still vote, whose program does not know it, or that have not said what it knows.
func (c *Cluster) Behind(level uint32) (out []Node) {
	for _, id := range c.Members() {
		if _, ok := c.nodes[id]; !ok && level > LevelFirst {
			out = append(out, Node{ID: id})
		}
	}
	for _, n := range c.Registered() {
		if (n.Left || c.Member(n.ID)) && n.level() < level {
			out = append(out, n)
		}
	}
	return out
}

func (n *Node) level() uint32 { return max(n.Level, LevelFirst) }

// raiseLevel answers with the nodes that are behind, if there are any.
func (m *Meta) raiseLevel(c RaiseFeatureLevel) Result {
	if behind := m.c.Behind(c.To); len(behind) > 0 {
		return Result{Code: Invalid, Value: behind}
	}
	if c.To <= m.c.level {
		return Result{}
	}
	m.c.level = c.To
	for s := range m.outboxes {
		m.tellLevel(s)
	}
	return Result{}
}

// tellLevel puts the level into a shard's outbox: of a new one before all else.
func (m *Meta) tellLevel(s record.ShardID) {
	if m.c.level > LevelFirst {
		m.push(s, Effect{RaiseFeatureLevel: &RaiseFeatureLevel{m.c.level}})
	}
}

// FeatureLevel is the shard's.
func (s *Shard) FeatureLevel() uint32 { return s.level }
