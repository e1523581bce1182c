package state

import (
	"cmp"
	"maps"
	"slices"

	"github.com/estran/estran/tiering/record"
)

// Group is a consumer group's durable state. It is never changed in place: readers may keep it.
type Group struct {
	ID           string
	ProtocolType string
	Record       []byte `json:",omitempty"` // the coordinator's
	// EmptySince is the shard's clock when the group became empty; 0 while it has members.
	EmptySince record.Timestamp
	Offsets    map[record.TopicPartition]OffsetCommit `json:"-"`
	List       []OffsetCommit                         `json:"Offsets,omitempty"` // of a snapshot: Offsets in order
}

func (g *Group) sorted() []OffsetCommit {
	out := slices.Collect(maps.Values(g.Offsets))
	slices.SortFunc(out, func(a, b OffsetCommit) int { return compareTP(a.TP, b.TP) })
	return out
}

func compareTP(a, b record.TopicPartition) int {
	if c := slices.Compare(a.Topic[:], b.Topic[:]); c != 0 {
		return c
	}
	return cmp.Compare(a.Partition, b.Partition)
}

// change returns a copy of the group for changing; a new empty one if there is none.
func (s *Shard) change(id string) *Group {
	g := &Group{ID: id, EmptySince: s.now(), Offsets: map[record.TopicPartition]OffsetCommit{}}
	if old := s.groups[id]; old != nil {
		*g = *old
		g.Offsets = maps.Clone(old.Offsets)
	}
	s.groups[id] = g
	return g
}

func (s *Shard) applyPutGroup(c PutGroup) Result {
	g := s.change(c.ID)
	g.ProtocolType, g.Record = c.ProtocolType, c.Record
	switch {
	case !c.Empty:
		g.EmptySince = 0
	case g.EmptySince == 0:
		g.EmptySince = s.now()
	}
	return Result{}
}

func (s *Shard) applyCommitOffsets(c CommitOffsets) Result {
	g := s.change(c.Group)
	for _, o := range c.Offsets {
		g.Offsets[o.TP] = o
	}
	if g.EmptySince != 0 {
		g.EmptySince = s.now() // a commit from outside a group restarts its time
	}
	return Result{}
}

func (s *Shard) applyDeleteGroup(c DeleteGroup) Result {
	if s.groups[c.ID] == nil {
		return Result{Code: NotFound}
	}
	delete(s.groups, c.ID)
	return Result{}
}

func (s *Shard) applyDeleteOffsets(c DeleteOffsets) Result {
	if s.groups[c.Group] == nil {
		return Result{Code: NotFound}
	}
	g := s.change(c.Group)
	for _, tp := range c.TPs {
		delete(g.Offsets, tp)
	}
	return Result{}
}

func (s *Shard) dropTopicOffsets(id record.TopicID) {
	for name, g := range s.groups {
		for tp := range g.Offsets {
			if tp.Topic == id {
				g = s.change(name)
				maps.DeleteFunc(g.Offsets, func(tp record.TopicPartition, _ OffsetCommit) bool { return tp.Topic == id })
				break
			}
		}
	}
}

func (s *Shard) expireOffsets(before record.Timestamp) {
	for name, g := range s.groups {
		if g.EmptySince != 0 && g.EmptySince < before {
			delete(s.groups, name)
		}
	}
}
