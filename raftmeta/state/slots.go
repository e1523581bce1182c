package state

import (
	"hash/crc32"
	"maps"
	"slices"

	"github.com/estran/estran/tiering/record"
)

// Groups and transactional IDs are spread over slots, and meta says which shard has a slot. A slot that no group is in goes to a shard that was added: meta asks the shard that has it to
// let go (an effect), the shard does if the slot is empty when the effect is applied and takes no group of the slot from then on, its leader tells meta, and meta gives the slot to
// the new shard. A slot that is in use stays.

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// GroupSlot is the slot of a group or transactional ID.
func GroupSlot(id string) uint8 { return uint8(crc32.Checksum([]byte(id), castagnoli)) }

// slotMove is a slot that meta has asked a shard to let go.
type slotMove struct {
	To     record.ShardID
	Effect uint64 // its number in the outbox of the shard that has the slot
}

// slotSet is a set of slots.
type slotSet [GroupSlots / 8]byte

func (s *slotSet) has(slot uint8) bool { return s[slot/8]&(1<<(slot%8)) != 0 }
func (s *slotSet) add(slot uint8)      { s[slot/8] |= 1 << (slot % 8) }

func (s *slotSet) bytes() []byte {
	if *s == (slotSet{}) {
		return nil
	}
	return slices.Clone(s[:])
}

// ReleaseSlots asks a shard to let go of those of the slots that no group is in.
type ReleaseSlots struct{ Slots []int }

// SettleSlots tells meta which slots a shard has let go, and which it keeps.
type SettleSlots struct {
	Shard    record.ShardID
	Released []int `json:",omitempty"`
	Kept     []int `json:",omitempty"`
}

// Moving are the slots that a shard was asked to let go, with the number of the effect that asks it.
func (c *Cluster) Moving(s record.ShardID) map[uint8]uint64 {
	out := map[uint8]uint64{}
	for slot, m := range c.place.Moving {
		if c.slots[slot] == s {
			out[slot] = m.Effect
		}
	}
	return out
}

// moveSlots asks for so many slots for shards from `first` on that each would have its part, if all were unused: always one of the shard that has most, the last one.
func (m *Meta) moveSlots(first record.ShardID) {
	count := map[record.ShardID]int{}
	for _, s := range m.c.slots {
		count[s]++
	}
	moving := maps.Clone(m.c.place.Moving)
	if moving == nil {
		moving = map[uint8]slotMove{}
	}
	ask := map[record.ShardID][]int{}
	to := map[int]record.ShardID{}
	for s := first; uint32(s) <= m.c.Shards; s++ {
		for count[s] < GroupSlots/int(m.c.Shards) {
			slot := m.spareSlot(count, first, moving)
			if slot < 0 {
				break
			}
			from := m.c.slots[slot]
			count[from]--
			count[s]++
			moving[uint8(slot)] = slotMove{To: s}
			ask[from], to[slot] = append(ask[from], slot), s
		}
	}
	for from := record.ShardID(1); from < first; from++ {
		if len(ask[from]) == 0 {
			continue
		}
		m.push(from, Effect{ReleaseSlots: &ReleaseSlots{ask[from]}})
		for _, slot := range ask[from] {
			moving[uint8(slot)] = slotMove{to[slot], m.OutboxEnd(from)}
		}
	}
	m.c.place.Moving = moving
}

// spareSlot is the last slot, not on its way, of the shard below `first` that has most; -1 if there is none.
func (m *Meta) spareSlot(count map[record.ShardID]int, first record.ShardID, moving map[uint8]slotMove) int {
	most := record.ShardID(1)
	for s := record.ShardID(2); s < first; s++ {
		if count[s] > count[most] {
			most = s
		}
	}
	for slot := GroupSlots - 1; slot >= 0; slot-- {
		if _, busy := moving[uint8(slot)]; m.c.slots[slot] == most && !busy {
			return slot
		}
	}
	return -1
}

func (m *Meta) settleSlots(c SettleSlots) {
	moving := maps.Clone(m.c.place.Moving)
	settle := func(slots []int, released bool) {
		for _, slot := range slots {
			if slot < 0 || slot >= GroupSlots {
				continue
			}
			if to, ok := moving[uint8(slot)]; ok && m.c.slots[slot] == c.Shard {
				delete(moving, uint8(slot))
				if released {
					m.c.slots[slot] = to.To
				}
			}
		}
	}
	settle(c.Released, true)
	settle(c.Kept, false)
	m.c.place.Moving = moving
}

func (s *Shard) releaseSlots(c ReleaseSlots) {
	var used slotSet
	for id := range s.groups {
		used.add(GroupSlot(id))
	}
	for _, slot := range c.Slots {
		if slot >= 0 && slot < GroupSlots && !used.has(uint8(slot)) {
			s.released.add(uint8(slot))
		}
	}
}

// Released reports whether the shard has let go of a slot: its groups are no longer the shard's.
func (s *Shard) Released(slot uint8) bool { return s.released.has(slot) }
