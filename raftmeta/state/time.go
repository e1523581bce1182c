package state

import (
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// The replicated clock stands while the leader trusts none: entries then have no time. What such an entry stamps gets the time at which the clock stopped, which may be days ago; it would
// expire as soon as the clock goes on: an object before its grace, a producer that wrote a moment ago, a group's offsets. So whatever was stamped with that time gets the one at
// which the clock goes on: from LevelStood on.

// now is the time for a stamp.
func (s *Shard) now() record.Timestamp {
	s.stood = s.stood || s.untimed && s.level >= LevelStood
	return s.clock
}

// resume is told the first time after the clock stood.
func (s *Shard) resume(t record.Timestamp) {
	was := s.clock
	stood := s.stood
	s.stood = false
	if !stood || t <= was {
		return
	}
	for _, o := range s.objects {
		if o.Since != was {
			continue
		}
		if o.Since = t; o.State == segment.Prepared {
			o.ExpiresAt += t - was
		}
	}
	for id, g := range s.groups {
		if g.EmptySince == was && was != 0 { // 0: it has members
			s.change(id).EmptySince = t
		}
	}
	for h := range uint64(len(s.parts)) {
		p := s.parts[h]
		if p == nil {
			continue
		}
		for id, pr := range p.Producers {
			if pr.At == was {
				s.own(h+1).restamp(id, t, s.gen)
			}
		}
	}
}

// restamp changes when a producer was last heard of.
func (p *partition) restamp(id record.ProducerID, t record.Timestamp, gen uint64) {
	pr := p.Producers[id].own(gen)
	pr.At = t
	p.Producers[id] = pr
}
