//go:build planted

package state

import "github.com/estran/estran/tiering/record"

// Due is what Apply would answer to the batches of an entry if nothing came before it and none were a duplicate: only planted mistakes believe it.
func (s *Shard) Due(data []byte) (out []AppendResult) {
	slots, err := DecodeSlots(data)
	if err != nil {
		return nil
	}
	next := map[uint64]record.Offset{}
	for i := range slots.Len() {
		slot := slots.At(i)
		if slot.Handle == 0 || slot.Handle > uint64(len(s.parts)) || s.parts[slot.Handle-1] == nil {
			out = append(out, AppendResult{Code: UnknownPartition, Base: -1, LogStart: -1})
			continue
		}
		p := s.parts[slot.Handle-1]
		base := max(next[slot.Handle], p.High)
		next[slot.Handle] = base + slot.Offsets()
		out = append(out, AppendResult{OK, base, p.LogStart})
	}
	return out
}
