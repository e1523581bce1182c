package broker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/estran/estran/objstore/mem"
	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/twmb/franz-go/pkg/kmsg"
)

var _ Backend = (*raftmeta.Follower)(nil)

// busy reports whether a follower says that it cannot know yet: on a busy machine its proofs come late.
func busy(code int16) bool {
	return code == codeNotLeaderOrFollower || code == codeOffsetNotAvailable || code == codeRequestTimedOut
}

// The same broker over a follower serves reads, wakes who waits for records, judges offsets by what the voters have acknowledged, and changes nothing.
func TestBrokerOverAFollower(t *testing.T) {
	peers, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := startWith(t, nil, func(c *raftmeta.Config) { c.PeerListener, c.Secret = peers, []byte("s") })
	w.topic(t, "t", 1, nil)
	lead := w.dial(t)
	produce := func(values ...string) {
		t.Helper()
		if p := lead.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, values...)), 9).(*kmsg.ProduceResponse).Topics[0].Partitions[0]; p.ErrorCode != 0 {
			t.Errorf("produce: %d", p.ErrorCode)
		}
	}
	produce("a", "b")
	ctx, cancel := context.WithTimeout(t.Context(), waitMost)
	defer cancel()
	f, err := raftmeta.OpenFollower(ctx, raftmeta.FollowerConfig{NodeID: 1000, Cluster: []string{peers.Addr().String()}, Secret: []byte("s"), Payload: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	read := tiering.NewReadOnly(tiering.Config{Registerer: prometheus.NewRegistry()}, f, f, mem.New())
	defer read.Close()
	c := serveAlso(t, f, read)
	fetch := func(from int64, wait int32) (p kmsg.FetchResponseTopicPartition, values []string) {
		t.Helper()
		r := fetchReq("t", from)
		r.MaxWaitMillis, r.MinBytes = wait, 1
		for p.ErrorCode = codeNotLeaderOrFollower; busy(p.ErrorCode); {
			p = c.ask(r, 12).(*kmsg.FetchResponse).Topics[0].Partitions[0]
		}
		for data := p.RecordBatches; len(data) > 0; {
			b, rest, err := record.Next(data)
			if err != nil || b.CheckCRC() != nil {
				t.Fatal(err)
			}
			if err := record.Each(b, 0, func(_ record.Offset, r *record.Record) bool { values = append(values, string(r.Value)); return true }); err != nil {
				t.Fatal(err)
			}
			data = rest
		}
		return p, values
	}
	var all []string
	for end := time.Now().Add(waitMost); len(all) < 2 && time.Now().Before(end); { // what was produced before the follower began is fetched from the voter
		_, v := fetch(int64(len(all)), 100)
		all = append(all, v...)
	}
	if fmt.Sprint(all) != "[a b]" {
		t.Errorf("%q", all)
	}
	produced := make(chan struct{})
	go func() { // someone waits for it
		defer close(produced)
		produce("c")
	}()
	if p, v := fetch(2, int32(waitMost.Milliseconds())); p.ErrorCode != 0 || fmt.Sprint(v) != "[c]" {
		t.Errorf("%d, %q", p.ErrorCode, v)
	}
	<-produced
	if p, _ := fetch(4, 0); p.ErrorCode != codeOffsetOutOfRange {
		t.Errorf("above all that was acknowledged: %d", p.ErrorCode)
	}
	l := kmsg.NewPtrListOffsetsRequest()
	x := kmsg.NewListOffsetsRequestTopic()
	x.Topic = "t"
	x.Partitions = []kmsg.ListOffsetsRequestTopicPartition{{Timestamp: timeLatest, CurrentLeaderEpoch: -1}}
	l.Topics = append(l.Topics, x)
	produce("d")
	latest := kmsg.ListOffsetsResponseTopicPartition{ErrorCode: codeNotLeaderOrFollower}
	for busy(latest.ErrorCode) {
		latest = c.ask(l, 5).(*kmsg.ListOffsetsResponse).Topics[0].Partitions[0]
	}
	if latest.ErrorCode != 0 || latest.Offset != 4 {
		t.Errorf("latest: %+v", latest)
	}
	if p := c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "e")), 9).(*kmsg.ProduceResponse).Topics[0].Partitions[0]; p.ErrorCode != codeNotLeaderOrFollower {
		t.Errorf("produce to a follower: %d", p.ErrorCode)
	}
	n := kmsg.NewPtrCreateTopicsRequest()
	n.TimeoutMillis = 1000
	n.Topics = []kmsg.CreateTopicsRequestTopic{{Topic: "new", NumPartitions: 1, ReplicationFactor: 1}}
	if p := c.ask(n, 5).(*kmsg.CreateTopicsResponse).Topics[0]; p.ErrorCode == 0 {
		t.Error("a follower has created a topic")
	}
	if _, ok := w.Cluster().Topic("new"); ok {
		t.Error("a topic was created")
	}
	if err := f.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}
