package broker

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/twmb/franz-go/pkg/kbin"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// whole is a broker over a real single-voter host without tiering: everything stays hot.
type whole struct {
	*raftmeta.Host
	s    *Server
	addr string
}

// hotReader reads from the hot log only.
type hotReader struct{ h *raftmeta.Host }

func (r hotReader) Read(ctx context.Context, tp record.TopicPartition, from record.Offset, l tiering.Limits) (tiering.Result, error) {
	b, ok := r.h.Bounds(tp)
	if !ok {
		return tiering.Result{}, tiering.ErrUnknownPartition
	}
	if from < b.LogStart || from > b.HighWatermark {
		return tiering.Result{}, tiering.ErrOutOfRange
	}
	if from >= l.UpTo {
		return tiering.Result{Next: from}, nil
	}
	return r.h.ReadHot(ctx, tp, from, l)
}

func (r hotReader) OffsetForTimestamp(context.Context, record.TopicPartition, record.Timestamp, record.Offset) (record.Offset, record.Timestamp, bool, error) {
	return 0, 0, false, nil
}

func (r hotReader) MaxTimestamp(context.Context, record.TopicPartition, record.Offset) (record.Offset, record.Timestamp, bool, error) {
	return 0, 0, false, nil
}

func start(t testing.TB, change func(*Config)) *whole {
	t.Helper()
	return startWith(t, change, func(*raftmeta.Config) {})
}

func startWith(t testing.TB, change func(*Config), host func(*raftmeta.Config)) *whole {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &whole{addr: l.Addr().String()}
	ready := make(chan struct{})
	ctx, cancel := context.WithTimeout(context.Background(), waitMost)
	defer cancel()
	hc := raftmeta.Config{NodeID: 1, DataDir: t.TempDir(), Host: "127.0.0.1", Port: int32(l.Addr().(*net.TCPAddr).Port), Shards: 2, HotMaxBytes: 1 << 30,
		FileBytes: 1 << 20, OnLead: func(ctx context.Context, s record.ShardID) { <-ready; w.s.Lead(ctx, uint32(s)) }, OnFatal: func(err error) { t.Errorf("fatal: %v", err) }}
	host(&hc)
	if w.Host, err = raftmeta.Open(ctx, hc); err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.AutoCreateTopics, cfg.GroupInitialDelay, cfg.Registerer = true, 0, prometheus.NewRegistry()
	if change != nil {
		change(&cfg)
	}
	w.s = NewServer(cfg, w.Host, hotReader{w.Host})
	close(ready)
	served := make(chan error, 1)
	go func() { served <- w.s.Serve(l) }()
	t.Cleanup(func() {
		_ = w.s.Close()
		if err := <-served; !errors.Is(err, ErrServerClosed) {
			t.Errorf("serve: %v", err)
		}
		_ = w.Host.Close(context.Background())
	})
	return w
}

// waitMost is how long a test waits for what must happen before it fails. It is no claim about how fast that is: the machine may be busy with something else.
const waitMost = 3 * time.Minute

// raw is a connection that speaks frames.
type raw struct {
	t testing.TB
	net.Conn
	corr int32
}

func (w *whole) dial(t testing.TB) *raw {
	t.Helper()
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(waitMost))
	return &raw{t: t, Conn: c}
}

func frame(body []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
}

// encode makes a request's frame with franz-go's encoder, which is independent of ours.
func (c *raw) encode(req kmsg.Request, version int16) []byte {
	req.SetVersion(version)
	c.corr++
	b := kbin.AppendInt16(nil, req.Key())
	b = kbin.AppendInt16(b, version)
	b = kbin.AppendInt32(b, c.corr)
	b = kbin.AppendNullableString(b, kmsg.StringPtr("test"))
	if req.IsFlexible() {
		b = append(b, 0)
	}
	return frame(req.AppendTo(b))
}

func (c *raw) send(b []byte) {
	c.t.Helper()
	if _, err := c.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

// receive reads one answer; it returns the bytes behind the correlation ID.
func (c *raw) receive() (corr int32, body []byte, err error) {
	var size [4]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return 0, nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(size[:]))
	if _, err := io.ReadFull(c, b); err != nil {
		return 0, nil, err
	}
	return int32(binary.BigEndian.Uint32(b)), b[4:], nil
}

// ask sends a request and decodes its answer with franz-go.
func (c *raw) ask(req kmsg.Request, version int16) kmsg.Response {
	c.t.Helper()
	c.send(c.encode(req, version))
	corr, body, err := c.receive()
	if err != nil || corr != c.corr {
		c.t.Fatalf("%T v%d: correlation %d, %v", req, version, corr, err)
	}
	resp := req.ResponseKind()
	resp.SetVersion(version)
	if resp.IsFlexible() && req.Key() != keyAPIVersions {
		body = body[1:]
	}
	if err := resp.ReadFrom(body); err != nil {
		c.t.Fatalf("%T v%d: %v", req, version, err)
	}
	if again := resp.AppendTo(nil); !bytes.Equal(again, body) {
		c.t.Fatalf("%T v%d: %d bytes were sent, the same answer has %d", req, version, len(body), len(again))
	}
	return resp
}

func batchBytes(t testing.TB, c record.Codec, values ...string) record.Batch {
	t.Helper()
	w := record.NewBuilder(c)
	for i, v := range values {
		w.Add(record.Timestamp(time.Now().UnixMilli()), []byte(fmt.Sprint(i)), []byte(v))
	}
	b, err := w.Batch()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func produceReq(topic string, acks int16, parts ...[]byte) *kmsg.ProduceRequest {
	r := kmsg.NewPtrProduceRequest()
	r.Acks, r.TimeoutMillis = acks, 5000
	t := kmsg.NewProduceRequestTopic()
	t.Topic = topic
	for i, b := range parts {
		p := kmsg.NewProduceRequestTopicPartition()
		p.Partition, p.Records = int32(i), b
		t.Partitions = append(t.Partitions, p)
	}
	r.Topics = append(r.Topics, t)
	return r
}

func (w *whole) topic(t testing.TB, name string, partitions int32, configs map[string]string) *state.Topic {
	t.Helper()
	topic, err := w.s.createTopic(t.Context(), raftmeta.TopicSpec{Name: name, Partitions: partitions, ReplicationFactor: 1, Configs: configs})
	if err != nil {
		t.Fatal(err)
	}
	return topic
}

// Every key is asked in every version that is advertised, and the answer decodes and encodes again to the same bytes in another implementation.
func TestEveryVersionAgainstAnotherCodec(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 2, nil)
	c := w.dial(t)
	for v := int16(3); v <= 11; v++ {
		r := c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "a", "b"), batchBytes(t, record.CodecGzip, "c")), v).(*kmsg.ProduceResponse)
		for _, p := range r.Topics[0].Partitions {
			if p.ErrorCode != 0 {
				t.Fatalf("produce v%d: %d", v, p.ErrorCode)
			}
		}
	}
	topic, _ := w.Cluster().Topic("t")
	for _, a := range apiList() {
		for v := a.served(); v <= a.max; v++ {
			if a.key == keyProduce || a.key == keyDeleteTopics {
				continue
			}
			req := kmsg.RequestForKey(a.key)
			fill(t, req, v, topic.ID)
			c.ask(req, v)
		}
	}
	for v := int16(0); v <= 6; v++ {
		name := fmt.Sprint("d", v)
		d := w.topic(t, name, 1, nil)
		req := kmsg.NewPtrDeleteTopicsRequest()
		req.TopicNames = []string{name}
		x := kmsg.NewDeleteTopicsRequestTopic()
		x.TopicID = d.ID
		req.Topics = append(req.Topics, x)
		if r := c.ask(req, v).(*kmsg.DeleteTopicsResponse); r.Topics[0].ErrorCode != 0 {
			t.Errorf("delete v%d: %d", v, r.Topics[0].ErrorCode)
		}
	}
}

// fill gives a request contents that reach its handler.
func fill(t testing.TB, req kmsg.Request, v int16, id record.TopicID) {
	t.Helper()
	switch r := req.(type) {
	case *kmsg.FetchRequest:
		x := kmsg.NewFetchRequestTopic()
		x.Topic, x.TopicID = "t", id
		p := kmsg.NewFetchRequestTopicPartition()
		p.PartitionMaxBytes = 1000
		x.Partitions = append(x.Partitions, p)
		r.Topics, r.MaxBytes = append(r.Topics, x), 1<<20
	case *kmsg.ListOffsetsRequest:
		x := kmsg.NewListOffsetsRequestTopic()
		x.Topic = "t"
		for _, ts := range []int64{-1, -2} {
			p := kmsg.NewListOffsetsRequestTopicPartition()
			p.Timestamp = ts
			x.Partitions = append(x.Partitions, p)
		}
		r.Topics = append(r.Topics, x)
	case *kmsg.MetadataRequest:
		x := kmsg.NewMetadataRequestTopic()
		x.Topic = kmsg.StringPtr("t")
		r.Topics = append(r.Topics, x)
	case *kmsg.OffsetCommitRequest:
		r.Group = "g"
		x := kmsg.NewOffsetCommitRequestTopic()
		x.Topic = "t"
		x.Partitions = append(x.Partitions, kmsg.NewOffsetCommitRequestTopicPartition())
		r.Topics = append(r.Topics, x)
	case *kmsg.OffsetFetchRequest:
		r.Group = "g"
		if v >= 8 {
			x := kmsg.NewOffsetFetchRequestGroup()
			x.Group = "g"
			r.Groups = append(r.Groups, x)
		}
	case *kmsg.FindCoordinatorRequest:
		r.CoordinatorKey, r.CoordinatorKeys = "g", []string{"g", "h"}
	case *kmsg.JoinGroupRequest:
		r.Group, r.ProtocolType, r.SessionTimeoutMillis = fmt.Sprint("join", v), "consumer", 10_000
		r.RebalanceTimeoutMillis = 10_000
		p := kmsg.NewJoinGroupRequestProtocol()
		p.Name, p.Metadata = "range", []byte{1}
		r.Protocols = append(r.Protocols, p)
	case *kmsg.SyncGroupRequest:
		r.Group = "g"
	case *kmsg.HeartbeatRequest:
		r.Group = "g"
	case *kmsg.LeaveGroupRequest:
		r.Group = "g"
		r.Members = append(r.Members, kmsg.NewLeaveGroupRequestMember())
	case *kmsg.DescribeGroupsRequest:
		r.Groups = []string{"g", "nothing"}
	case *kmsg.DeleteGroupsRequest:
		r.Groups = []string{"nothing"}
	case *kmsg.ApiVersionsRequest:
		r.ClientSoftwareName, r.ClientSoftwareVersion = "test", "1"
	case *kmsg.CreateTopicsRequest:
		x := kmsg.NewCreateTopicsRequestTopic()
		x.Topic, x.NumPartitions, x.ReplicationFactor = fmt.Sprint("made", v), 1, 1
		r.Topics = append(r.Topics, x)
	case *kmsg.DeleteRecordsRequest:
		x := kmsg.NewDeleteRecordsRequestTopic()
		x.Topic = "t"
		x.Partitions = append(x.Partitions, kmsg.NewDeleteRecordsRequestTopicPartition())
		r.Topics = append(r.Topics, x)
	case *kmsg.OffsetForLeaderEpochRequest:
		x := kmsg.NewOffsetForLeaderEpochRequestTopic()
		x.Topic = "t"
		x.Partitions = append(x.Partitions, kmsg.NewOffsetForLeaderEpochRequestTopicPartition())
		r.Topics = append(r.Topics, x)
	case *kmsg.DescribeConfigsRequest:
		for _, k := range []struct {
			typ  kmsg.ConfigResourceType
			name string
		}{{kmsg.ConfigResourceTypeTopic, "t"}, {kmsg.ConfigResourceTypeBroker, "1"}} {
			x := kmsg.NewDescribeConfigsRequestResource()
			x.ResourceType, x.ResourceName = k.typ, k.name
			r.Resources = append(r.Resources, x)
		}
		r.IncludeSynonyms, r.IncludeDocumentation = true, true
	case *kmsg.CreatePartitionsRequest:
		x := kmsg.NewCreatePartitionsRequestTopic()
		x.Topic, x.Count = "t", 3+int32(v)
		r.Topics = append(r.Topics, x)
	case *kmsg.IncrementalAlterConfigsRequest:
		x := kmsg.NewIncrementalAlterConfigsRequestResource()
		x.ResourceType, x.ResourceName = kmsg.ConfigResourceTypeTopic, "t"
		e := kmsg.NewIncrementalAlterConfigsRequestResourceConfig()
		e.Name, e.Value = "retention.ms", kmsg.StringPtr("1000")
		x.Configs = append(x.Configs, e)
		r.Resources = append(r.Resources, x)
	}
}

// Item 1: an unknown version of ApiVersions is answered in version 0 with this key only. Item 2: Produce is advertised from 0.
func TestItem01And02ApiVersions(t *testing.T) {
	w := start(t, nil)
	c := w.dial(t)
	c.send(frame(append(binary.BigEndian.AppendUint32([]byte{0, 18, 0, 99}, 7), 0xff, 0xff)))
	corr, body, err := c.receive()
	want := []byte{0, 35, 0, 0, 0, 1, 0, 18, 0, 0, 0, 4}
	if err != nil || corr != 7 || !bytes.Equal(body, want) {
		t.Errorf("correlation %d, body %v, %v; want %v", corr, body, err, want)
	}
	r := c.ask(kmsg.NewPtrApiVersionsRequest(), 0).(*kmsg.ApiVersionsResponse)
	if r.ApiKeys[0].ApiKey != 0 || r.ApiKeys[0].MinVersion != 0 {
		t.Errorf("Produce is advertised as %+v", r.ApiKeys[0])
	}
	bad := kmsg.NewPtrApiVersionsRequest()
	bad.ClientSoftwareName, bad.ClientSoftwareVersion = "a b", "1"
	if r := c.ask(bad, 3).(*kmsg.ApiVersionsResponse); r.ErrorCode != codeInvalidRequest {
		t.Errorf("software name with a space: %d", r.ErrorCode)
	}
}

func (c *raw) closed() bool {
	_, _, err := c.receive()
	return err != nil
}

// Items 3 and 8, and the table of bad frames: the connection is closed, nothing else happens, the process goes on.
func TestItem03And08BadFrames(t *testing.T) {
	w := start(t, func(c *Config) { c.RequestMaxBytes = 1 << 20; c.HeaderTimeout = time.Second })
	be := binary.BigEndian
	head := func(key, version int16, rest ...byte) []byte {
		b := be.AppendUint16(nil, uint16(key))
		b = be.AppendUint16(b, uint16(version))
		return append(append(be.AppendUint32(b, 1), 0xff, 0xff), rest...)
	}
	huge := []byte{0x7f, 0xff, 0xff, 0xff}
	cases := map[string][]byte{
		"negative size":           {0xff, 0xff, 0xff, 0xff, 0, 0},
		"size 0":                  {0, 0, 0, 0},
		"size above the limit":    {0x7f, 0xff, 0xff, 0xff},
		"cut off":                 append([]byte{0, 0, 0, 100}, head(3, 1)...),
		"unknown key":             frame(head(99, 0)),
		"internal key":            frame(head(4, 0)),
		"version below":           frame(head(1, 3)),
		"version above":           frame(head(3, 13)),
		"produce 2":               frame(head(0, 2)),
		"negative version":        frame(head(3, -1)),
		"client id beyond":        frame([]byte{0, 3, 0, 1, 0, 0, 0, 1, 0x7f, 0xff}),
		"hostile array":           frame(head(3, 1, huge...)),
		"hostile flexible array":  frame(head(3, 9, 0, 0xff, 0xff, 0xff, 0xff, 0x0f)),
		"tag bomb":                frame(head(18, 3, 0xff, 0xff, 0xff, 0xff, 0x0f)),
		"varint without end":      frame(head(18, 3, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)),
		"join with null group":    frame(head(11, 0, 0xff, 0xff)),
		"negative string":         frame(head(10, 0, 0x80, 0)),
		"produce hostile topics":  frame(head(0, 3, append([]byte{0xff, 0xff, 0, 1, 0, 0, 0, 1}, huge...)...)),
		"fetch hostile forgotten": frame(head(1, 7, append(make([]byte, 29), huge...)...)),
	}
	for _, a := range apiList() { // every request cut short after its header, in its lowest and highest version
		for _, v := range []int16{a.served(), a.max} {
			switch a.key {
			case keyAPIVersions, keyMetadata, keyListGroups: // these have versions without a body
			default:
				cases[fmt.Sprintf("%s v%d without body", a.name, v)] = frame(head(a.key, v, 0))
			}
		}
	}
	for name, b := range cases {
		t.Run(name, func(t *testing.T) {
			c := w.dial(t)
			c.send(b)
			if !c.closed() {
				t.Error("the connection stays open")
			}
		})
	}
	if r := w.dial(t).ask(kmsg.NewPtrMetadataRequest(), 1).(*kmsg.MetadataResponse); len(r.Brokers) != 1 {
		t.Error("the broker does not answer any more")
	}
}

// Item 6: answers come in the order of the requests, also when later ones could be answered first; acks=0 has none.
func TestItem06Order(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 1, nil)
	c := w.dial(t)
	var all []byte
	var want []int32
	for i := range 20 {
		all = append(all, c.encode(produceReq("t", -1, batchBytes(t, record.CodecNone, "v")), 7)...)
		want = append(want, c.corr)
		if i%3 == 0 {
			all = append(all, c.encode(produceReq("t", 0, batchBytes(t, record.CodecNone, "silent")), 7)...)
		}
		if i%5 == 0 {
			all = append(all, c.encode(kmsg.NewPtrMetadataRequest(), 1)...)
			want = append(want, c.corr)
		}
	}
	c.send(all)
	for _, id := range want {
		if corr, _, err := c.receive(); err != nil || corr != id {
			t.Fatalf("answer %d where %d is due: %v", corr, id, err)
		}
	}
	topic, _ := w.Cluster().Topic("t")
	if i, _ := w.Partition(record.TopicPartition{Topic: topic.ID}); i.HighWatermark != 27 {
		t.Errorf("%d records, want 20 and 7 silent ones", i.HighWatermark)
	}
}

// Item 7: acks=0 with an error closes the connection; acks outside -1..1 is refused.
func TestItem07Acks(t *testing.T) {
	w := start(t, nil)
	c := w.dial(t)
	c.send(c.encode(produceReq("nothing", 0, batchBytes(t, record.CodecNone, "v")), 7))
	if !c.closed() {
		t.Error("acks=0 with an error leaves the connection open")
	}
	w.topic(t, "t", 1, nil)
	if r := w.dial(t).ask(produceReq("t", 2, batchBytes(t, record.CodecNone, "v")), 7).(*kmsg.ProduceResponse); r.Topics[0].Partitions[0].ErrorCode != codeInvalidRequiredAcks {
		t.Errorf("acks=2: %d", r.Topics[0].Partitions[0].ErrorCode)
	}
}

// Items 11 to 18: what is refused, and with which code.
func TestItem11To18ProduceRefusals(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 1, nil)
	w.topic(t, "small", 1, map[string]string{"max.message.bytes": "200"})
	w.topic(t, "before", 1, map[string]string{"message.timestamp.before.max.ms": "1000"})
	good := batchBytes(t, record.CodecNone, "value")
	change := func(f func(b record.Batch)) []byte {
		b := record.Batch(bytes.Clone(good))
		f(b)
		b.SealCRC()
		return b
	}
	stamp := func(ts time.Time) []byte {
		x := record.NewBuilder(record.CodecNone)
		x.Add(record.Timestamp(ts.UnixMilli()), nil, []byte("v"))
		b, _ := x.Batch()
		return b
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	zeros := record.NewBuilder(record.CodecZstd)
	zeros.Add(1, nil, make([]byte, 300<<20))
	bomb, err := zeros.Batch()
	if err != nil {
		t.Fatal(err)
	}
	txn := record.NewBuilder(record.CodecNone)
	txn.ProducerID, txn.ProducerEpoch, txn.BaseSequence, txn.Transactional = 1, 0, 0, true
	txn.Add(record.Timestamp(time.Now().UnixMilli()), nil, nil)
	transactional, _ := txn.Batch()
	for _, x := range []struct {
		name, topic string
		records     []byte
		version     int16
		code        int16
	}{
		{"good", "t", good, 7, codeNone},
		{"unknown topic", "nothing", good, 7, codeUnknownTopicOrPartition},
		{"magic 0", "t", change(func(b record.Batch) { b[16] = 0 }), 7, codeInvalidRecord},
		{"magic 1", "t", change(func(b record.Batch) { b[16] = 1 }), 7, codeInvalidRecord},
		{"magic 3", "t", change(func(b record.Batch) { b[16] = 3 }), 7, codeInvalidRecord},
		{"wrong CRC", "t", flipped, 7, codeCorruptMessage},
		{"cut off", "t", good[:len(good)-3], 7, codeCorruptMessage},
		{"no bytes", "t", nil, 7, codeCorruptMessage},
		{"two batches", "t", append(bytes.Clone(good), good...), 7, codeInvalidRecord},
		{"control batch", "t", change(func(b record.Batch) { b[22] |= 0x20 }), 7, codeInvalidRecord},
		{"count 0", "t", change(func(b record.Batch) { b[60] = 0 }), 7, codeInvalidRecord},
		{"count against delta", "t", change(func(b record.Batch) { b[60] = 2 }), 7, codeInvalidRecord},
		{"unknown codec", "t", change(func(b record.Batch) { b[22] |= 6 }), 7, codeUnsupportedCompression},
		{"garbage zstd", "t", change(func(b record.Batch) { b[22] |= 4 }), 7, codeInvalidRecord},
		{"bomb", "t", bomb, 7, codeMessageTooLarge},
		{"zstd before 7", "t", batchBytes(t, record.CodecZstd, "v"), 6, codeUnsupportedCompression},
		{"zstd", "t", batchBytes(t, record.CodecZstd, "v"), 7, codeNone},
		{"too large", "small", batchBytes(t, record.CodecNone, string(make([]byte, 300))), 7, codeMessageTooLarge},
		{"not too large", "small", batchBytes(t, record.CodecNone, "v"), 7, codeNone},
		{"future", "t", stamp(time.Now().Add(2 * time.Hour)), 7, codeInvalidTimestamp},
		{"past", "before", stamp(time.Now().Add(-time.Hour)), 7, codeInvalidTimestamp},
		{"past is allowed", "t", stamp(time.Now().Add(-time.Hour)), 7, codeNone},
		{"transactional", "t", transactional, 7, codeInvalidTransactionState},
	} {
		r := w.dial(t).ask(produceReq(x.topic, -1, x.records), x.version).(*kmsg.ProduceResponse)
		if p := r.Topics[0].Partitions[0]; p.ErrorCode != x.code || (x.code == codeNone) != (p.BaseOffset >= 0) {
			t.Errorf("%s: code %d offset %d, want %d", x.name, p.ErrorCode, p.BaseOffset, x.code)
		}
	}
}

// Item 15: LogAppendTime. Item 19: the topic's compression. Both change bytes and keep what a client reads.
func TestItem15And19Rewriting(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "time", 1, map[string]string{"message.timestamp.type": "LogAppendTime"})
	w.topic(t, "lz4", 1, map[string]string{"compression.type": "lz4"})
	c := w.dial(t)
	r := c.ask(produceReq("time", -1, batchBytes(t, record.CodecNone, "a")), 8).(*kmsg.ProduceResponse)
	at := r.Topics[0].Partitions[0].LogAppendTime
	c.ask(produceReq("lz4", -1, batchBytes(t, record.CodecGzip, "a", "b")), 8)
	for topic, check := range map[string]func(record.Batch) bool{
		"time": func(b record.Batch) bool { return b.HasLogAppendTime() && int64(b.MaxTimestamp()) == at && at > 0 },
		"lz4":  func(b record.Batch) bool { return b.Codec() == record.CodecLZ4 && b.Count() == 2 },
	} {
		b := fetchBatch(t, c, topic, 0)
		if err := record.Validate(b, record.Limits{Walk: true}); err != nil || !check(b) {
			t.Errorf("%s: %v", topic, err)
		}
	}
}

func fetchReq(topic string, offset int64) *kmsg.FetchRequest {
	r := kmsg.NewPtrFetchRequest()
	r.MaxBytes, r.MaxWaitMillis, r.MinBytes, r.SessionEpoch = 1<<20, 0, 1, -1
	x := kmsg.NewFetchRequestTopic()
	x.Topic = topic
	p := kmsg.NewFetchRequestTopicPartition()
	p.FetchOffset, p.PartitionMaxBytes, p.CurrentLeaderEpoch = offset, 1<<20, -1
	x.Partitions = append(x.Partitions, p)
	r.Topics = append(r.Topics, x)
	return r
}

func fetchBatch(t testing.TB, c *raw, topic string, offset int64) record.Batch {
	t.Helper()
	r := c.ask(fetchReq(topic, offset), 11).(*kmsg.FetchResponse)
	p := r.Topics[0].Partitions[0]
	if p.ErrorCode != 0 {
		t.Fatalf("fetch: %d", p.ErrorCode)
	}
	b, _, err := record.Next(p.RecordBatches)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Items 14, 30 of the incidents: a client's bytes come back unchanged but for base offset and leader epoch, for every codec.
func TestItem14BytesUnchanged(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 1, nil)
	c := w.dial(t)
	offset := int64(0)
	for codec := record.CodecNone; codec <= record.CodecZstd; codec++ {
		sent := batchBytes(t, codec, "a", "b", string(make([]byte, 5000)))
		c.ask(produceReq("t", -1, sent), 9)
		got := fetchBatch(t, c, "t", offset)
		if got.BaseOffset() != record.Offset(offset) || got.LeaderEpoch() < 1 {
			t.Errorf("%s: base offset %d, epoch %d", codec, got.BaseOffset(), got.LeaderEpoch())
		}
		record.PatchHeader(got, 0, -1)
		if !bytes.Equal(got, sent) {
			t.Errorf("%s: bytes differ", codec)
		}
		offset += 3
	}
}

// Items 23 to 26 through the protocol: a repeat has its original offset, a gap is refused.
func TestItem23To29Idempotence(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 1, nil)
	c := w.dial(t)
	a := c.ask(kmsg.NewPtrInitProducerIDRequest(), 4).(*kmsg.InitProducerIDResponse)
	b := c.ask(kmsg.NewPtrInitProducerIDRequest(), 0).(*kmsg.InitProducerIDResponse)
	if a.ErrorCode != 0 || b.ErrorCode != 0 || a.ProducerID == b.ProducerID || a.ProducerEpoch != 0 {
		t.Fatalf("%+v %+v", a, b)
	}
	send := func(seq record.Sequence) (int16, int64) {
		x := record.NewBuilder(record.CodecNone)
		x.ProducerID, x.ProducerEpoch, x.BaseSequence = record.ProducerID(a.ProducerID), 0, seq
		x.Add(record.Timestamp(time.Now().UnixMilli()), nil, []byte("v"))
		batch, _ := x.Batch()
		p := c.ask(produceReq("t", -1, batch), 9).(*kmsg.ProduceResponse).Topics[0].Partitions[0]
		return p.ErrorCode, p.BaseOffset
	}
	for i, x := range []struct {
		seq    record.Sequence
		code   int16
		offset int64
	}{{0, 0, 0}, {1, 0, 1}, {0, 0, 0}, {1, 0, 1}, {3, codeOutOfOrderSequence, -1}, {2, 0, 2}} {
		if code, off := send(x.seq); code != x.code || off != x.offset {
			t.Errorf("case %d: %d %d, want %d %d", i, code, off, x.code, x.offset)
		}
	}
}

// Items 41 to 44, 47: limits, ranges, epochs, long polls.
func TestItem41To47Fetch(t *testing.T) {
	w := start(t, func(c *Config) { c.FetchWait = time.Hour })
	w.topic(t, "t", 1, nil)
	c := w.dial(t)
	for range 3 {
		c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "a", "b")), 9)
	}
	part := func(r *kmsg.FetchRequest, v int16) kmsg.FetchResponseTopicPartition {
		t.Helper()
		return c.ask(r, v).(*kmsg.FetchResponse).Topics[0].Partitions[0]
	}
	one := fetchReq("t", 0)
	one.MaxBytes, one.Topics[0].Partitions[0].PartitionMaxBytes = 1, 1
	if p := part(one, 11); len(p.RecordBatches) == 0 {
		t.Error("the first batch is not returned whole beyond the limits")
	}
	if b := fetchBatch(t, c, "t", 3); b.BaseOffset() != 2 {
		t.Errorf("the batch that holds offset 3 begins at %d", b.BaseOffset())
	}
	if p := part(fetchReq("t", 6), 11); p.ErrorCode != 0 || len(p.RecordBatches) != 0 || p.HighWatermark != 6 {
		t.Errorf("at the end: %+v", p)
	}
	if p := part(fetchReq("t", 7), 11); p.ErrorCode != codeOffsetOutOfRange {
		t.Errorf("beyond the end: %d", p.ErrorCode)
	}
	for epoch, code := range map[int32]int16{0: codeFencedLeaderEpoch, 99: codeUnknownLeaderEpoch} {
		r := fetchReq("t", 0)
		r.Topics[0].Partitions[0].CurrentLeaderEpoch = epoch
		if p := part(r, 11); p.ErrorCode != code {
			t.Errorf("epoch %d: %d, want %d", epoch, p.ErrorCode, code)
		}
	}
	poll := fetchReq("t", 6) // woken by the produce: the connection's deadline comes long before its time is over
	poll.MaxWaitMillis = 3_600_000
	c.send(c.encode(poll, 11))
	w.dial(t).ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "new")), 9)
	_, body, err := c.receive()
	if err != nil || !bytes.Contains(body, []byte("new")) {
		t.Errorf("long poll: %v", err)
	}
}

// Item 45: sessions. An incremental fetch names only what changed.
func TestItem45Sessions(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 3, nil)
	c := w.dial(t)
	r := fetchReq("t", 0)
	for p := int32(1); p < 3; p++ {
		x := kmsg.NewFetchRequestTopicPartition()
		x.Partition, x.PartitionMaxBytes, x.CurrentLeaderEpoch = p, 1<<20, -1
		r.Topics[0].Partitions = append(r.Topics[0].Partitions, x)
	}
	r.SessionEpoch = 0
	full := c.ask(r, 11).(*kmsg.FetchResponse)
	if full.SessionID == 0 || len(full.Topics[0].Partitions) != 3 {
		t.Fatalf("full fetch: %+v", full)
	}
	next := func(epoch int32) *kmsg.FetchResponse {
		x := kmsg.NewPtrFetchRequest()
		x.MaxBytes, x.MinBytes, x.SessionID, x.SessionEpoch = 1<<20, 1, full.SessionID, epoch
		return c.ask(x, 11).(*kmsg.FetchResponse)
	}
	if x := next(1); x.ErrorCode != 0 || len(x.Topics) != 0 {
		t.Errorf("nothing has changed: %+v", x)
	}
	w.dial(t).ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "v")), 9)
	if x := next(2); len(x.Topics) != 1 || len(x.Topics[0].Partitions) != 1 || x.Topics[0].Partitions[0].Partition != 0 {
		t.Errorf("one has changed: %+v", x)
	}
	if x := next(9); x.ErrorCode != codeInvalidFetchSessionEpoch {
		t.Errorf("wrong epoch: %d", x.ErrorCode)
	}
	full.SessionID++
	if x := next(1); x.ErrorCode != codeFetchSessionNotFound {
		t.Errorf("unknown session: %d", x.ErrorCode)
	}
}

// Items 63 to 68: topics and their settings.
func TestItem63To68Admin(t *testing.T) {
	w := start(t, nil)
	c := w.dial(t)
	create := func(name string, partitions int32, rf int16, configs ...string) int16 {
		r := kmsg.NewPtrCreateTopicsRequest()
		x := kmsg.NewCreateTopicsRequestTopic()
		x.Topic, x.NumPartitions, x.ReplicationFactor = name, partitions, rf
		for i := 0; i < len(configs); i += 2 {
			cfg := kmsg.NewCreateTopicsRequestTopicConfig()
			cfg.Name, cfg.Value = configs[i], &configs[i+1]
			x.Configs = append(x.Configs, cfg)
		}
		r.Topics = append(r.Topics, x)
		return c.ask(r, 7).(*kmsg.CreateTopicsResponse).Topics[0].ErrorCode
	}
	for _, x := range []struct {
		name       string
		partitions int32
		rf         int16
		configs    []string
		code       int16
	}{
		{"ok", 3, 1, nil, 0}, {"ok", 3, 1, nil, codeTopicExists}, {"defaults", -1, -1, nil, 0}, {"zero", 0, 1, nil, codeInvalidPartitions},
		{"many", 1, 2, nil, codeInvalidReplicationFactor}, {"a b", 1, 1, nil, codeInvalidTopic}, {"..", 1, 1, nil, codeInvalidTopic}, {"a/../b", 1, 1, nil, codeInvalidTopic},
		{"unknown", 1, 1, []string{"no.such", "1"}, codeInvalidConfig}, {"bad", 1, 1, []string{"retention.ms", "soon"}, codeInvalidConfig},
		{"compact", 1, 1, []string{"cleanup.policy", "compact"}, codeInvalidConfig}, {"inert", 1, 1, []string{"segment.bytes", "200"}, 0},
		{"unclean", 1, 1, []string{"unclean.leader.election.enable", "true"}, codeInvalidConfig}, {"big", 1, 1, []string{"max.message.bytes", "99999999"}, codeInvalidConfig},
	} {
		if code := create(x.name, x.partitions, x.rf, x.configs...); code != x.code {
			t.Errorf("create %s: %d, want %d", x.name, code, x.code)
		}
	}
	alter := func(op kmsg.IncrementalAlterConfigOp, key, v string) int16 {
		r := kmsg.NewPtrIncrementalAlterConfigsRequest()
		x := kmsg.NewIncrementalAlterConfigsRequestResource()
		x.ResourceType, x.ResourceName = kmsg.ConfigResourceTypeTopic, "ok"
		e := kmsg.NewIncrementalAlterConfigsRequestResourceConfig()
		e.Name, e.Op, e.Value = key, op, &v
		x.Configs = append(x.Configs, e)
		r.Resources = append(r.Resources, x)
		return c.ask(r, 1).(*kmsg.IncrementalAlterConfigsResponse).Resources[0].ErrorCode
	}
	if code := alter(kmsg.IncrementalAlterConfigOpSet, "retention.ms", "604800000"); code != 0 {
		t.Errorf("alter: %d", code)
	}
	if code := alter(kmsg.IncrementalAlterConfigOpAppend, "retention.ms", "1"); code != codeInvalidConfig {
		t.Errorf("append to a number: %d", code)
	}
	d := kmsg.NewPtrDescribeConfigsRequest()
	x := kmsg.NewDescribeConfigsRequestResource()
	x.ResourceType, x.ResourceName, x.ConfigNames = kmsg.ConfigResourceTypeTopic, "ok", []string{"retention.ms", "segment.bytes"}
	d.Resources = append(d.Resources, x)
	rows := c.ask(d, 4).(*kmsg.DescribeConfigsResponse).Resources[0].Configs
	if len(rows) != 2 || rows[0].Source != kmsg.ConfigSourceDynamicTopicConfig || *rows[0].Value != "604800000" || rows[1].Source != kmsg.ConfigSourceDefaultConfig {
		t.Errorf("a value that equals the default is still the topic's: %+v", rows)
	}
}

// A real client: a group of three rebalances, commits, and goes on where it was.
func TestGroupsWithARealClient(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 6, nil)
	open := func(opts ...kgo.Opt) *kgo.Client {
		cl, err := kgo.NewClient(append([]kgo.Opt{kgo.SeedBrokers(w.addr), kgo.HeartbeatInterval(100 * time.Millisecond)}, opts...)...)
		if err != nil {
			t.Fatal(err)
		}
		return cl
	}
	p := open()
	var recs []*kgo.Record
	for i := range 600 {
		recs = append(recs, &kgo.Record{Topic: "t", Key: []byte(fmt.Sprint(i)), Value: []byte(fmt.Sprint(i))})
	}
	if err := p.ProduceSync(t.Context(), recs...).FirstErr(); err != nil {
		t.Fatal(err)
	}
	p.Close()
	var mu sync.Mutex
	seen := map[string]int{}
	ctx, cancel := context.WithTimeout(t.Context(), waitMost)
	defer cancel()
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			cl := open(kgo.ConsumerGroup("g"), kgo.ConsumeTopics("t"), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
			defer cl.Close()
			for {
				select {
				case <-done:
					return
				default:
				}
				poll, stop := context.WithTimeout(ctx, 200*time.Millisecond)
				fs := cl.PollFetches(poll)
				stop()
				mu.Lock()
				fs.EachRecord(func(r *kgo.Record) { seen[string(r.Value)]++ })
				if len(seen) == 600 {
					select {
					case <-done:
					default:
						close(done)
					}
				}
				mu.Unlock()
				if ctx.Err() != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	if len(seen) != 600 {
		t.Fatalf("%d of 600 records", len(seen))
	}
	g := w.dial(t)
	d := kmsg.NewPtrDescribeGroupsRequest()
	d.Groups = []string{"g", "nothing"}
	r := g.ask(d, 5).(*kmsg.DescribeGroupsResponse)
	if r.Groups[0].State != "Empty" || r.Groups[1].State != "Dead" {
		t.Errorf("states %s and %s after everybody left", r.Groups[0].State, r.Groups[1].State)
	}
}
