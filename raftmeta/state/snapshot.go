package state

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

const (
	metaMagic  = "ESTRNMET"
	shardMagic = "ESTRNSHD"
)

// ErrSnapshot: the bytes are no snapshot.
var ErrSnapshot = errors.New("state: malformed snapshot")

// shardSnapshot is the format of a shard's snapshot. A field that is added belongs to a feature level, and stays empty below it.
type shardSnapshot struct {
	level   uint32
	ID      record.ShardID
	Applied RaftIndex
	Clock   record.Timestamp
	Leader  LeaderStart
	Chain   [16]byte
	Cursor  uint64
	Handles uint64
	Number  segment.Number
	Voids   uint64
	// Stood: something was given the clock's time by an entry that had none. From LevelStood on.
	Stood   bool `json:",omitempty"`
	EntBase uint32
	// Released are the slots that the shard has let go, a bit each; nil = none.
	Released []byte `json:",omitempty"`
	Entries  []entryRef
	Parts    []partitionSnapshot
	Objects  []segment.Object
	Groups   []Group
}

type partitionSnapshot struct {
	TP        record.TopicPartition
	Handle    uint64
	Config    PartitionConfig
	EpochBase record.LeaderEpoch
	Epochs    []segment.EpochStart
	LogStart  record.Offset
	SealedEnd record.Offset
	High      record.Offset
	MaxTime   record.Timestamp
	Runs      []segment.Run
	Hot       []hotRef
	Producers []producerSnapshot
}

type producerSnapshot struct {
	ID record.ProducerID
	producer
}

// Frozen is a shard's state at one moment. It can be written while the shard goes on.
type Frozen struct {
	head    shardSnapshot
	parts   []*partition
	objects []segment.Object
	groups  map[string]*Group
}

// Freeze takes the state as it is: pointer work in the number of partitions and objects. Later changes copy what they touch.
func (s *Shard) Freeze() Frozen {
	s.gen++
	f := Frozen{parts: slices.Clone(s.parts), groups: maps.Clone(s.groups)}
	f.objects = make([]segment.Object, 0, len(s.objects))
	for _, o := range s.objects {
		f.objects = append(f.objects, *o)
	}
	f.head = shardSnapshot{ID: s.id, Applied: s.applied, Clock: s.clock, level: s.level, Leader: s.leader, Chain: s.chain, Cursor: s.cursor, Handles: s.handles,
		Number: s.number, Voids: s.voids, Stood: s.stood, EntBase: s.entBase, Released: s.released.bytes(), Entries: slices.Clip(s.entries)}
	return f
}

// Index is the index of the last command that the frozen state contains.
func (f *Frozen) Index() RaftIndex { return f.head.Applied }

// WriteTo writes the snapshot.
func (f *Frozen) WriteTo(w io.Writer) (int64, error) {
	h := f.head
	h.Parts = []partitionSnapshot{}
	for _, p := range f.parts {
		if p == nil {
			continue
		}
		ps := partitionSnapshot{TP: p.TP, Handle: p.Handle, Config: p.Config, EpochBase: p.EpochBase, Epochs: p.Epochs, LogStart: p.LogStart,
			SealedEnd: p.SealedEnd, High: p.High, MaxTime: p.MaxTime, Runs: p.Runs, Hot: p.Hot}
		for _, id := range slices.Sorted(maps.Keys(p.Producers)) {
			ps.Producers = append(ps.Producers, producerSnapshot{id, *p.Producers[id]})
		}
		h.Parts = append(h.Parts, ps)
	}
	slices.SortFunc(f.objects, func(a, b segment.Object) int { return int(int64(a.Number) - int64(b.Number)) })
	h.Objects = f.objects
	for _, id := range slices.Sorted(maps.Keys(f.groups)) {
		g := *f.groups[id]
		g.List = g.sorted()
		h.Groups = append(h.Groups, g)
	}
	return writeSnapshot(w, shardMagic, h.level, h)
}

func writeSnapshot(w io.Writer, magic string, level uint32, v any) (int64, error) {
	c := &counter{w: w}
	head := binary.BigEndian.AppendUint32([]byte(magic), level)
	if _, err := c.Write(head); err != nil {
		return c.n, err
	}
	if err := json.NewEncoder(c).Encode(v); err != nil { // one write of all
		return c.n, fmt.Errorf("state: writing a snapshot: %w", err)
	}
	return c.n, nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// readSnapshot reads a snapshot of a level that this program knows.
func readSnapshot(r io.Reader, magic string, v any) (level uint32, err error) {
	head := make([]byte, len(magic)+4)
	if _, err := io.ReadFull(r, head); err != nil || string(head[:len(magic)]) != magic {
		return 0, fmt.Errorf("%w: no %s header: %v", ErrSnapshot, magic, err)
	}
	level = binary.BigEndian.Uint32(head[len(magic):])
	if err := CheckLevel(level, LevelNewest); err != nil {
		return level, fmt.Errorf("state: snapshot: %w", err)
	}
	if err := json.NewDecoder(r).Decode(v); err != nil {
		return level, fmt.Errorf("%w: %v", ErrSnapshot, err)
	}
	return level, nil
}

// RestoreShard reads a snapshot that WriteTo wrote.
func RestoreShard(r io.Reader) (*Shard, error) {
	var h shardSnapshot
	level, err := readSnapshot(r, shardMagic, &h)
	if err != nil {
		return nil, err
	}
	s := NewShard(h.ID)
	s.applied, s.clock, s.level, s.leader, s.chain, s.cursor = h.Applied, h.Clock, level, h.Leader, h.Chain, h.Cursor
	s.handles, s.number, s.voids, s.entBase, s.entries = h.Handles, h.Number, h.Voids, h.EntBase, h.Entries
	s.stood = h.Stood
	copy(s.released[:], h.Released)
	s.live = make([]int32, len(h.Entries))
	if h.Handles > 1<<26 {
		return nil, fmt.Errorf("%w: %d handles", ErrSnapshot, h.Handles)
	}
	s.parts = make([]*partition, h.Handles)
	for _, ps := range h.Parts {
		if err := s.restorePartition(ps); err != nil {
			return nil, err
		}
	}
	for _, o := range h.Objects {
		s.objects[o.Number] = &o
		if o.State == segment.Prepared {
			s.byUUID[o.Plan.UUID] = o.Number
		}
	}
	for _, g := range h.Groups {
		g.Offsets = make(map[record.TopicPartition]OffsetCommit, len(g.List))
		for _, o := range g.List {
			g.Offsets[o.TP] = o
		}
		g.List = nil
		s.groups[g.ID] = &g
	}
	return s, nil
}

func (s *Shard) restorePartition(ps partitionSnapshot) error {
	if ps.Handle == 0 || ps.Handle > s.handles || s.parts[ps.Handle-1] != nil {
		return fmt.Errorf("%w: partition with handle %d", ErrSnapshot, ps.Handle)
	}
	p := &partition{TP: ps.TP, Handle: ps.Handle, Config: ps.Config, EpochBase: ps.EpochBase, Epochs: ps.Epochs, LogStart: ps.LogStart, SealedEnd: ps.SealedEnd,
		High: ps.High, MaxTime: ps.MaxTime, Runs: ps.Runs, Hot: ps.Hot, gen: s.gen}
	if len(ps.Producers) > 0 {
		p.Producers = make(map[record.ProducerID]*producer, len(ps.Producers))
	}
	for _, pr := range ps.Producers {
		c := pr.producer
		c.gen = s.gen
		if len(c.Batches) == 0 {
			return fmt.Errorf("%w: producer %d without batches", ErrSnapshot, pr.ID)
		}
		p.Producers[pr.ID] = &c
		s.producers++
	}
	for _, r := range p.Hot {
		i := int(r.Entry - s.entBase)
		if i < 0 || i >= len(s.live) {
			return fmt.Errorf("%w: ref to entry %d", ErrSnapshot, r.Entry)
		}
		s.live[i]++
		p.HotBytes += int64(r.Bytes)
	}
	for _, r := range p.Runs {
		p.RunBytes += r.SizeBytes
	}
	s.hotBytes += p.HotBytes
	s.runBytes += p.RunBytes
	s.parts[ps.Handle-1] = p
	s.byTP[p.TP] = p.Handle
	return nil
}
