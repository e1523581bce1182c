package state

import (
	"cmp"
	"slices"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// object returns an object for changing. Objects are copied when a snapshot is taken, so they are changed in place.
func (s *Shard) object(n segment.Number) *segment.Object { return s.objects[n] }

func (s *Shard) sortedObjects() []*segment.Object {
	out := make([]*segment.Object, 0, len(s.objects))
	for _, o := range s.objects {
		out = append(out, o)
	}
	slices.SortFunc(out, func(a, b *segment.Object) int { return cmp.Compare(a.Number, b.Number) })
	return out
}

func (s *Shard) applyPrepare(c Prepare) Result {
	if n, ok := s.byUUID[c.Plan.UUID]; ok {
		return Result{Value: *s.objects[n]}
	}
	if !c.Plan.Class.Valid() {
		return Result{Code: Invalid}
	}
	s.number++
	o := &segment.Object{Shard: s.id, Number: s.number, Plan: c.Plan, Term: uint64(c.Term), State: segment.Prepared, Since: s.now(),
		ExpiresAt: s.now() + record.Timestamp(c.TTLMs)}
	s.objects[o.Number] = o
	s.byUUID[c.Plan.UUID] = o.Number
	return Result{Value: *o}
}

// applyCommit judges each run for itself: accepted if it begins at or below the sealed end and reaches it; trimming moves its first offset.
func (s *Shard) applyCommit(c Commit, a *Applied) Result {
	verdicts := make([]Verdict, len(c.Runs))
	o := s.objects[c.Number]
	if o == nil || o.State != segment.Prepared {
		if o != nil && o.State == segment.Committed && o.CRC32C == c.CRC32C {
			for i, r := range c.Runs { // repeated: what was accepted is still there
				if p := s.find(r.TP); p != nil && slices.ContainsFunc(p.Runs, func(x segment.Run) bool { return x.Object == c.Number }) {
					verdicts[i] = Accepted
				}
			}
			return Result{Value: verdicts}
		}
		return Result{Code: Stale, Value: verdicts}
	}
	delete(s.byUUID, o.Plan.UUID)
	o.Size, o.CRC32C, o.FooterLen, o.UploadedAt, o.Since = c.Size, c.CRC32C, c.FooterLen, c.UploadedAt, s.now()
	for i, r := range c.Runs {
		h, ok := s.byTP[r.TP]
		if !ok {
			continue
		}
		p := s.own(h)
		run := r.Run
		run.Object = c.Number
		if !planted.On(planted.CommitUnchecked) && (run.StartOffset > p.SealedEnd || run.EndOffset < p.SealedEnd || run.EndOffset >= p.High || run.EndOffset < p.LogStart) {
			continue
		}
		verdicts[i] = Accepted
		if run.StartOffset < p.SealedEnd {
			run.StartOffset, verdicts[i] = p.SealedEnd, Trimmed
		}
		p.Runs = append(p.Runs, run)
		p.SealedEnd = run.EndOffset + 1
		p.RunBytes += run.SizeBytes
		s.runBytes += run.SizeBytes
		o.LiveRuns++
		s.dropHot(p, p.hotBelow(p.SealedEnd), a)
		s.dirty = append(s.dirty, p.TP)
		p.check()
	}
	s.trimEntries()
	o.State = segment.Committed
	if o.LiveRuns == 0 {
		o.State = segment.Tombstoned
	}
	return Result{Value: verdicts}
}

func (s *Shard) applyForget(c Forget) Result {
	for _, n := range c.Numbers {
		if o := s.objects[n]; o != nil && o.State == segment.Tombstoned {
			delete(s.objects, n)
		}
	}
	return Result{}
}
