package raftmeta

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// The leader of each group, and nobody else, hands out its state; what was handed out is the state at that index, also if the group has gone on meanwhile; a failure is repeated.
func TestBackups(t *testing.T) {
	type copied struct {
		node int32
		b    Backup
		data []byte
	}
	var mu sync.Mutex
	got := map[string]copied{}
	failed := map[string]bool{}
	c := newTrio(t, 3)
	c.change = func(_ int, cfg *Config) {
		cfg.BackupEvery = 20 * time.Millisecond
		cfg.OnBackup = func(_ context.Context, b Backup) error {
			mu.Lock()
			defer mu.Unlock()
			if !failed[b.Group] {
				failed[b.Group] = true
				return errors.New("no store")
			}
			var buf bytes.Buffer
			_, err := b.Write(&buf)
			got[b.Group] = copied{cfg.NodeID, b, buf.Bytes()}
			return err
		}
	}
	c.start(0, 1, 2)
	tp := record.TopicPartition{Topic: newTopic(t, c.hosts[0], "t", 1).ID}
	for i := range 10 {
		c.append(tp, batchOf(t, 7, record.Sequence(i), "v"))
	}
	take := func(group string) copied {
		mu.Lock()
		defer mu.Unlock()
		return got[group]
	}
	until(t, "meta's state with the topic", func() bool {
		m, err := state.RestoreMeta(bytes.NewReader(take("meta").data))
		return err == nil && m.View().TopicCount() == 1
	})
	place, _ := c.hosts[0].Cluster().TopicByID(tp.Topic)
	name := c.hosts[0].shardByID(place.Partitions[0].Shard).name()
	until(t, "the shard's state with the records", func() bool {
		s, err := state.RestoreShard(bytes.NewReader(take(name).data))
		if err != nil {
			return false
		}
		p, ok := s.Partition(tp)
		return ok && p.HighWatermark == 10
	})
	until(t, "the leader's copy to be the newest", func() bool {
		leader, _ := c.hosts[0].Leader(place.Partitions[0].Shard)
		return take(name).node == leader
	})
	last := take(name).b
	c.append(tp, batchOf(t, 7, 10, "later"))
	var again bytes.Buffer
	if _, err := last.Write(&again); err != nil {
		t.Fatal(err)
	}
	s, err := state.RestoreShard(&again)
	if err != nil {
		t.Fatal(err)
	}
	if p, _ := s.Partition(tp); p.HighWatermark != 10 || uint64(s.Applied()) != last.Index {
		t.Errorf("a state that was taken at %d is that of %d now, high watermark %d", last.Index, s.Applied(), p.HighWatermark)
	}
}
