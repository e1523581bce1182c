package check

import "fmt"

// Run is one entry of a partition's manifest: the offsets First to Last of Object.
type Run struct {
	Key         int32
	First, Last int64
	Object      string
}

// Scrub judges manifests, each partition's runs in order, against the objects that exist. old are objects older than the grace: what nothing refers to should be gone.
func Scrub(runs []Run, exist, old []string) (out []Anomaly) {
	next, referred, exists := map[int32]int64{}, map[string]bool{}, map[string]bool{}
	for _, o := range exist {
		exists[o] = true
	}
	for _, r := range runs {
		if end, ok := next[r.Key]; ok && r.First != end || r.Last < r.First {
			out = append(out, Anomaly{"manifest", fmt.Sprintf("a run of %d to %d follows %d", r.First, r.Last, end-1), r.Key})
		}
		if next[r.Key] = r.Last + 1; !exists[r.Object] && !referred[r.Object] {
			out = append(out, Anomaly{"missing-object", r.Object, r.Key})
		}
		referred[r.Object] = true
	}
	for _, o := range old {
		if !referred[o] {
			out = append(out, Anomaly{"zombie-object", o, -1})
		}
	}
	return out
}
