package raftmeta

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/estran/estran/tiering/record"
)

// Many topics are created at once through any node, more than one forward holds: each has its own answer, and its leader takes records when it comes.
func TestManyTopicsAtOnce(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	newTopic(t, c.hosts[1], "taken", 1)
	for i, h := range c.hosts {
		specs := []TopicSpec{{Name: "taken", Partitions: 1, ReplicationFactor: 3}}
		for k := range 1500 {
			specs = append(specs, TopicSpec{Name: fmt.Sprintf("t-%d-%d", i, k), Partitions: 1 + int32(k%2), ReplicationFactor: 3, Configs: map[string]string{"segment.bytes": strings.Repeat("1", 200)}})
		}
		var ids []record.TopicID
		for k, made := range h.CreateTopics(t.Context(), specs) {
			if k == 0 {
				if !errors.Is(made.Err, ErrTopicExists) && !moved(made.Err) {
					t.Errorf("a name that is taken: %v", made.Err)
				}
				continue
			}
			if moved(made.Err) { // an election in between: it may be there
				until(t, specs[k].Name+" to be created", func() bool {
					again := h.CreateTopics(t.Context(), specs[k:k+1])[0]
					if made = again; errors.Is(again.Err, ErrTopicExists) {
						made.Topic, _ = h.Cluster().Topic(specs[k].Name)
						made.Err = nil
						return made.Topic != nil // it may not have been applied here yet
					}
					return !moved(made.Err)
				})
			}
			if made.Err != nil || made.Topic.Name != specs[k].Name || len(made.Topic.Partitions) != int(specs[k].Partitions) {
				t.Fatalf("%s: %+v", specs[k].Name, made)
			}
			ids = append(ids, made.Topic.ID)
			for p, place := range made.Topic.Partitions {
				tp := record.TopicPartition{Topic: made.Topic.ID, Partition: int32(p)}
				err := error(ErrNotLeader)
				if leader, ok := h.Leader(place.Shard); ok && c.hosts[leader-1].shardByID(place.Shard).leads.Load() > 0 {
					_, err = c.hosts[leader-1].Partition(tp)
				}
				if errors.Is(err, ErrNotLeader) { // an election in between
					until(t, "a leader", func() bool {
						leader, ok := h.Leader(place.Shard)
						return ok && c.hosts[leader-1].shardByID(place.Shard).leads.Load() > 0
					})
				} else if err != nil {
					t.Fatalf("%s-%d at its leader: %v", made.Topic.Name, p, err)
				}
			}
		}
		ids[7] = record.TopicID{1}
		for k, err := range c.hosts[(i+1)%3].DeleteTopics(t.Context(), ids) {
			if moved(err) {
				until(t, "a topic to be deleted", func() bool {
					err = c.hosts[(i+1)%3].DeleteTopics(t.Context(), ids[k:k+1])[0]
					return !moved(err)
				})
				if k != 7 && errors.Is(err, ErrUnknownTopic) {
					err = nil
				}
			}
			if k == 7 && !errors.Is(err, ErrUnknownTopic) || k != 7 && err != nil {
				t.Fatalf("deleting topic %d: %v", k, err)
			}
		}
	}
	if n := c.hosts[0].Cluster().TopicCount(); n != 1+3 {
		t.Errorf("%d topics are left", n)
	}
}

// moved: leadership was lost on the way, so that a change may have been made or not.
func moved(err error) bool {
	return errors.Is(err, ErrNotLeader) || errors.Is(err, ErrUnknownOutcome) || errors.Is(err, ErrTimeout)
}

// One topic a time through the node that leads nothing of it in particular, and a thousand at once, each writable when the call returns.
func BenchmarkCreateTopics(b *testing.B) {
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			c := newTrio(b, 3)
			c.start(0, 1, 2)
			for i := 0; b.Loop(); i++ {
				specs := make([]TopicSpec, n)
				for k := range specs {
					specs[k] = TopicSpec{Name: fmt.Sprintf("t-%d-%d", i, k), Partitions: 1, ReplicationFactor: 3}
				}
				for _, made := range c.hosts[2].CreateTopics(b.Context(), specs) {
					if made.Err != nil {
						b.Fatal(made.Err)
					}
				}
			}
		})
	}
}
