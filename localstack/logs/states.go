package logs

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/estran/estran/localstack/check"
	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
)

// States replays what the directories of stopped voters hold of each group, up to the index that is committed (by the group's directory): all come to the same state, each partition's manifest has no gap, and
// what it refers to is in the store as the state says (objects: by key, below the cluster's prefix). The first directory's manifests stand for all: if states differ that is an anomaly already.
func States(dirs []string, committed map[string]uint64, objects map[string][]byte) (found []check.Anomaly, err error) {
	for group, index := range committed {
		id := record.ShardID(groupOfDir(group))
		var first []byte
		for _, dir := range dirs {
			written, shard, err := replay(dir, id, index)
			if err != nil {
				return found, fmt.Errorf("state of %s in %s: %w", group, dir, err)
			}
			switch {
			case first == nil && shard != nil:
				found = append(found, judgeManifests(shard, objects)...)
				first = written
			case first == nil:
				first = written
			case !bytes.Equal(first, written):
				found = append(found, check.Anomaly{Rule: "states-differ", Key: -1, Text: fmt.Sprintf("%s at %d in %s and in %s: %s", group, index, dirs[0], dir, difference(first, written))})
			}
		}
	}
	return found, nil
}

// replay is a group's state at an index as it is written in a snapshot, and the shard, if it is one.
func replay(dir string, id record.ShardID, index uint64) (written []byte, s *state.Shard, err error) {
	var b bytes.Buffer
	var frozen io.WriterTo
	if id == 0 {
		m, err := raftmeta.ReplayMeta(dir, index)
		if err != nil {
			return nil, nil, err
		}
		f := m.Freeze()
		frozen = &f
	} else {
		if s, err = raftmeta.ReplayShard(dir, id, index); err != nil {
			return nil, nil, err
		}
		f := s.Freeze()
		frozen = &f
	}
	_, err = frozen.WriteTo(&b)
	return b.Bytes(), s, err
}

// difference shows where two states begin to differ.
func difference(a, b []byte) string {
	at := 0
	for at < min(len(a), len(b)) && a[at] == b[at] {
		at++
	}
	around := func(s []byte) []byte { return s[max(0, at-100):min(len(s), at+100)] }
	return fmt.Sprintf("%q and %q", around(a), around(b))
}

// judgeManifests looks at a shard's partitions and at the objects that hold them.
func judgeManifests(s *state.Shard, objects map[string][]byte) (found []check.Anomaly) {
	var runs []check.Run
	seen := map[segment.Number]bool{}
	key := int32(0)
	for p := range s.Partitions() {
		bad := func(rule, text string, args ...any) {
			found = append(found, check.Anomaly{Rule: rule, Key: -1, Text: fmt.Sprintf("%v: ", p.TP) + fmt.Sprintf(text, args...)})
		}
		manifest := s.Runs(p.TP, 0, 1<<30, nil)
		if n := len(manifest); n > 0 && (manifest[0].StartOffset > p.LogStart || manifest[n-1].EndOffset+1 != p.SealedEnd) {
			bad("manifest", "runs of %d to %d, the log starts at %d and is sealed below %d", manifest[0].StartOffset, manifest[n-1].EndOffset, p.LogStart, p.SealedEnd)
		}
		for _, r := range manifest {
			o, ok := s.Object(r.Object)
			if !ok {
				bad("manifest", "offsets %d to %d are in object %d, which is not in the table", r.StartOffset, r.EndOffset, r.Object)
				continue
			}
			runs = append(runs, check.Run{Key: key, First: int64(r.StartOffset), Last: int64(r.EndOffset), Object: o.Key()})
			b := objects[o.Key()]
			if b == nil {
				continue // missing-object says so
			}
			if !seen[r.Object] && (int64(len(b)) != o.Size || record.CRC(b) != o.CRC32C) {
				bad("content", "%s has %d bytes with CRC %08x, its entry says %d and %08x", o.Key(), len(b), record.CRC(b), o.Size, o.CRC32C)
			}
			seen[r.Object] = true
			if f, err := segment.OpenFooter(bytes.NewReader(b), int64(len(b))); err != nil && err != io.EOF {
				bad("content", "%s: %v", o.Key(), err)
			} else if !slices.ContainsFunc(f.Runs, func(in segment.FooterRun) bool {
				return in.TP == p.TP && in.StartOffset <= r.StartOffset && in.EndOffset == r.EndOffset
			}) {
				bad("manifest", "%s does not hold offsets %d to %d", o.Key(), r.StartOffset, r.EndOffset)
			}
		}
		key++
	}
	return append(found, check.Scrub(runs, slices.Collect(maps.Keys(objects)), nil)...)
}
