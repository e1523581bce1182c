package broker

import (
	"context"
	"net"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// silent is a cluster whose only node does not answer.
type silent struct{ *raftmeta.Host }

func (silent) Down(node int32) bool { return node == 1 }

// A node that does not answer is no broker to a client; its replicas are offline and not in sync. Only who asks for fenced brokers is told of it.
func TestDownNodeIsNotListed(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 1, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Registerer = prometheus.NewRegistry()
	s := NewServer(cfg, silent{w.Host}, hotReader{w.Host})
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close(); <-served })
	for _, x := range []struct {
		addr    string
		up      []int32
		offline []int32
	}{{w.addr, []int32{1}, nil}, {l.Addr().String(), nil, []int32{1}}} {
		c := (&whole{addr: x.addr}).dial(t)
		for _, version := range []int16{1, 5, 12} {
			m := c.ask(kmsg.NewPtrMetadataRequest(), version).(*kmsg.MetadataResponse)
			p := m.Topics[0].Partitions[0]
			if len(m.Brokers) != len(x.up) || !slices.Equal(p.ISR, x.up) || !slices.Equal(p.Replicas, []int32{1}) || version >= 5 && !slices.Equal(p.OfflineReplicas, x.offline) {
				t.Errorf("Metadata v%d: brokers %v, replicas %v, in sync %v, offline %v", version, m.Brokers, p.Replicas, p.ISR, p.OfflineReplicas)
			}
		}
		for _, fenced := range []bool{false, true} {
			r := kmsg.NewPtrDescribeClusterRequest()
			r.IncludeFencedBrokers = fenced
			bs := c.ask(r, 2).(*kmsg.DescribeClusterResponse).Brokers
			if n := len(x.up); len(bs) != max(n, btoi(fenced)) || len(bs) > 0 && bs[0].IsFenced != (n == 0) {
				t.Errorf("DescribeCluster, fenced ones %v: %+v", fenced, bs)
			}
		}
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// behind is a node that has seen what `seen` shows, until it catches up.
type behind struct {
	*raftmeta.Host
	seen   *state.Cluster
	caught *atomic.Bool
}

func (b behind) Cluster() *state.Cluster {
	if b.caught.Load() {
		return b.Host.Cluster()
	}
	return b.seen
}

func (b behind) Current(ctx context.Context) error {
	b.caught.Store(true)
	return b.Host.Current(ctx)
}

// A topic is deleted and made again elsewhere while a node is cut off: what is asked of that node by the topic's name is done to the new one (metadata-order, seed 3200).
func TestTopicMadeAgainElsewhere(t *testing.T) {
	w := start(t, nil)
	name := "t"
	create := func() {
		t.Helper()
		if err := w.CreateTopics(t.Context(), []raftmeta.TopicSpec{{Name: name, Partitions: 1, ReplicationFactor: 1}})[0].Err; err != nil {
			t.Fatal(err)
		}
	}
	grow := kmsg.NewPtrCreatePartitionsRequest()
	more := kmsg.NewCreatePartitionsRequestTopic()
	more.Topic, more.Count = name, 2
	grow.Topics = append(grow.Topics, more)
	alter := kmsg.NewPtrIncrementalAlterConfigsRequest()
	resource, config := kmsg.NewIncrementalAlterConfigsRequestResource(), kmsg.NewIncrementalAlterConfigsRequestResourceConfig()
	resource.ResourceType, resource.ResourceName = kmsg.ConfigResourceTypeTopic, name
	config.Name, config.Value = "retention.ms", kmsg.StringPtr("1000")
	resource.Configs = append(resource.Configs, config)
	alter.Resources = append(alter.Resources, resource)
	remove := kmsg.NewPtrDeleteTopicsRequest()
	remove.TopicNames = []string{name}
	for _, x := range []struct {
		request kmsg.Request
		version int16
		code    func(kmsg.Response) int16
	}{
		{grow, 3, func(r kmsg.Response) int16 { return r.(*kmsg.CreatePartitionsResponse).Topics[0].ErrorCode }},
		{alter, 1, func(r kmsg.Response) int16 {
			return r.(*kmsg.IncrementalAlterConfigsResponse).Resources[0].ErrorCode
		}},
		{remove, 3, func(r kmsg.Response) int16 { return r.(*kmsg.DeleteTopicsResponse).Topics[0].ErrorCode }},
	} {
		create()
		seen := w.Cluster()
		first, _ := seen.Topic(name)
		if err := w.DeleteTopics(t.Context(), []record.TopicID{first.ID})[0]; err != nil {
			t.Fatal(err)
		}
		create()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		cfg := DefaultConfig()
		cfg.Registerer = prometheus.NewRegistry()
		s := NewServer(cfg, behind{w.Host, seen, new(atomic.Bool)}, hotReader{w.Host})
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		t.Cleanup(func() { _ = s.Close(); <-served })
		c := (&whole{addr: l.Addr().String()}).dial(t)
		if code := x.code(c.ask(x.request, x.version)); code != codeNone {
			t.Errorf("%T: code %d", x.request, code)
		}
		if now, ok := w.Cluster().Topic(name); ok {
			if err := w.DeleteTopics(t.Context(), []record.TopicID{now.ID})[0]; err != nil {
				t.Fatal(err)
			}
		} else if x.request != kmsg.Request(remove) {
			t.Errorf("%T: the topic is gone", x.request)
		}
	}
}
