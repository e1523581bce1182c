package raftmeta

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"testing"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/mem"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
)

// readable is a bucket whose user may read and nothing else.
type readable struct {
	t *testing.T
	b objstore.Bucket
}

func (r readable) Get(ctx context.Context, key string, g objstore.Range) (io.ReadCloser, objstore.Info, error) {
	return r.b.Get(ctx, key, g)
}

func (r readable) Head(ctx context.Context, key string) (objstore.Info, error) {
	return r.b.Head(ctx, key)
}

func (r readable) Put(context.Context, string, objstore.Body, objstore.PutOptions) (objstore.Info, error) {
	r.t.Error("a follower has put an object")
	return objstore.Info{}, errors.New("no right to put")
}

func (r readable) Delete(context.Context, ...string) error {
	r.t.Error("a follower has deleted objects")
	return errors.New("no right to delete")
}

func (r readable) List(context.Context, string, string) iter.Seq2[objstore.Info, error] {
	r.t.Error("a follower has listed objects")
	return func(func(objstore.Info, error) bool) {}
}

func (r readable) Close() error { return nil }

// through reads a partition to its high watermark through all tiers of a follower.
func through(t *testing.T, f *Follower, read *tiering.Reader, tp record.TopicPartition, want int) (out []string, objects int) {
	t.Helper()
	from := record.Offset(0)
	until(t, fmt.Sprintf("%d records to be read", want), func() bool {
		info, err := f.Partition(tp)
		if err != nil {
			return false
		}
		ctx, cancel := context.WithTimeout(t.Context(), waitMost)
		defer cancel()
		res, err := read.Read(ctx, tp, from, tiering.Limits{MaxBytes: 50_000, AtLeastOne: true, UpTo: info.HighWatermark})
		if err != nil {
			t.Fatalf("at %d: %v", from, err)
		}
		if res.Tier == tiering.TierObject {
			objects += res.Bytes
		}
		for data := bytes.Join(res.Buffers, nil); len(data) > 0; {
			b, rest, err := record.Next(data)
			if err != nil || b.CheckCRC() != nil {
				t.Fatal(err)
			}
			if err := record.Each(b, 0, func(o record.Offset, r *record.Record) bool {
				if o >= from {
					if o != from {
						t.Fatalf("offset %d where %d is due", o, from)
					}
					out, from = append(out, string(r.Value)), from+1
				}
				return true
			}); err != nil {
				t.Fatal(err)
			}
			data = rest
		}
		if res.Release != nil {
			res.Release()
		}
		return len(out) >= want
	})
	return out, objects
}

// Followers read what is hot, what was sealed a moment ago and what lies in objects while it is being written, sealed and freed at the voter; they do nothing to the bucket but read.
func TestFollowerReadsAllTiers(t *testing.T) {
	bucket := mem.New()
	addr := freeAddr(t)
	n := openNode(t, t.TempDir(), bucket, func(c *Config, _ *tiering.Config) {
		c.PeerListener, c.Secret, c.FileBytes, c.TailBytes = listenAt(t, addr), []byte("s"), 1<<20, 1<<20
	})
	c := &trio{t: t, voters: []Voter{{1, addr}}, hosts: []*Host{n.Host}}
	topic := newTopic(t, n.Host, "t", 1)
	tp := record.TopicPartition{Topic: topic.ID}
	full := c.follow(nil)
	bare := c.follow(func(cfg *FollowerConfig) { cfg.NodeID, cfg.Payload, cfg.RingBytes = 1001, false, 1<<20 })
	readers := map[*Follower]*tiering.Reader{}
	for _, f := range []*Follower{full, bare} {
		r := tiering.NewReadOnly(tiering.Config{}, f, f, readable{t, bucket})
		t.Cleanup(r.Close)
		readers[f] = r
	}
	const records = 600
	var values []string
	produced := make(chan struct{})
	go func() {
		defer close(produced)
		for i := range records {
			v := fmt.Sprintf("%d-%s", i, strings.Repeat("v", i%7*300))
			values = append(values, v)
			if r := appendSync(t, n.Host, AppendBatch{tp, batchOf(t, -1, -1, v)})[0]; r.Err != nil {
				t.Error(r.Err)
			}
		}
	}()
	for name, f := range map[string]*Follower{"with payload": full, "headers only": bare} {
		got, _ := through(t, f, readers[f], tp, records)
		<-produced
		if !slices.Equal(got, values) {
			t.Errorf("%s: %d records are others", name, len(got))
		}
	}
	until(t, "everything to be sealed", sealed(n))
	c.same(full)
	late := c.follow(func(cfg *FollowerConfig) { cfg.NodeID = 1002 })
	r := tiering.NewReadOnly(tiering.Config{}, late, late, readable{t, bucket})
	defer r.Close()
	got, objects := through(t, late, r, tp, records)
	if !slices.Equal(got, values) || objects == 0 {
		t.Errorf("afterwards: %d records, %d bytes of them from objects", len(got), objects)
	}
}

// A hot entry that a voter has freed while its follower is behind is found where the follower's state says once it is no more behind.
func TestFetchOfAFreedEntry(t *testing.T) {
	bucket := mem.New()
	addr := freeAddr(t)
	n := openNode(t, t.TempDir(), bucket, func(c *Config, _ *tiering.Config) {
		c.PeerListener, c.Secret, c.FileBytes, c.TailBytes = listenAt(t, addr), []byte("s"), 1<<20, 1<<20
	})
	c := &trio{t: t, voters: []Voter{{1, addr}}, hosts: []*Host{n.Host}}
	tp := record.TopicPartition{Topic: newTopic(t, n.Host, "t", 1).ID}
	n.fault.Set(objstore.Rule{Op: "put", P: 1, Err: errors.New("down")})
	values := n.produce(t, tp, 0, 20)
	f := c.follow(func(cfg *FollowerConfig) { cfg.Payload = false })
	m := f.mirrorOf(tp)
	m.mu.RLock()
	ref := m.shard.HotRefs(tp, 0, 1, nil)[0]
	m.mu.RUnlock()
	n.fault.Set()
	g := n.groupOf(tp)
	until(t, "the entry to be freed", func() bool {
		base, _ := g.log.Base()
		if base < uint64(ref.Index) {
			values = append(values, n.produce(t, tp, len(values), len(values)+20)...)
		}
		snapshotNow(t, g)
		return base >= uint64(ref.Index)
	})
	if err := m.fetchEntry(t.Context(), uint64(ref.Index), uint64(ref.Term)); err != nil {
		t.Error(err)
	}
	if m.held(uint64(ref.Index), uint64(ref.Term)) != nil {
		t.Error("a freed entry has come from somewhere")
	}
	m.mu.RLock()
	oldest, _, ok := m.shard.OldestHot()
	m.mu.RUnlock()
	if ok && uint64(oldest) <= uint64(ref.Index) {
		t.Errorf("entry %d is hot still", ref.Index)
	}
	r := tiering.NewReadOnly(tiering.Config{}, f, f, readable{t, bucket})
	defer r.Close()
	if got, _ := through(t, f, r, tp, len(values)); !slices.Equal(got, values) {
		t.Errorf("%d records, want %d", len(got), len(values))
	}
}
