package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Item 5: tagged fields that are not known are skipped, in the request and in what it contains, and never come back.
func TestItem05UnknownTags(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 1, nil)
	c := w.dial(t)
	mark := bytes.Repeat([]byte("tag"), 50)
	tag := func(x interface{ Set(uint32, []byte) }) { x.Set(77, mark) }
	m := kmsg.NewPtrMetadataRequest()
	mt := kmsg.NewMetadataRequestTopic()
	mt.Topic = kmsg.StringPtr("t")
	tag(&mt.UnknownTags)
	tag(&m.UnknownTags)
	m.Topics = append(m.Topics, mt)
	p := produceReq("t", -1, batchBytes(t, record.CodecNone, "v"))
	tag(&p.UnknownTags)
	tag(&p.Topics[0].UnknownTags)
	tag(&p.Topics[0].Partitions[0].UnknownTags)
	f := fetchReq("t", 0)
	topic, _ := w.Cluster().Topic("t")
	f.Topics[0].TopicID = topic.ID
	tag(&f.UnknownTags)
	tag(&f.Topics[0].UnknownTags)
	tag(&f.Topics[0].Partitions[0].UnknownTags)
	for _, x := range []struct {
		req     kmsg.Request
		version int16
	}{{p, 11}, {m, 12}, {f, 16}} {
		c.send(c.encode(x.req, x.version))
		corr, body, err := c.receive()
		if err != nil || corr != c.corr || bytes.Contains(body, mark[:6]) {
			t.Errorf("%T: correlation %d, %v, echoed %v", x.req, corr, err, bytes.Contains(body, mark[:6]))
		}
	}
	if b := fetchBatch(t, c, "t", 0); b.Count() != 1 {
		t.Error("the record behind the tags is not there")
	}
}

// Item 10: null and empty are told apart, in what is asked and in what is answered.
func TestItem10NullAndEmpty(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "a", 1, nil)
	w.topic(t, "b", 1, nil)
	c := w.dial(t)
	for _, x := range []struct {
		version int16
		topics  []kmsg.MetadataRequestTopic
		want    int
	}{{0, []kmsg.MetadataRequestTopic{}, 2}, {1, nil, 2}, {1, []kmsg.MetadataRequestTopic{}, 0}, {12, nil, 2}, {12, []kmsg.MetadataRequestTopic{}, 0}} {
		r := kmsg.NewPtrMetadataRequest()
		r.Topics = x.topics
		if got := c.ask(r, x.version).(*kmsg.MetadataResponse); len(got.Topics) != x.want {
			t.Errorf("v%d, %d topics asked (null %v): %d answered, want %d", x.version, len(x.topics), x.topics == nil, len(got.Topics), x.want)
		}
	}
	for isolation, null := range map[int8]bool{0: true, 1: false} {
		r := fetchReq("a", 0)
		r.IsolationLevel = isolation
		p := c.ask(r, 11).(*kmsg.FetchResponse).Topics[0].Partitions[0]
		if (p.AbortedTransactions == nil) != null {
			t.Errorf("isolation level %d: aborted transactions null %v", isolation, p.AbortedTransactions == nil)
		}
		if p.RecordBatches == nil {
			t.Error("no records are null, want zero bytes")
		}
	}
}

// gate is a backend whose appends wait until it opens.
type gate struct {
	*raftmeta.Host
	open  chan struct{}
	ended chan struct{} // one value for each append that waited
}

func (g *gate) Append(ctx context.Context, r raftmeta.AppendRequest, done func([]raftmeta.AppendResult)) {
	select {
	case <-g.open:
		g.Host.Append(ctx, r, done)
		return
	default:
	}
	for i := range r.Batches { // the frame is given back when Append returns
		r.Batches[i].Batch = bytes.Clone(r.Batches[i].Batch)
	}
	go func() {
		<-g.open
		g.Host.Append(context.Background(), raftmeta.AppendRequest{Batches: r.Batches}, done)
		g.ended <- struct{}{}
	}()
}

// Item 20: a record that is not durable within the request's timeout is answered REQUEST_TIMED_OUT, in the order of the requests, and what comes later is not
// answered twice. The record may still become durable.
func TestItem20Timeout(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 1, nil)
	g := &gate{w.Host, make(chan struct{}), make(chan struct{}, 1)}
	cfg := DefaultConfig()
	cfg.Registerer = prometheus.NewRegistry()
	s := NewServer(cfg, g, hotReader{w.Host})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	defer func() {
		_ = s.Close()
		if err := <-served; !errors.Is(err, ErrServerClosed) {
			t.Errorf("serve: %v", err)
		}
	}()
	c := (&whole{addr: l.Addr().String()}).dial(t)
	r := produceReq("t", -1, batchBytes(t, record.CodecNone, "slow"))
	r.TimeoutMillis = 1
	c.send(append(c.encode(r, 9), c.encode(kmsg.NewPtrMetadataRequest(), 1)...))
	corr, body, err := c.receive()
	resp := kmsg.NewPtrProduceResponse()
	resp.Version = 9
	if err != nil || corr != c.corr-1 || resp.ReadFrom(body[1:]) != nil || resp.Topics[0].Partitions[0].ErrorCode != codeRequestTimedOut {
		t.Fatalf("correlation %d, %v, %+v", corr, err, resp)
	}
	if corr, _, err := c.receive(); err != nil || corr != c.corr {
		t.Fatalf("the request behind it: %d %v", corr, err)
	}
	close(g.open)
	<-g.ended
	if x := c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "next")), 9).(*kmsg.ProduceResponse).Topics[0].Partitions[0]; x.ErrorCode != 0 || x.BaseOffset != 1 {
		t.Errorf("the next record: code %d, offset %d, want 1 behind the late one", x.ErrorCode, x.BaseOffset)
	}
}

// Item 22: the base offset of an answer is the batch's first, and the log start is told from version 5.
func TestItem22BaseOffset(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 1, nil)
	c := w.dial(t)
	for i := range int64(3) {
		p := c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "a", "b", "c")), 5).(*kmsg.ProduceResponse).Topics[0].Partitions[0]
		if p.BaseOffset != 3*i || p.LogStartOffset != 0 || p.LogAppendTime != -1 {
			t.Errorf("%+v, want base offset %d", p, 3*i)
		}
	}
}

// Item 42: a fetch that waits is answered at once when a partition has an error, when there are no partitions, and when the partitions together have min_bytes.
func TestItem42AtOnce(t *testing.T) {
	w := start(t, func(c *Config) { c.FetchWait = time.Hour })
	w.topic(t, "t", 2, nil)
	c := w.dial(t)
	value := string(make([]byte, 600))
	c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, value), batchBytes(t, record.CodecNone, value)), 9)
	two := func(maxWait, minBytes int32, second int64) *kmsg.FetchRequest {
		r := fetchReq("t", 0)
		r.MaxWaitMillis, r.MinBytes = maxWait, minBytes
		x := kmsg.NewFetchRequestTopicPartition()
		x.Partition, x.FetchOffset, x.PartitionMaxBytes, x.CurrentLeaderEpoch = 1, second, 1<<20, -1
		r.Topics[0].Partitions = append(r.Topics[0].Partitions, x)
		return r
	}
	const long = 3_600_000 // an answer that waits for it fails the test by the connection's deadline
	if r := c.ask(two(long, 1200, 0), 11).(*kmsg.FetchResponse); len(r.Topics[0].Partitions[1].RecordBatches) == 0 {
		t.Error("the partitions together have min_bytes, one came")
	}
	if r := c.ask(two(long, 1<<20, 99), 11).(*kmsg.FetchResponse); r.Topics[0].Partitions[1].ErrorCode != codeOffsetOutOfRange {
		t.Errorf("an error: %+v", r.Topics[0].Partitions[1].ErrorCode)
	}
	none := fetchReq("t", 0)
	none.Topics, none.MaxWaitMillis = nil, long
	c.ask(none, 11)
	if r := c.ask(two(1, 1<<20, 0), 11).(*kmsg.FetchResponse); len(r.Topics[0].Partitions[0].RecordBatches) == 0 {
		t.Error("when the time is over, what is there is answered")
	}
}

// Items 43 and 53: DeleteRecords raises the log start; what lies below is out of range, and the answer tells the bounds; beyond the high watermark nothing is deleted.
func TestItem43And53LogStart(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 1, nil)
	c := w.dial(t)
	for range 3 {
		c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "a", "b")), 9)
	}
	cut := func(offset int64) kmsg.DeleteRecordsResponseTopicPartition {
		r := kmsg.NewPtrDeleteRecordsRequest()
		r.TimeoutMillis = 5000
		x := kmsg.NewDeleteRecordsRequestTopic()
		x.Topic = "t"
		p := kmsg.NewDeleteRecordsRequestTopicPartition()
		p.Offset = offset
		x.Partitions = append(x.Partitions, p)
		r.Topics = append(r.Topics, x)
		return c.ask(r, 2).(*kmsg.DeleteRecordsResponse).Topics[0].Partitions[0]
	}
	if p := cut(7); p.ErrorCode != codeOffsetOutOfRange {
		t.Errorf("beyond the end: %+v", p)
	}
	if p := cut(3); p.ErrorCode != 0 || p.LowWatermark != 3 {
		t.Errorf("at 3: %+v", p)
	}
	for _, offset := range []int64{0, 2} {
		p := c.ask(fetchReq("t", offset), 11).(*kmsg.FetchResponse).Topics[0].Partitions[0]
		if p.ErrorCode != codeOffsetOutOfRange || p.LogStartOffset != 3 || p.HighWatermark != 6 {
			t.Errorf("fetch at %d: %+v", offset, p)
		}
	}
	if b := fetchBatch(t, c, "t", 3); b.BaseOffset() != 2 {
		t.Errorf("the batch that the log start lies in begins at %d", b.BaseOffset())
	}
	if p := cut(-1); p.ErrorCode != 0 || p.LowWatermark != 6 {
		t.Errorf("all: %+v", p)
	}
	if p := cut(1); p.ErrorCode != 0 || p.LowWatermark != 6 { // never back
		t.Errorf("below the log start: %+v", p)
	}
}

// Item 46: topic IDs. An unknown one is a partition's error; a topic that is made again has another.
func TestItem46TopicIDs(t *testing.T) {
	w := start(t, nil)
	old := w.topic(t, "t", 1, nil)
	c := w.dial(t)
	c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "old")), 9)
	byID := func(id record.TopicID) kmsg.FetchResponseTopicPartition {
		r := fetchReq("", 0)
		r.Topics[0].TopicID = id
		return c.ask(r, 13).(*kmsg.FetchResponse).Topics[0].Partitions[0]
	}
	if p := byID(old.ID); p.ErrorCode != 0 || len(p.RecordBatches) == 0 {
		t.Errorf("by ID: %+v", p)
	}
	if err := w.DeleteTopics(t.Context(), []record.TopicID{old.ID})[0]; err != nil {
		t.Fatal(err)
	}
	again := w.topic(t, "t", 1, nil)
	if again.ID == old.ID {
		t.Fatal("a topic that is made again has the old ID")
	}
	if p := byID(old.ID); p.ErrorCode != codeUnknownTopicID {
		t.Errorf("the old ID: %d", p.ErrorCode)
	}
	if p := byID(again.ID); p.ErrorCode != 0 || p.HighWatermark != 0 {
		t.Errorf("the new topic inherits: %+v", p)
	}
	r := fetchReq("", 0) // a session that was begun by ID and goes on by name
	r.Topics[0].TopicID, r.SessionEpoch = again.ID, 0
	ses := c.ask(r, 13).(*kmsg.FetchResponse)
	next := kmsg.NewPtrFetchRequest()
	next.SessionID, next.SessionEpoch = ses.SessionID, 1
	if x := c.ask(next, 12).(*kmsg.FetchResponse); x.ErrorCode != codeInconsistentTopicID || len(x.Topics) != 0 {
		t.Errorf("by name in a session by ID: %d", x.ErrorCode)
	}
}

// Item 48: the end of the largest epoch that is not above the one asked for. Item 49: a fetch from another history learns where it diverges; no other replica is preferred.
func TestItem48And49Epochs(t *testing.T) {
	w := start(t, nil)
	topic := w.topic(t, "t", 1, nil)
	c := w.dial(t)
	c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "a", "b")), 9)
	info, err := w.Partition(record.TopicPartition{Topic: topic.ID})
	if err != nil {
		t.Fatal(err)
	}
	epoch := int32(info.LeaderEpoch)
	ask := func(e int32) kmsg.OffsetForLeaderEpochResponseTopicPartition {
		r := kmsg.NewPtrOffsetForLeaderEpochRequest()
		x := kmsg.NewOffsetForLeaderEpochRequestTopic()
		x.Topic = "t"
		p := kmsg.NewOffsetForLeaderEpochRequestTopicPartition()
		p.CurrentLeaderEpoch, p.LeaderEpoch = -1, e
		x.Partitions = append(x.Partitions, p)
		r.Topics = append(r.Topics, x)
		return c.ask(r, 4).(*kmsg.OffsetForLeaderEpochResponse).Topics[0].Partitions[0]
	}
	if p := ask(epoch); p.LeaderEpoch != epoch || p.EndOffset != 2 {
		t.Errorf("the current epoch %d: %+v", epoch, p)
	}
	if p := ask(epoch + 5); p.ErrorCode != 0 || p.LeaderEpoch != -1 || p.EndOffset != -1 {
		t.Errorf("an epoch that has not been: %+v", p)
	}
	r := fetchReq("t", 2)
	r.Topics[0].Partitions[0].LastFetchedEpoch = epoch
	if p := c.ask(r, 12).(*kmsg.FetchResponse).Topics[0].Partitions[0]; p.ErrorCode != 0 || p.DivergingEpoch.EndOffset >= 0 || p.PreferredReadReplica != -1 {
		t.Errorf("of this history: %+v", p)
	}
	for last, end := range map[int32]int64{epoch - 1: 0, epoch + 5: 2} {
		r.Topics[0].Partitions[0].LastFetchedEpoch = last
		if p := c.ask(r, 12).(*kmsg.FetchResponse).Topics[0].Partitions[0]; p.DivergingEpoch.EndOffset != end || len(p.RecordBatches) != 0 {
			t.Errorf("of another history, epoch %d: %+v, want %d", last, p.DivergingEpoch, end)
		}
	}
}

// lagging is a backend that has not applied the last record until it has proven itself.
type lagging struct {
	*raftmeta.Host
	proofs atomic.Int32
	refuse atomic.Bool
}

func (b *lagging) Prove(ctx context.Context, s record.ShardID) error {
	if b.refuse.Load() {
		return raftmeta.ErrNotLeader
	}
	b.proofs.Add(1)
	return b.Host.Prove(ctx, s)
}

func (b *lagging) late() record.Offset {
	if b.proofs.Load() == 0 {
		return 1
	}
	return 0
}

func (b *lagging) Partition(tp record.TopicPartition) (state.PartitionInfo, error) {
	i, err := b.Host.Partition(tp)
	i.HighWatermark -= b.late()
	i.LastStableOffset = i.HighWatermark
	return i, err
}

func (b *lagging) EpochEnd(tp record.TopicPartition, e record.LeaderEpoch) (record.LeaderEpoch, record.Offset, error) {
	e, end, err := b.Host.EpochEnd(tp, e)
	return e, end - b.late(), err
}

// A node that is behind tells no client that it diverges, nor where an epoch ended, before it has all that was acknowledged; one that cannot know says so.
func TestDivergenceIsNeverAGuess(t *testing.T) {
	w := start(t, nil)
	topic := w.topic(t, "t", 1, nil)
	w.dial(t).ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "a")), 9)
	w.dial(t).ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "b")), 9)
	info, err := w.Partition(record.TopicPartition{Topic: topic.ID})
	if err != nil || info.HighWatermark != 2 {
		t.Fatal(info.HighWatermark, err)
	}
	b := &lagging{Host: w.Host}
	c := serveAlso(t, b, hotReader{w.Host})
	fetch := func() kmsg.FetchResponseTopicPartition {
		r := fetchReq("t", 2)
		r.Topics[0].Partitions[0].LastFetchedEpoch = int32(info.LeaderEpoch)
		return c.ask(r, 12).(*kmsg.FetchResponse).Topics[0].Partitions[0]
	}
	end := func() kmsg.OffsetForLeaderEpochResponseTopicPartition {
		r := kmsg.NewPtrOffsetForLeaderEpochRequest()
		x := kmsg.NewOffsetForLeaderEpochRequestTopic()
		x.Topic = "t"
		p := kmsg.NewOffsetForLeaderEpochRequestTopicPartition()
		p.CurrentLeaderEpoch, p.LeaderEpoch = -1, int32(info.LeaderEpoch)
		x.Partitions = append(x.Partitions, p)
		r.Topics = append(r.Topics, x)
		return c.ask(r, 4).(*kmsg.OffsetForLeaderEpochResponse).Topics[0].Partitions[0]
	}
	b.refuse.Store(true)
	if p := fetch(); p.ErrorCode != codeOffsetNotAvailable || p.DivergingEpoch.EndOffset >= 0 {
		t.Errorf("a fetch that cannot be judged: %+v", p)
	}
	if p := end(); p.ErrorCode != codeOffsetNotAvailable || p.EndOffset >= 0 {
		t.Errorf("the end of an epoch that is not known: %+v", p)
	}
	b.refuse.Store(false)
	if p := fetch(); p.ErrorCode != 0 || p.DivergingEpoch.EndOffset >= 0 || p.HighWatermark != 2 {
		t.Errorf("a fetch behind the last record: %+v", p)
	}
	b.proofs.Store(0)
	if p := end(); p.ErrorCode != 0 || p.EndOffset != 2 {
		t.Errorf("the end of the epoch: %+v", p)
	}
}

// serveAlso serves another backend, and dials it.
func serveAlso(t *testing.T, b Backend, read Reader) *raw {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Registerer = prometheus.NewRegistry()
	s := NewServer(cfg, b, read)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close(); <-served })
	return (&whole{addr: l.Addr().String()}).dial(t)
}

// Item 50: answers that are not read take at most the budget, each at most its share, and what a connection held is free when it ends.
func TestItem50AnswersAreBounded(t *testing.T) {
	const budget = 8 << 20
	w := start(t, func(c *Config) { c.ResponseBudget = budget })
	w.topic(t, "t", 1, nil)
	c := w.dial(t)
	value := string(make([]byte, 900<<10))
	for range 4 {
		c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, value)), 9)
	}
	r := fetchReq("t", 0)
	r.MaxBytes, r.Topics[0].Partitions[0].PartitionMaxBytes = 1<<30, 1<<30
	if p := c.ask(r, 11).(*kmsg.FetchResponse).Topics[0].Partitions[0]; len(p.RecordBatches) > budget/answerShare {
		t.Errorf("one answer has %d bytes, the share is %d", len(p.RecordBatches), budget/answerShare)
	}
	stuck := make([]*raw, 40)
	for i := range stuck {
		stuck[i] = w.dial(t)
		var all []byte
		for range 8 { // more than the sockets take
			all = append(all, stuck[i].encode(r, 11)...)
		}
		stuck[i].send(all)
	}
	eventually(t, "the budget to be used up", func() bool { return !w.s.answers.TryAcquire(budget/answerShare) || release(w.s, budget/answerShare) })
	for _, x := range stuck {
		_ = x.Close()
	}
	if p := c.ask(r, 11).(*kmsg.FetchResponse).Topics[0].Partitions[0]; len(p.RecordBatches) == 0 {
		t.Error("nothing is answered after the connections have ended")
	}
	eventually(t, "the budget to be free", func() bool { return w.s.answers.TryAcquire(budget) && !release(w.s, budget) })
}

func release(s *Server, n int64) bool {
	s.answers.Release(n)
	return false
}

// eventually polls what other goroutines do; there is no event to wait for.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(waitMost); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not after %s", what, waitMost)
		}
	}
}

// Items 56, 60 and 61: what a group is given comes back as it was; every partition that is asked for is answered, also of unknown groups; the coordinator is this broker,
// and errors are those of the version.
func TestItem56And60And61Groups(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 2, nil)
	c := w.dial(t)
	join := kmsg.NewPtrJoinGroupRequest()
	join.Group, join.ProtocolType, join.SessionTimeoutMillis, join.RebalanceTimeoutMillis = "g", "connect", 600_000, 600_000
	proto := kmsg.NewJoinGroupRequestProtocol()
	proto.Name, proto.Metadata = "sessioned", []byte{0, 255, 7}
	join.Protocols = append(join.Protocols, proto)
	first := c.ask(join, 9).(*kmsg.JoinGroupResponse)
	if first.ErrorCode != codeMemberIDRequired {
		t.Fatalf("join: %+v", first)
	}
	join.MemberID = first.MemberID
	j := c.ask(join, 9).(*kmsg.JoinGroupResponse)
	if j.ErrorCode != 0 || j.ProtocolType == nil || *j.ProtocolType != "connect" || *j.Protocol != "sessioned" || !bytes.Equal(j.Members[0].ProtocolMetadata, proto.Metadata) {
		t.Fatalf("join: %+v", j)
	}
	sync := kmsg.NewPtrSyncGroupRequest()
	sync.Group, sync.Generation, sync.MemberID = "g", j.Generation, j.MemberID
	sync.ProtocolType, sync.Protocol = kmsg.StringPtr("connect"), kmsg.StringPtr("sessioned")
	assign := kmsg.NewSyncGroupRequestGroupAssignment()
	assign.MemberID, assign.MemberAssignment = j.MemberID, []byte{9, 0, 9}
	sync.GroupAssignment = append(sync.GroupAssignment, assign)
	if s := c.ask(sync, 5).(*kmsg.SyncGroupResponse); s.ErrorCode != 0 || !bytes.Equal(s.MemberAssignment, assign.MemberAssignment) || *s.ProtocolType != "connect" {
		t.Fatalf("sync: %+v", s)
	}
	d := kmsg.NewPtrDescribeGroupsRequest()
	d.Groups = []string{"g", "nothing"}
	g := c.ask(d, 6).(*kmsg.DescribeGroupsResponse).Groups
	if g[0].ProtocolType != "connect" || g[0].Protocol != "sessioned" || !bytes.Equal(g[0].Members[0].MemberAssignment, assign.MemberAssignment) || g[1].ErrorCode != codeGroupIDNotFound {
		t.Errorf("describe: %+v", g)
	}
	if g := c.ask(d, 5).(*kmsg.DescribeGroupsResponse).Groups; g[1].ErrorCode != 0 || g[1].State != "Dead" {
		t.Errorf("an unknown group before version 6: %+v", g[1])
	}
	of := kmsg.NewPtrOffsetFetchRequest()
	of.Group = "nothing"
	ot := kmsg.NewOffsetFetchRequestTopic()
	ot.Topic, ot.Partitions = "t", []int32{0, 1, 7}
	of.Topics = append(of.Topics, ot)
	o := c.ask(of, 7).(*kmsg.OffsetFetchResponse)
	if o.ErrorCode != 0 || len(o.Topics) != 1 || len(o.Topics[0].Partitions) != 3 {
		t.Fatalf("offsets of an unknown group: %+v", o)
	}
	for _, p := range o.Topics[0].Partitions {
		if p.Offset != -1 || p.ErrorCode != 0 || p.Metadata == nil || *p.Metadata != "" || p.LeaderEpoch != -1 {
			t.Errorf("nothing committed: %+v", p)
		}
	}
	f := kmsg.NewPtrFindCoordinatorRequest()
	f.CoordinatorKeys = []string{"g", "nothing", ""}
	for i, x := range c.ask(f, 4).(*kmsg.FindCoordinatorResponse).Coordinators {
		if i < 2 && (x.ErrorCode != 0 || x.NodeID != 1 || fmt.Sprintf("%s:%d", x.Host, x.Port) != w.addr) {
			t.Errorf("coordinator of %q: %+v", x.Key, x)
		}
	}
	for _, x := range []struct {
		key kmsg.Request
		v   int16
	}{{&kmsg.HeartbeatRequest{Group: "nothing", MemberID: "m"}, 4}, {&kmsg.SyncGroupRequest{Group: "nothing", MemberID: "m"}, 4}} {
		code := int16(0)
		switch r := c.ask(x.key, x.v).(type) {
		case *kmsg.HeartbeatResponse:
			code = r.ErrorCode
		case *kmsg.SyncGroupResponse:
			code = r.ErrorCode
		}
		if code != codeUnknownMember {
			t.Errorf("%T of an unknown group: %d", x.key, code)
		}
	}
}

// Item 62: what Metadata says of the cluster. Item 68: partitions that are added do not change the epochs of those that were there.
func TestItem62And68Metadata(t *testing.T) {
	w := start(t, nil)
	topic := w.topic(t, "t", 2, nil)
	c := w.dial(t)
	ask := func() *kmsg.MetadataResponse {
		r := kmsg.NewPtrMetadataRequest()
		x := kmsg.NewMetadataRequestTopic()
		x.Topic = kmsg.StringPtr("t")
		r.Topics = append(r.Topics, x)
		return c.ask(r, 10).(*kmsg.MetadataResponse)
	}
	m := ask()
	if m.ClusterID == nil || *m.ClusterID != w.ClusterID() || m.ControllerID != m.Brokers[0].NodeID || m.AuthorizedOperations != noOperations || m.Topics[0].AuthorizedOperations != noOperations || m.Topics[0].IsInternal {
		t.Errorf("%+v", m)
	}
	for _, p := range m.Topics[0].Partitions {
		if p.Leader != 1 || len(p.ISR) != 1 || p.LeaderEpoch < 1 {
			t.Errorf("%+v", p)
		}
	}
	if err := w.CreatePartitions(t.Context(), topic.ID, 5); err != nil {
		t.Fatal(err)
	}
	after := ask()
	if len(after.Topics[0].Partitions) != 5 {
		t.Fatalf("%d partitions", len(after.Topics[0].Partitions))
	}
	for i, p := range m.Topics[0].Partitions {
		if a := after.Topics[0].Partitions[i]; a.LeaderEpoch != p.LeaderEpoch || a.Leader != p.Leader {
			t.Errorf("partition %d: %+v, before %+v", i, a, p)
		}
	}
	var same *state.Topic
	if same, _ = w.Cluster().Topic("t"); same.ID != topic.ID {
		t.Error("the topic's ID has changed")
	}
}

// Item 63: a topic is made by asking only if the client and the broker allow it; names that are no names are refused.
func TestItem63AutoCreation(t *testing.T) {
	w := start(t, nil)
	c := w.dial(t)
	ask := func(name string, allow bool) int16 {
		r := kmsg.NewPtrMetadataRequest()
		x := kmsg.NewMetadataRequestTopic()
		x.Topic = &name
		r.Topics, r.AllowAutoTopicCreation = append(r.Topics, x), allow
		return c.ask(r, 9).(*kmsg.MetadataResponse).Topics[0].ErrorCode
	}
	if code := ask("made", false); code != codeUnknownTopicOrPartition {
		t.Errorf("not allowed: %d", code)
	}
	if code := ask("made", true); code != codeNone {
		t.Errorf("allowed: %d", code)
	}
	for _, name := range []string{"a b", "..", ".", string(bytes.Repeat([]byte("x"), 250)), "ü", "a/b"} {
		if code := ask(name, true); code != codeInvalidTopic {
			t.Errorf("%q: %d", name, code)
		}
	}
}

// elsewhere is a backend whose partitions are led by others.
type elsewhere struct{ *raftmeta.Host }

func (e elsewhere) Append(_ context.Context, r raftmeta.AppendRequest, done func([]raftmeta.AppendResult)) {
	out := make([]raftmeta.AppendResult, len(r.Batches))
	for i := range out {
		out[i] = raftmeta.AppendResult{Err: raftmeta.ErrNotLeader, Base: -1, LogStart: -1}
	}
	done(out)
}

func (e elsewhere) Partition(tp record.TopicPartition) (state.PartitionInfo, error) {
	info, _ := e.Host.Partition(tp)
	return info, raftmeta.ErrNotLeader
}

// between is a backend whose partitions are led by nobody until somebody waits for that, and then by others; or for ever.
type between struct {
	elsewhere
	ever bool
	led  atomic.Bool
}

func (b *between) Leader(s record.ShardID) (int32, bool) {
	if !b.led.Load() {
		return -1, false
	}
	return b.Host.Leader(s)
}

func (b *between) AwaitLeader(ctx context.Context, _ record.ShardID) {
	if b.ever {
		<-ctx.Done()
	}
	b.led.Store(!b.ever)
}

// serve starts a server on another view of w's node, and returns a connection to it.
func (w *whole) serve(t *testing.T, b Backend) *raw {
	t.Helper()
	cfg := DefaultConfig()
	cfg.Registerer = prometheus.NewRegistry()
	s := NewServer(cfg, b, hotReader{w.Host})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		_ = s.Close()
		if err := <-served; !errors.Is(err, ErrServerClosed) {
			t.Errorf("serve: %v", err)
		}
	})
	return (&whole{addr: l.Addr().String()}).dial(t)
}

// Who asks while an election is going on is told its outcome, if that comes soon; the versions that cannot name a leader do not wait.
func TestHintsWaitForALeader(t *testing.T) {
	w := start(t, nil)
	topic := w.topic(t, "t", 1, nil)
	produce := func(b *between, v int16) (int16, int32) {
		p := w.serve(t, b).ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "v")), v).(*kmsg.ProduceResponse).Topics[0].Partitions[0]
		return p.ErrorCode, p.CurrentLeader.LeaderID
	}
	fetch := func(b *between, v int16) (int16, int32) {
		f := fetchReq("t", 0)
		f.Topics[0].TopicID, f.MaxWaitMillis = topic.ID, 10_000
		p := w.serve(t, b).ask(f, v).(*kmsg.FetchResponse).Topics[0].Partitions[0]
		return p.ErrorCode, p.CurrentLeader.LeaderID
	}
	for _, c := range []struct {
		name string
		ask  func(*between, int16) (int16, int32)
		v    int16
		ever bool
		want int32
		led  bool
	}{{"produce", produce, 10, false, 1, true}, {"fetch", fetch, 16, false, 1, true}, {"fetch", fetch, 12, false, 1, true}, {"produce", produce, 9, false, -1, false}, {"fetch", fetch, 11, false, -1, false},
		{"produce, no election", produce, 10, true, -1, false}, {"fetch, no election", fetch, 16, true, -1, false}} {
		b := &between{elsewhere: elsewhere{w.Host}, ever: c.ever}
		if code, leader := c.ask(b, c.v); code != codeNotLeaderOrFollower || leader != c.want || b.led.Load() != c.led {
			t.Errorf("%s v%d: code %d, leader %d, waited %v", c.name, c.v, code, leader, b.led.Load())
		}
	}
}

// Item 21: who comes to the wrong node is told the leader, its epoch and its address (KIP-951), in the versions that have the fields.
func TestItem21LeaderHints(t *testing.T) {
	w := start(t, nil)
	topic := w.topic(t, "t", 1, nil)
	info, err := w.Partition(record.TopicPartition{Topic: topic.ID})
	if err != nil {
		t.Fatal(err)
	}
	c := w.serve(t, elsewhere{w.Host})
	for v := int16(9); v <= 11; v++ {
		r := c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "v")), v).(*kmsg.ProduceResponse)
		p := r.Topics[0].Partitions[0]
		told := p.CurrentLeader.LeaderID == 1 && p.CurrentLeader.LeaderEpoch == int32(info.LeaderEpoch) && len(r.Brokers) == 1 && fmt.Sprintf("%s:%d", r.Brokers[0].Host, r.Brokers[0].Port) == w.addr
		if p.ErrorCode != codeNotLeaderOrFollower || told != (v >= 10) {
			t.Errorf("produce v%d: code %d, leader %+v at %+v", v, p.ErrorCode, p.CurrentLeader, r.Brokers)
		}
	}
	for _, v := range []int16{11, 12, 16} {
		f := fetchReq("t", 0)
		f.Topics[0].TopicID = topic.ID
		r := c.ask(f, v).(*kmsg.FetchResponse)
		p := r.Topics[0].Partitions[0]
		told := p.CurrentLeader.LeaderID == 1 && p.CurrentLeader.LeaderEpoch == int32(info.LeaderEpoch)
		if p.ErrorCode != codeNotLeaderOrFollower || told != (v >= 12) || (len(r.Brokers) == 1) != (v >= 16) {
			t.Errorf("fetch v%d: code %d, leader %+v at %+v", v, p.ErrorCode, p.CurrentLeader, r.Brokers)
		}
	}
}
