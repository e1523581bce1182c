package logs

import (
	"context"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/estran/estran/localstack/check"
	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/mem"
	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
)

// sealed lets a node seal records into a bucket and stop. It returns its directory, a copy of it from before the last records, what was applied of each group, and the objects.
func sealed(t *testing.T) (dir, before string, applied map[string]uint64, objects map[string][]byte) {
	t.Helper()
	dir, before = t.TempDir(), t.TempDir()
	bucket := mem.New()
	var tier *tiering.Tiering
	open := func() *raftmeta.Host {
		ready := make(chan struct{})
		h, err := raftmeta.Open(t.Context(), raftmeta.Config{NodeID: 1, DataDir: dir, Host: "127.0.0.1", Port: 9092, Shards: 1, HotMaxBytes: 1 << 30, FileBytes: 4 << 20,
			OnFatal: func(err error) { t.Errorf("fatal: %v", err) },
			OnLead: func(ctx context.Context, s record.ShardID) {
				<-ready
				tier.Lead(ctx, s)
			}})
		if err != nil {
			t.Fatal(err)
		}
		tier = tiering.New(tiering.Config{SealBytes: 1 << 20, SealAge: 10 * time.Millisecond}, h, bucket)
		close(ready)
		return h
	}
	h := open()
	made := h.CreateTopics(t.Context(), []raftmeta.TopicSpec{{Name: "t", Partitions: 2, ReplicationFactor: 1, Parsed: state.PartitionConfig{RetentionMs: -1, RetentionBytes: -1}}})[0]
	if made.Err != nil {
		t.Fatal(made.Err)
	}
	write := func() {
		for range 3 {
			for p := range int32(2) {
				tp := record.TopicPartition{Topic: made.Topic.ID, Partition: p}
				w := record.NewBuilder(record.CodecNone)
				w.Add(1000, nil, []byte(strings.Repeat("v", 3000)))
				b, err := w.Batch()
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan raftmeta.AppendResult, 1)
				h.Append(t.Context(), raftmeta.AppendRequest{Batches: []raftmeta.AppendBatch{{TP: tp, Batch: b}}}, func(r []raftmeta.AppendResult) { done <- r[0] })
				if r := <-done; r.Err != nil {
					t.Fatal(r.Err)
				}
				for { // one object after another, so that there are manifests
					if i, err := h.Partition(tp); err != nil || i.SealedEnd == i.HighWatermark {
						break
					}
					time.Sleep(time.Millisecond) // another goroutine's work, for which there is no event
				}
			}
		}
	}
	write()
	stop := func() {
		if err := h.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	if err := os.CopyFS(before, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	h = open()
	write()
	applied = map[string]uint64{}
	for _, b := range h.Backups() {
		applied[b.Group] = b.Index
	}
	stop()
	objects = map[string][]byte{}
	for o, err := range bucket.List(t.Context(), "", "") {
		if err != nil {
			t.Fatal(err)
		}
		body, _, err := bucket.Get(t.Context(), o.Key, objstore.Whole)
		if err != nil {
			t.Fatal(err)
		}
		if objects[o.Key], err = io.ReadAll(body); err != nil {
			t.Fatal(err)
		}
	}
	return dir, before, applied, objects
}

// States sees a voter that has come to another state, an object that is gone, one with a changed byte, and one that is another's.
func TestStatesSees(t *testing.T) {
	dir, before, applied, objects := sealed(t)
	keys := slices.DeleteFunc(slices.Sorted(maps.Keys(objects)), func(k string) bool { return !strings.HasPrefix(k, "v1/data/") })
	if len(keys) < 6 || applied["shard-1"] == 0 || applied["meta"] == 0 {
		t.Fatal(keys, applied)
	}
	changed := func(change func(map[string][]byte)) map[string][]byte {
		m := maps.Clone(objects)
		change(m)
		return m
	}
	for _, c := range []struct {
		name    string
		dirs    []string
		objects map[string][]byte
		rule    string
	}{
		{"clean", []string{dir, dir}, objects, ""},
		{"another state", []string{dir, before}, objects, "states-differ"},
		{"gone", []string{dir}, changed(func(m map[string][]byte) { delete(m, keys[2]) }), "missing-object"},
		{"a changed byte", []string{dir}, changed(func(m map[string][]byte) {
			m[keys[2]] = slices.Clone(m[keys[2]])
			m[keys[2]][10] ^= 1
		}), "content"},
		{"another's", []string{dir}, changed(func(m map[string][]byte) { m[keys[2]] = m[keys[3]] }), "manifest"},
	} {
		found, err := States(c.dirs, applied, c.objects)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if says := slices.ContainsFunc(found, func(a check.Anomaly) bool { return a.Rule == c.rule }); says != (c.rule != "") || c.rule == "" && len(found) > 0 {
			t.Errorf("%s: %v", c.name, found)
		}
	}
}
