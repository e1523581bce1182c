package broker

import (
	"net"
	"testing"
	"time"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// mum is a node that decides nothing of groups any more, and does not say so.
type mum struct {
	*raftmeta.Host
	asked chan struct{}
}

func (m mum) ProposeGroup(record.ShardID, []state.Command, func(error)) { close(m.asked) }

// A server whose connection waits for an answer that never comes closes all the same.
func TestCloseWaitsForNoAnswer(t *testing.T) {
	w := start(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	made := w.CreateTopics(t.Context(), []raftmeta.TopicSpec{{Name: "t", Partitions: 1, ReplicationFactor: 1}})[0]
	if made.Err != nil {
		t.Fatal(made.Err)
	}
	cfg := DefaultConfig()
	cfg.Registerer = prometheus.NewRegistry()
	back := mum{w.Host, make(chan struct{})}
	s := NewServer(cfg, back, hotReader{w.Host})
	sg := &shardGroups{c: s.groups, id: w.GroupShard("g"), groups: map[string]*liveGroup{}}
	s.groups.shards[sg.id] = sg
	defer sg.unload()
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	commit := kmsg.NewPtrOffsetCommitRequest()
	commit.SetVersion(2)
	commit.Group, commit.Generation = "g", -1
	topic, part := kmsg.NewOffsetCommitRequestTopic(), kmsg.NewOffsetCommitRequestTopicPartition()
	topic.Topic, topic.Partitions = "t", append(topic.Partitions, part)
	commit.Topics = append(commit.Topics, topic)
	if _, err := c.Write(kmsg.NewRequestFormatter().AppendRequest(nil, commit, 1)); err != nil {
		t.Fatal(err)
	}
	<-back.asked
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
		<-served
	case <-time.After(time.Minute):
		t.Fatal("it waits for an answer that nobody gives")
	}
}
