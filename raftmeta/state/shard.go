package state

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// producersMax bounds the producers that a shard remembers; beyond it the longest idle ones of the partition that grows are forgotten.
const producersMax = 1 << 19

// entryRef is an entry of the table of entries that hot refs point into.
type entryRef struct {
	Index RaftIndex
	Term  Term
	At    record.Timestamp // shard clock when it was applied
}

// Shard is the state machine of a data group. Apply and Freeze must not run beside each other or beside readers.
type Shard struct {
	id        record.ShardID
	applied   RaftIndex
	clock     record.Timestamp
	level     uint32
	leader    LeaderStart
	chain     [16]byte
	cursor    uint64       // last effect of meta that was applied
	handles   uint64       // handles given out
	parts     []*partition // by handle-1; nil = dropped
	byTP      map[record.TopicPartition]uint64
	objects   map[segment.Number]*segment.Object
	byUUID    map[segment.UUID]segment.Number // prepared ones
	number    segment.Number
	groups    map[string]*Group
	released  slotSet    // slots whose groups are another shard's
	entries   []entryRef // number entryBase+i
	live      []int32    // refs per entry
	entBase   uint32
	hotBytes  int64
	runBytes  int64
	producers int
	voids     uint64
	stood     bool   // something was given the clock's time by an entry that had none
	untimed   bool   // the entry that is being applied has no time
	gen       uint64 // of copy-on-write; what has an older one is shared with a snapshot

	res   []AppendResult // scratch of Apply
	dirty []record.TopicPartition
}

// NewShard returns the empty state of shard id.
func NewShard(id record.ShardID) *Shard {
	return &Shard{id: id, byTP: map[record.TopicPartition]uint64{}, objects: map[segment.Number]*segment.Object{},
		byUUID: map[segment.UUID]segment.Number{}, groups: map[string]*Group{}, level: LevelFirst, gen: 1}
}

// DroppedRef is a hot ref that left the state by a Commit: its bytes stay readable locally while the entry does.
type DroppedRef struct {
	TP           record.TopicPartition
	Base, End    record.Offset // End exclusive
	Index        RaftIndex
	Term         Term
	First, Count int
	Epoch        record.LeaderEpoch
}

// Applied is what an entry did. Its slices are reused by the next Apply.
type Applied struct {
	// Appends has the outcome of every batch, in the order of the directory.
	Appends []AppendResult
	// Results has the outcome of the other commands, in their order.
	Results []Result
	// Dirty are the partitions whose high watermark, log start or sealed end moved.
	Dirty []record.TopicPartition
	// Dropped are hot refs that were sealed.
	Dropped []DroppedRef
	// Void: the entry was proposed in another term than it is stored under; it changed nothing.
	Void bool
}

// own returns the partition with this handle for changing; nil if there is none.
func (s *Shard) own(handle uint64) *partition {
	if handle == 0 || handle > uint64(len(s.parts)) {
		return nil
	}
	p := s.parts[handle-1]
	if p != nil && p.gen != s.gen {
		p = p.clone(s.gen)
		s.parts[handle-1] = p
	}
	return p
}

func (s *Shard) find(tp record.TopicPartition) *partition {
	if h, ok := s.byTP[tp]; ok {
		return s.parts[h-1]
	}
	return nil
}

// Apply applies the Data of a committed command. An entry whose term differs from the one that it was proposed in is void.
func (s *Shard) Apply(index RaftIndex, term Term, data []byte) Applied {
	if index <= s.applied {
		panic(fmt.Sprintf("state: entry %d after %d", index, s.applied))
	}
	s.applied = index
	s.chain = ChainHash(s.chain, index, term, data)
	h, rest, err := decodeHeader(data)
	if err != nil {
		panic(fmt.Sprintf("state: entry %d: %v", index, err))
	}
	if h.Term != term {
		s.voids++
		return Applied{Void: true}
	}
	if s.untimed = h.TimeMs == 0; !s.untimed {
		s.resume(h.TimeMs)
		s.clock = max(s.clock, h.TimeMs)
	}
	s.dirty = s.dirty[:0]
	var a Applied
	for len(rest) > 0 {
		kind, flags, body, next, err := nextSection(rest)
		if err != nil {
			panic(fmt.Sprintf("state: entry %d: %v", index, err))
		}
		s.section(index, term, kind, flags, body, &a)
		rest = next
	}
	a.Dirty = s.dirty
	return a
}

// ChainHash is the hash over all commands up to one, from that over those before it.
func ChainHash(prev [16]byte, index RaftIndex, term Term, data []byte) (out [16]byte) {
	var b [36]byte
	copy(b[:], prev[:])
	be := binary.BigEndian
	be.PutUint64(b[16:], uint64(index))
	be.PutUint64(b[24:], uint64(term))
	be.PutUint32(b[32:], record.CRC(data))
	sum := sha256.Sum256(b[:])
	copy(out[:], sum[:])
	return out
}

func (s *Shard) section(index RaftIndex, term Term, kind Kind, flags uint8, body []byte, a *Applied) {
	var r Result
	switch kind {
	case KindAppend:
		a.Appends = s.applyAppend(index, term, body)
		return
	case KindRehome:
		s.applyRehome(index, term, body)
		return
	case KindLeaderStart:
		s.leader = decode[LeaderStart](body)
	case KindMetaEffects:
		r = s.applyEffects(decode[MetaEffects](body))
	case KindPrepare:
		r = s.applyPrepare(decode[Prepare](body))
	case KindCommit:
		r = s.applyCommit(decode[Commit](body), a)
	case KindAdvanceLogStart:
		r = s.applyLogStart(decode[AdvanceLogStart](body))
	case KindSweep:
		r = s.applySweep(decode[Sweep](body))
	case KindForget:
		r = s.applyForget(decode[Forget](body))
	case KindPutGroup:
		if c := decode[PutGroup](body); s.Released(GroupSlot(c.ID)) {
			r.Code = Moved
		} else {
			r = s.applyPutGroup(c)
		}
	case KindCommitOffsets:
		if c := decode[CommitOffsets](body); s.Released(GroupSlot(c.Group)) {
			r.Code = Moved
		} else {
			r = s.applyCommitOffsets(c)
		}
	case KindDeleteGroup:
		r = s.applyDeleteGroup(decode[DeleteGroup](body))
	case KindDeleteOffsets:
		r = s.applyDeleteOffsets(decode[DeleteOffsets](body))
	default:
		if flags&flagIgnorable == 0 {
			panic(fmt.Sprintf("state: entry %d holds a command of kind %d, which this program does not know", index, kind))
		}
	}
	a.Results = append(a.Results, r)
}

func (s *Shard) applyAppend(index RaftIndex, term Term, body []byte) []AppendResult {
	slots, err := decodeSlots(KindAppend, body)
	if err != nil {
		panic(fmt.Sprintf("state: entry %d: %v", index, err))
	}
	n := slots.Len()
	if cap(s.res) < n {
		s.res = make([]AppendResult, n)
	}
	res := s.res[:n]
	entry := s.newEntry(index, term)
	var p *partition
	before := uint64(0)
	for i := range n {
		slot := slots.At(i)
		if slot.Handle != before {
			p, before = s.own(slot.Handle), slot.Handle
			if p != nil {
				s.dirty = append(s.dirty, p.TP)
			}
		}
		if p == nil {
			res[i] = AppendResult{Code: UnknownPartition, Base: -1, LogStart: -1}
			continue
		}
		res[i] = s.appendSlot(p, entry, i, &slot, term)
	}
	s.endEntry()
	return res
}

// newEntry adds an entry to the table; endEntry takes it away again if nothing refers to it.
func (s *Shard) newEntry(index RaftIndex, term Term) uint32 {
	if len(s.entries) == 0 {
		s.entBase++ // numbers are not reused while anything may remember one
	}
	s.entries = append(s.entries, entryRef{index, term, s.clock})
	s.live = append(s.live, 0)
	return s.entBase + uint32(len(s.entries)) - 1
}

func (s *Shard) endEntry() {
	if n := len(s.live); s.live[n-1] == 0 {
		s.entries, s.live = s.entries[:n-1:n-1], s.live[:n-1]
	}
	s.trimEntries()
}

// trimEntries drops entries from the front that no ref needs.
func (s *Shard) trimEntries() {
	k := 0
	for k < len(s.live) && s.live[k] == 0 {
		k++
	}
	s.entries, s.live = s.entries[k:], s.live[k:]
	s.entBase += uint32(k)
}

func (s *Shard) appendSlot(p *partition, entry uint32, i int, slot *Slot, term Term) AppendResult {
	if slot.ProducerID >= 0 && !planted.On(planted.DedupOff) {
		if code, base := p.checkSequence(slot); code != OK {
			if code != Duplicate {
				base = -1
			}
			return AppendResult{code, base, p.LogStart}
		}
	}
	base := p.High
	if epoch := Epoch(p.EpochBase, term); len(p.Epochs) == 0 || p.Epochs[len(p.Epochs)-1].Epoch != epoch {
		p.Epochs = append(p.Epochs, segment.EpochStart{Epoch: epoch, Start: base})
	}
	if slot.ProducerID >= 0 && p.remember(slot, base, s.now(), s.gen) {
		if s.producers++; s.producers > producersMax {
			s.producers -= p.forgetOldest(slot.ProducerID)
		}
	}
	p.High += slot.Offsets()
	p.MaxTime = max(p.MaxTime, slot.MaxTimestamp)
	p.HotBytes += int64(slot.Len)
	s.hotBytes += int64(slot.Len)
	if n := len(p.Hot); n > 0 && p.Hot[n-1].Entry == entry && int(p.Hot[n-1].First)+int(p.Hot[n-1].Count) == i && p.Hot[n-1].Count < math.MaxUint16 {
		last := p.Hot[n-1] // the ref was made in this entry, so no snapshot has it
		last.Count++
		last.Bytes += slot.Len
		p.Hot[n-1] = last
	} else {
		p.Hot = append(p.Hot, hotRef{base, entry, uint16(i), 1, slot.Len})
		s.live[entry-s.entBase]++
	}
	return AppendResult{OK, base, p.LogStart}
}

// Epoch is a partition's leader epoch in a term of its shard. The sum is checked: it must never go back.
func Epoch(base record.LeaderEpoch, term Term) record.LeaderEpoch {
	e := int64(base) + int64(term)
	if term > math.MaxInt32 || e > math.MaxInt32 {
		panic(fmt.Sprintf("state: leader epoch %d + term %d is above 2^31-1", base, term))
	}
	return record.LeaderEpoch(e)
}

// applyRehome moves hot refs to this entry, which carries the same batches again. A ref that has changed meanwhile stays.
func (s *Shard) applyRehome(index RaftIndex, term Term, body []byte) {
	slots, err := decodeSlots(KindRehome, body)
	if err != nil {
		panic(fmt.Sprintf("state: entry %d: %v", index, err))
	}
	entry := s.newEntry(index, term)
	for i := 0; i < slots.Len(); {
		slot := slots.At(i)
		p := s.own(slot.Handle)
		n := 1
		if p != nil {
			k := p.refAt(slots.base(i))
			if k < len(p.Hot) && p.Hot[k].Base == slots.base(i) {
				n = s.rehomeRef(p, k, slots, i, entry)
			}
		}
		i += n
	}
	s.endEntry()
}

// rehomeRef moves ref k of p if the slots from i on are exactly its batches; it returns how many slots were looked at.
func (s *Shard) rehomeRef(p *partition, k int, slots Slots, i int, entry uint32) int {
	ref := p.Hot[k]
	next, bytes := ref.Base, uint32(0)
	for j := range int(ref.Count) {
		if i+j >= slots.Len() {
			return max(j, 1)
		}
		slot := slots.At(i + j)
		if slot.Handle != p.Handle || slots.base(i+j) != next {
			return max(j, 1)
		}
		next += slot.Offsets()
		bytes += slot.Len
	}
	if next == p.refEnd(k) && bytes == ref.Bytes {
		hot := append(p.Hot[:k:k], hotRef{ref.Base, entry, uint16(i), ref.Count, ref.Bytes})
		p.Hot = append(hot, p.Hot[k+1:]...)
		s.live[ref.Entry-s.entBase]--
		s.live[entry-s.entBase]++
	}
	return int(ref.Count)
}

func (s *Shard) applyEffects(c MetaEffects) Result {
	if c.From != s.cursor+1 || c.To != c.From+uint64(len(c.Effects))-1 {
		return Result{Code: Stale, Value: s.cursor}
	}
	for i, e := range c.Effects {
		if planted.On(planted.LostOutboxEntry) && i > 0 && i == len(c.Effects)-1 {
			continue
		}
		switch {
		case e.EnsurePartition != nil:
			s.ensure(*e.EnsurePartition)
		case e.DropTopic != nil:
			s.dropTopic(e.DropTopic.Topic)
		case e.ReleaseSlots != nil:
			s.releaseSlots(*e.ReleaseSlots)
		case e.RaiseFeatureLevel != nil:
			s.level = max(s.level, e.RaiseFeatureLevel.To)
		case e.SetConfig != nil:
			for tp, h := range s.byTP {
				if tp.Topic == e.SetConfig.Topic {
					s.own(h).Config = e.SetConfig.Config
				}
			}
		}
	}
	s.cursor = c.To
	return Result{Value: s.cursor}
}

func (s *Shard) ensure(e EnsurePartition) {
	if s.find(e.TP) != nil {
		return
	}
	s.handles++
	s.parts = append(s.parts, &partition{TP: e.TP, Handle: s.handles, Config: e.Config, EpochBase: e.EpochBase, MaxTime: -1, gen: s.gen})
	s.byTP[e.TP] = s.handles
}

func (s *Shard) dropTopic(id record.TopicID) {
	for tp, h := range s.byTP {
		if tp.Topic != id {
			continue
		}
		p := s.own(h)
		s.dropRuns(p, len(p.Runs))
		s.dropHot(p, len(p.Hot), nil)
		s.producers -= len(p.Producers)
		s.parts[h-1] = nil
		delete(s.byTP, tp)
		s.dirty = append(s.dirty, tp)
	}
	s.trimEntries()
	s.dropTopicOffsets(id)
}

// dropHot drops the first n hot refs of p.
func (s *Shard) dropHot(p *partition, n int, a *Applied) {
	for i, r := range p.Hot[:n] {
		e := s.entries[r.Entry-s.entBase]
		if a != nil {
			a.Dropped = append(a.Dropped, DroppedRef{p.TP, r.Base, p.refEnd(i), e.Index, e.Term, int(r.First), int(r.Count), p.epochAt(r.Base)})
		}
		s.live[r.Entry-s.entBase]--
		p.HotBytes -= int64(r.Bytes)
		s.hotBytes -= int64(r.Bytes)
	}
	p.Hot = p.Hot[n:]
}

// dropRuns drops the first n runs of p; an object that nothing refers to any more is tombstoned.
func (s *Shard) dropRuns(p *partition, n int) {
	for _, r := range p.Runs[:n] {
		p.RunBytes -= r.SizeBytes
		s.runBytes -= r.SizeBytes
		o := s.object(r.Object)
		if o.LiveRuns--; o.LiveRuns == 0 {
			o.State, o.Since = segment.Tombstoned, s.now()
		}
	}
	p.Runs = p.Runs[n:]
}

// hotBelow counts the refs of p that end at or below offset.
func (p *partition) hotBelow(offset record.Offset) int {
	n := 0
	for n < len(p.Hot) && p.refEnd(n) <= offset {
		n++
	}
	return n
}

func (s *Shard) applyLogStart(c AdvanceLogStart) Result {
	h, ok := s.byTP[c.TP]
	if !ok {
		return Result{Code: UnknownPartition}
	}
	p := s.own(h)
	to := c.To
	if to < 0 {
		to = p.High
	}
	if to > p.High {
		return Result{Code: OffsetOutOfRange, Value: p.LogStart}
	}
	if to > p.LogStart {
		p.LogStart, p.SealedEnd = to, max(p.SealedEnd, to)
		s.dropRuns(p, p.runAt(to))
		s.dropHot(p, p.hotBelow(p.SealedEnd), nil)
		s.trimEntries()
		s.dirty = append(s.dirty, p.TP)
		p.check()
	}
	return Result{Value: p.LogStart}
}

func (s *Shard) applySweep(c Sweep) Result {
	for _, o := range s.sortedObjects() {
		if o.State == segment.Prepared && o.ExpiresAt <= s.clock {
			own := s.object(o.Number)
			own.State, own.Since = segment.Tombstoned, s.now()
			delete(s.byUUID, own.Plan.UUID)
		}
	}
	if c.ProducerMs > 0 {
		s.expireProducers(s.clock - record.Timestamp(c.ProducerMs))
	}
	if c.OffsetsMs > 0 {
		s.expireOffsets(s.clock - record.Timestamp(c.OffsetsMs))
	}
	return Result{}
}

// SweepDue reports whether a Sweep at time now would change anything: be it that the clock goes on, where nothing else is written.
func (s *Shard) SweepDue(now record.Timestamp, producerMs, offsetsMs int64) bool {
	if s.stood {
		return true
	}
	for _, n := range s.byUUID {
		if s.objects[n].ExpiresAt <= now {
			return true
		}
	}
	for _, g := range s.groups {
		if offsetsMs > 0 && g.EmptySince != 0 && g.EmptySince < now-record.Timestamp(offsetsMs) {
			return true
		}
	}
	for _, p := range s.parts {
		if p == nil {
			continue
		}
		for _, pr := range p.Producers {
			if pr.At < now-record.Timestamp(producerMs) {
				return true
			}
		}
	}
	return false
}

func (s *Shard) expireProducers(before record.Timestamp) {
	for h := range uint64(len(s.parts)) {
		p := s.parts[h]
		if p == nil {
			continue
		}
		for id, pr := range p.Producers {
			if pr.At < before {
				delete(s.own(h+1).Producers, id)
				s.producers--
			}
		}
	}
}
