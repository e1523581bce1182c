package sim

import (
	"bytes"
	"fmt"
	"slices"
	"time"

	"github.com/estran/estran/localstack/check"
	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/tiering/record"
)

// clockSlack is how far a clock that counts as right may be ahead.
const clockSlack = 10 * time.Second

// judgeStart asks whether everything below a log start had to go or might.
func (w *world) judgeStart(p *part, start record.Offset) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if start <= p.start {
		return
	}
	before := p.start
	p.start = start
	if p.topic.retentionBytes > 0 || start <= p.deleted {
		return
	}
	now := time.Now()
	for _, b := range slices.Backward(p.acked) { // the youngest says most
		if b.base < before || b.base >= start || b.base < p.deleted {
			continue
		}
		at := time.UnixMilli(int64(b.at))
		if p.topic.retention == 0 {
			w.failf("%s: offset %d is gone, its topic %s keeps records for ever", p.tp, b.base, p.topic.name)
			return
		}
		if age := now.Sub(at); age+clockSlack < p.topic.retention {
			w.failf("%s: offset %d is gone after %s, its topic %s keeps records for %s", p.tp, b.base, age, p.topic.name, p.topic.retention)
			return
		}
	}
}

// audit looks at the manifests again and again: they are contiguous, and what they refer to is there.
func (w *world) audit() {
	rng := w.rng("audit", 0)
	for w.sleep(w.over, rng, w.o.Audit) {
		for _, p := range w.parts {
			shard, ok := w.shardOf(p.tp)
			if !ok {
				continue
			}
			if l := w.proven(shard, rng); l != nil {
				w.auditPart(l, p)
			}
		}
	}
}

func (w *world) auditPart(l *life, p *part) (keys []string) {
	b, _ := l.Bounds(p.tp)
	w.judgeStart(p, b.LogStart)
	var runs []check.Run
	for _, r := range l.Runs(p.tp, 0, 1<<30) {
		key := r.Object.Key()
		if keys = append(keys, key); r.Run.EndOffset < b.LogStart {
			continue // trimmed between the two looks
		}
		if err := w.store.refer(key); err != nil {
			w.failf("object %s of %s: %v", key, p.tp, err)
		}
		runs = append(runs, check.Run{Key: p.key, First: int64(r.Run.StartOffset), Last: int64(r.Run.EndOffset), Object: key})
	}
	for _, a := range check.Scrub(runs, keys, nil) {
		w.failf("%s: %s: %s", p.tp, a.Rule, a.Text)
	}
	return keys
}

// await lets time pass until cond holds, and says what for if it does not within limit.
func (w *world) await(limit time.Duration, cond func() (why string)) {
	why := ""
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(10 * time.Second) {
		if why = cond(); why == "" {
			return
		}
	}
	w.failf("within %s after the last fault: %s", limit, why)
}

// leaders are the proven leaders of all partitions' shards; nil while one has none.
func (w *world) leaders() map[*part]*life {
	rng, out := w.rng("leaders", uint64(time.Now().UnixNano())), map[*part]*life{}
	for _, p := range w.parts {
		shard, ok := w.shardOf(p.tp)
		if !ok {
			return nil
		}
		if out[p] = w.proven(shard, rng); out[p] == nil {
			return nil
		}
	}
	return out
}

// settled is what must come to pass when everything is well again and nothing is written any more: all is sealed, what has expired is gone, and the bucket holds what manifests refer to
// and nothing else.
func (w *world) settled() (why string) {
	leaders := w.leaders()
	if leaders == nil {
		return "not every shard has a leader"
	}
	var referred []string
	for p, l := range leaders {
		b, _ := l.Bounds(p.tp)
		if b.SealedEnd != b.HighWatermark {
			return fmt.Sprintf("%s: sealed up to %d of %d", p.tp, b.SealedEnd, b.HighWatermark)
		}
		if p.topic.retention > 0 && b.LogStart != b.HighWatermark {
			return fmt.Sprintf("%s: offsets %d to %d have not expired, its topic %s keeps records for %s", p.tp, b.LogStart, b.HighWatermark, p.topic.name, p.topic.retention)
		}
		keys := w.auditPart(l, p)
		if size, first := int64(0), int64(0); p.topic.retentionBytes > 0 {
			for i, r := range l.Runs(p.tp, 0, 1<<30) {
				if size += r.Run.SizeBytes; i == 0 {
					first = r.Run.SizeBytes
				}
			}
			if size-first >= p.topic.retentionBytes {
				return fmt.Sprintf("%s: %d bytes are kept, without the first run %d, its topic %s keeps %d", p.tp, size, size-first, p.topic.name, p.topic.retentionBytes)
			}
		}
		referred = append(referred, keys...)
	}
	slices.Sort(referred)
	there, _ := w.store.keys()
	for _, k := range there {
		if _, ok := slices.BinarySearch(referred, k); !ok {
			return fmt.Sprintf("object %s is there and no manifest refers to it", k)
		}
	}
	return ""
}

// readAll reads every partition on every node from the log start to the end.
func (w *world) readAll() {
	for _, n := range w.nodes {
		l := n.live.Load()
		for _, p := range w.parts {
			b, _ := l.Bounds(p.tp)
			for next, high := b.LogStart, b.HighWatermark; ; {
				at, more, err := w.pollAt(l, 200+n.id, p, next, w.at())
				if err == nil && !more && at == high {
					break
				}
				if err != nil || at <= next {
					w.failf("node %d: %s at offset %d of %d: next %d, %v", n.id, p.tp, next, high, at, err)
					break
				}
				next = at
			}
		}
	}
}

// sameStates compares what the voters have applied.
func (w *world) sameStates() (why string) {
	var first map[string][]byte
	for _, n := range w.nodes {
		states := map[string][]byte{}
		for _, b := range n.live.Load().Backups() {
			states[b.Group] = stateBytes(w, b)
		}
		if first == nil {
			first = states
			continue
		}
		for group, s := range states {
			if !bytes.Equal(s, first[group]) {
				return fmt.Sprintf("the state of %s on node %d differs from node 1's:\n%s\n%s", group, n.id, s, first[group])
			}
		}
	}
	return ""
}

func stateBytes(w *world, b raftmeta.Backup) []byte {
	var out bytes.Buffer
	if _, err := b.Write(&out); err != nil {
		w.failf("the state of %s: %v", b.Group, err)
	}
	return out.Bytes()
}

// judge asks the rules of localstack/check about all that clients saw.
func (w *world) judge() {
	r := check.Check(w.history, check.Options{Final: true})
	for _, a := range r.Anomalies {
		w.failf("%s: %s", a.Rule, a.Text)
	}
	w.t.Logf("%d records acknowledged, %d observed, %d objects deleted", r.Acked, r.Observed, w.store.deleted)
	if r.Acked == 0 {
		w.failf("nothing was acknowledged")
	}
}
