package state

import (
	"fmt"
	"maps"
	"slices"
	"sort"

	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// producerWindow is how many batches of a producer are remembered to recognise repeats (KIP-98).
const producerWindow = 5

// seenBatch is a remembered batch.
type seenBatch struct {
	First, Last record.Sequence
	Base        record.Offset
}

// producer is what a partition knows of an idempotent producer.
type producer struct {
	Epoch   record.ProducerEpoch
	At      record.Timestamp // shard clock at the last batch
	Batches []seenBatch      // oldest first, at most producerWindow
	gen     uint64
}

// hotRef locates consecutive accepted batches of a partition in one raft entry.
type hotRef struct {
	Base  record.Offset
	Entry uint32 // number in the entry table
	First uint16 // slot
	Count uint16
	Bytes uint32
}

// partition is the state of one partition. A frozen snapshot may share it: it is changed only through Shard.own.
type partition struct {
	TP        record.TopicPartition
	Handle    uint64
	Config    PartitionConfig
	EpochBase record.LeaderEpoch
	Epochs    []segment.EpochStart
	LogStart  record.Offset
	SealedEnd record.Offset // first offset that is not in the manifest
	High      record.Offset // high watermark = log end
	Runs      []segment.Run
	Hot       []hotRef
	Producers map[record.ProducerID]*producer
	HotBytes  int64
	RunBytes  int64
	MaxTime   record.Timestamp // largest record timestamp ever appended
	gen       uint64
}

// clone makes a copy that may be changed while a snapshot keeps the old one. Slices are only appended to or cut from the front, never
// changed in place, so they are shared.
func (p *partition) clone(gen uint64) *partition {
	c := *p
	c.Producers = maps.Clone(p.Producers)
	c.Hot = slices.Clip(p.Hot)
	c.Runs, c.Epochs = slices.Clip(p.Runs), slices.Clip(p.Epochs)
	c.gen = gen
	return &c
}

// checkSequence judges a batch of an idempotent producer.
func (p *partition) checkSequence(s *Slot) (Code, record.Offset) {
	pr := p.Producers[s.ProducerID]
	switch {
	case pr == nil: // unknown or expired: any sequence is accepted
		return OK, 0
	case s.ProducerEpoch < pr.Epoch:
		return InvalidProducerEpoch, 0
	case s.ProducerEpoch > pr.Epoch:
		if s.BaseSequence != 0 {
			return OutOfOrderSequence, 0
		}
		return OK, 0
	}
	last := s.BaseSequence.Add(s.LastOffsetDelta)
	for _, b := range pr.Batches {
		if b.First == s.BaseSequence && b.Last == last {
			return Duplicate, b.Base
		}
	}
	if n := len(pr.Batches); n > 0 && s.BaseSequence != pr.Batches[n-1].Last.Add(1) {
		return OutOfOrderSequence, 0
	}
	return OK, 0
}

// own returns the producer for changing: a copy, if a snapshot has this one.
func (pr *producer) own(gen uint64) *producer {
	if pr.gen == gen {
		return pr
	}
	c := *pr
	c.Batches = append(make([]seenBatch, 0, producerWindow), pr.Batches...)
	c.gen = gen
	return &c
}

// remember notes an accepted batch of a producer; it reports whether the producer is new.
func (p *partition) remember(s *Slot, base record.Offset, now record.Timestamp, gen uint64) (added bool) {
	pr := p.Producers[s.ProducerID]
	switch {
	case pr == nil:
		pr, added = &producer{Batches: make([]seenBatch, 0, producerWindow), gen: gen}, true
		if p.Producers == nil {
			p.Producers = map[record.ProducerID]*producer{}
		}
		p.Producers[s.ProducerID] = pr
	case pr.gen != gen:
		pr = pr.own(gen)
		p.Producers[s.ProducerID] = pr
	}
	if pr.Epoch != s.ProducerEpoch {
		pr.Epoch, pr.Batches = s.ProducerEpoch, pr.Batches[:0]
	}
	if len(pr.Batches) == producerWindow {
		copy(pr.Batches, pr.Batches[1:])
		pr.Batches = pr.Batches[:producerWindow-1]
	}
	pr.Batches = append(pr.Batches, seenBatch{s.BaseSequence, s.BaseSequence.Add(s.LastOffsetDelta), base})
	pr.At = now
	return added
}

// forgetOldest forgets the producer that has been idle for the longest, but for keep; it returns how many it forgot.
func (p *partition) forgetOldest(keep record.ProducerID) int {
	oldest, found := record.ProducerID(-1), false
	for id, pr := range p.Producers {
		if id == keep {
			continue
		}
		if o := p.Producers[oldest]; !found || pr.At < o.At || pr.At == o.At && id < oldest {
			oldest, found = id, true
		}
	}
	if !found {
		return 0
	}
	delete(p.Producers, oldest)
	return 1
}

// refAt returns the index of the ref that holds offset, or of the first behind it.
func (p *partition) refAt(offset record.Offset) int {
	i := sort.Search(len(p.Hot), func(i int) bool { return p.Hot[i].Base > offset })
	return max(0, i-1)
}

// refEnd is the offset behind ref i.
func (p *partition) refEnd(i int) record.Offset {
	if i+1 < len(p.Hot) {
		return p.Hot[i+1].Base
	}
	return p.High
}

// runAt returns the index of the first run that ends at or behind offset.
func (p *partition) runAt(offset record.Offset) int {
	return sort.Search(len(p.Runs), func(i int) bool { return p.Runs[i].EndOffset >= offset })
}

// epochAt returns the leader epoch in which the record at offset was appended.
func (p *partition) epochAt(offset record.Offset) record.LeaderEpoch {
	i := sort.Search(len(p.Epochs), func(i int) bool { return p.Epochs[i].Start > offset })
	if i == 0 {
		return p.EpochBase
	}
	return p.Epochs[i-1].Epoch
}

// epochEnd answers OffsetForLeaderEpoch: the largest epoch that is not above the asked one, and where it ends. Of an epoch from before the first that is
// known the records are gone: it ended where the log begins.
func (p *partition) epochEnd(asked record.LeaderEpoch) (record.LeaderEpoch, record.Offset) {
	i := sort.Search(len(p.Epochs), func(i int) bool { return p.Epochs[i].Epoch > asked })
	switch {
	case len(p.Epochs) == 0:
		return asked, p.High
	case i == 0:
		return asked, p.Epochs[0].Start
	case i == len(p.Epochs):
		return p.Epochs[i-1].Epoch, p.High
	}
	return p.Epochs[i-1].Epoch, p.Epochs[i].Start
}

// check asserts the chain of offsets and the contiguity of the manifest.
func (p *partition) check() {
	if p.LogStart < 0 || p.LogStart > p.SealedEnd && len(p.Runs) > 0 || p.SealedEnd > p.High || p.LogStart > p.High {
		panic(fmt.Sprintf("state: %s: log start %d, sealed end %d, high watermark %d", p.TP, p.LogStart, p.SealedEnd, p.High))
	}
	if n := len(p.Runs); n > 0 && (p.Runs[n-1].EndOffset+1 > p.SealedEnd || n > 1 && p.Runs[n-2].EndOffset+1 != p.Runs[n-1].StartOffset) {
		panic(fmt.Sprintf("state: %s: runs end at %d, sealed end %d", p.TP, p.Runs[n-1].EndOffset, p.SealedEnd))
	}
	if len(p.Hot) > 0 && p.refEnd(0) <= p.SealedEnd {
		panic(fmt.Sprintf("state: %s: first hot batches end at %d, sealed end %d", p.TP, p.refEnd(0), p.SealedEnd))
	}
}
