package broker

import (
	"net"
	"slices"
	"testing"

	"github.com/estran/estran/raftmeta"
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
