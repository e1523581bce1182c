package broker

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"reflect"
	runtimemetrics "runtime/metrics"
	"slices"
	"testing"
	"time"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// memory is a Backend and Reader without a log: one node, one topic `t` of two partitions that hold nothing, one shard. Every change succeeds at once and changes nothing, so that
// a fuzzer's executions cost microseconds and do not depend on one another.
type memory struct{ c *state.Cluster }

var memoryTopic = record.TopicID{1}

func newMemory(t testing.TB) memory {
	t.Helper()
	var e state.Entry
	for _, c := range []state.Command{state.InitCluster{ClusterID: "fuzz", Shards: 1, Members: []int32{1}}, state.RegisterNode{Node: state.Node{ID: 1, Host: "h", Port: 9}},
		state.CreateTopic{ID: memoryTopic, Name: "t", Partitions: 2, ReplicationFactor: 1}} {
		if _, err := e.Add(c); err != nil {
			t.Fatal(err)
		}
	}
	m := state.NewMeta()
	data, _ := e.Cut(1, nil, 0, nil)
	m.Apply(1, 1, data)
	return memory{m.View()}
}

func (memory) Append(_ context.Context, r raftmeta.AppendRequest, done func([]raftmeta.AppendResult)) {
	done(make([]raftmeta.AppendResult, len(r.Batches)))
}

func (m memory) Cluster() *state.Cluster                   { return m.c }
func (memory) NodeID() int32                               { return 1 }
func (memory) Down(int32) bool                             { return false }
func (memory) Leader(record.ShardID) (int32, bool)         { return 1, true }
func (memory) AwaitLeader(context.Context, record.ShardID) {}
func (memory) Prove(context.Context, record.ShardID) error { return nil }
func (memory) Current(context.Context) error               { return nil }
func (memory) Replicas(record.ShardID) raftmeta.Replicas {
	return raftmeta.Replicas{Voters: []int32{1}, InSync: []int32{1}}
}
func (memory) Voters() int                                  { return 1 }
func (memory) GroupShard(string) record.ShardID             { return 1 }
func (memory) Groups(record.ShardID) []*state.Group         { return nil }
func (memory) Watch([]record.TopicPartition, func()) func() { return func() {} }
func (m memory) Partition(tp record.TopicPartition) (state.PartitionInfo, error) {
	return state.PartitionInfo{TP: tp, LeaderEpoch: 1, HighWatermark: 10, LastStableOffset: 10}, nil
}

func (memory) EpochEnd(_ record.TopicPartition, e record.LeaderEpoch) (record.LeaderEpoch, record.Offset, error) {
	return min(e, 1), 10, nil
}

func (m memory) CreateTopics(_ context.Context, specs []raftmeta.TopicSpec) []raftmeta.Created {
	out := make([]raftmeta.Created, len(specs))
	for i, s := range specs {
		out[i].Topic = &state.Topic{ID: record.TopicID{2}, Name: s.Name}
	}
	return out
}

func (memory) DeleteTopics(_ context.Context, ids []record.TopicID) []error {
	return make([]error, len(ids))
}
func (memory) CreatePartitions(context.Context, record.TopicID, int32) error { return nil }

func (memory) AlterConfigs(context.Context, record.TopicID, map[string]string, []string, state.PartitionConfig) error {
	return nil
}

func (memory) DeleteRecords(_ context.Context, _ record.TopicPartition, before record.Offset) (record.Offset, error) {
	return before, nil
}
func (memory) AllocateProducerID(context.Context) (record.ProducerID, error) { return 7, nil }

func (memory) Group(id string) *state.Group {
	if id != "g" {
		return nil
	}
	at := record.TopicPartition{Topic: memoryTopic}
	return &state.Group{ID: id, ProtocolType: "consumer", Offsets: map[record.TopicPartition]state.OffsetCommit{at: {TP: at, Offset: 5, Metadata: "m"}}}
}
func (memory) ProposeGroup(_ record.ShardID, _ []state.Command, done func(error)) { done(nil) }

func (memory) Read(_ context.Context, _ record.TopicPartition, from record.Offset, _ tiering.Limits) (tiering.Result, error) {
	if from < 0 || from > 10 {
		return tiering.Result{}, tiering.ErrOutOfRange
	}
	return tiering.Result{Next: from}, nil
}

func (memory) OffsetForTimestamp(context.Context, record.TopicPartition, record.Timestamp, record.Offset) (record.Offset, record.Timestamp, bool, error) {
	return 3, 4, true, nil
}

func (memory) MaxTimestamp(context.Context, record.TopicPartition, record.Offset) (record.Offset, record.Timestamp, bool, error) {
	return 9, 9, true, nil
}

func memoryServer(t testing.TB) *Server {
	cfg := DefaultConfig()
	cfg.RequestMaxBytes = 1 << 16
	m := newMemory(t)
	s := NewServer(cfg, m, m)
	s.drain.Store(true) // no long polls
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// allocated is the number of bytes that the process has ever allocated.
func allocated() uint64 {
	m := []runtimemetrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	runtimemetrics.Read(m)
	return m[0].Value.Uint64()
}

// allocates returns how many bytes f allocates. If that seems to be more than most, it is asked again: the runtime counts small objects when it is done with a span, so that what
// was allocated before may fall into one measurement, but not into each. prepare comes before every f and is not measured.
func allocates(most uint64, prepare, f func()) (used uint64) {
	for range 5 {
		prepare()
		before := allocated()
		f()
		if used = allocated() - before; used <= most {
			break
		}
	}
	return used
}

// allowance is what a frame may make the broker allocate.
func allowance(frame int) uint64 { return 16*uint64(frame) + 1<<20 }

// checkAnswer says whether a frame is an answer in another implementation's eyes: it decodes, and encodes again to the same bytes.
func checkAnswer(t testing.TB, a *api, version int16, b []byte) kmsg.Response {
	t.Helper()
	if len(b) < 8 || int(binary.BigEndian.Uint32(b)) != len(b)-4 {
		t.Fatalf("%s v%d: an answer of %d bytes says that it has %x", a.name, version, len(b), b[:min(4, len(b))])
	}
	resp := kmsg.RequestForKey(a.key).ResponseKind()
	resp.SetVersion(version)
	body := b[8:]
	if resp.IsFlexible() && a.key != keyAPIVersions {
		body = body[1:]
	}
	if err := resp.ReadFrom(body); err != nil {
		t.Fatalf("%s v%d: the answer does not decode: %v\n%x", a.name, version, err, b)
	}
	if again := resp.AppendTo(nil); !bytes.Equal(again, body) {
		t.Fatalf("%s v%d: %d bytes of answer, the same answer has %d:\n%x\n%x", a.name, version, len(body), len(again), body, again)
	}
	return resp
}

// codesOf checks an answer and returns the error codes in it that are not 0, each once.
func codesOf(t testing.TB, x badCase, b []byte) (codes []int16) {
	t.Helper()
	var walk func(v reflect.Value)
	walk = func(v reflect.Value) {
		switch v.Kind() {
		case reflect.Pointer:
			if !v.IsNil() {
				walk(v.Elem())
			}
		case reflect.Slice:
			for i := range v.Len() {
				walk(v.Index(i))
			}
		case reflect.Struct:
			for i := range v.NumField() {
				if f := v.Field(i); v.Type().Field(i).Name != "ErrorCode" {
					walk(f)
				} else if c := int16(f.Int()); c != codeNone && !slices.Contains(codes, c) {
					codes = append(codes, c)
				}
			}
		}
	}
	walk(reflect.ValueOf(checkAnswer(t, x.api, x.version, b)))
	return codes
}

// FuzzRequests gives bytes to every handler: the first two choose key and version. Whatever they are, the connection is closed or one answer is given that another implementation
// reads, and no more is allocated than the frame allows.
func FuzzRequests(f *testing.F) {
	list := apiList()
	for i, a := range list {
		for v := a.served(); v <= a.max; v++ {
			req := kmsg.RequestForKey(a.key)
			fill(f, req, v, memoryTopic)
			req.SetVersion(v)
			f.Add(append([]byte{byte(i), byte(v - a.served())}, req.AppendTo(nil)...))
		}
	}
	s := memoryServer(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < 2 {
			return
		}
		a := s.apis[list[int(data[0])%len(list)].key]
		v := a.served() + int16(data[1])%(a.max-a.served()+1)
		var sg *shardGroups
		var c *conn
		var r *request
		var malformed error
		used := allocates(allowance(len(data)), func() {
			if r != nil && r.slot.release != nil {
				r.slot.release()
			}
			sg = &shardGroups{c: s.groups, id: 1, groups: map[string]*liveGroup{}}
			s.groups.shards[1] = sg
			s.session = newSessions(1, 1000)
			c = newConn(s, nil, "fuzz")
			r = &request{s: s, c: c, api: a, version: v, slot: &answer{api: a}, reader: reader{b: bytes.Clone(data[2:]), flex: v >= a.flex}}
		}, func() {
			if malformed = a.handle(r); malformed == nil {
				sg.unload() // who waits for members is told that the group has gone
			}
		})
		if malformed != nil {
			return
		}
		if used > allowance(len(data)) {
			t.Errorf("%s v%d: %d bytes were allocated for a frame of %d", a.name, v, used, len(data))
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if !r.slot.ready {
			t.Fatalf("%s v%d was not answered", a.name, v)
		}
		if !r.slot.silent {
			checkAnswer(t, a, v, bytes.Join(r.slot.bufs, nil))
		}
		if r.slot.release != nil {
			r.slot.release()
		}
		if !s.answers.TryAcquire(s.cfg.ResponseBudget) {
			t.Fatalf("%s v%d: what an answer may need was not given back", a.name, v)
		}
		s.answers.Release(s.cfg.ResponseBudget)
	})
}

// script is a connection on which the client has said all it will say.
type script struct {
	net.Conn
	in  bytes.Reader
	out bytes.Buffer
}

func (c *script) Read(b []byte) (int, error)     { return c.in.Read(b) }
func (c *script) Write(b []byte) (int, error)    { return c.out.Write(b) }
func (*script) Close() error                     { return nil }
func (*script) SetReadDeadline(time.Time) error  { return nil }
func (*script) SetWriteDeadline(time.Time) error { return nil }

// FuzzFrames gives bytes to a whole connection. Whatever they are, it ends with the bytes, answers in the order of the requests and only those, and gives back what it took.
func FuzzFrames(f *testing.F) {
	var all []byte
	for i, req := range []kmsg.Request{kmsg.NewPtrApiVersionsRequest(), produceReq("t", -1, batchBytes(f, record.CodecNone, "a")), kmsg.NewPtrMetadataRequest(),
		produceReq("t", 0, []byte("no batch"))} {
		c := raw{corr: int32(i)}
		for _, v := range []int16{3, 9} {
			b := c.encode(req, min(v, req.MaxVersion()))
			f.Add(b)
			f.Add(b[:len(b)-1])
			all = append(all, b...)
		}
	}
	f.Add(all)
	f.Add(frame([]byte{0, 18, 0, 99, 0, 0, 0, 1, 0xff, 0xff}))
	s := memoryServer(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		var x *script
		most := allowance(max(len(data), int(s.cfg.RequestMaxBytes))) // a frame that does not come whole has been allocated
		if used := allocates(most, func() { x = &script{}; x.in.Reset(data) }, func() { newConn(s, x, "fuzz").serve() }); used > most {
			t.Errorf("%d bytes were allocated for %d", used, len(data))
		}
		if !s.frames.TryAcquire(s.cfg.FrameBudget) {
			t.Fatal("a frame was not given back")
		}
		s.frames.Release(s.cfg.FrameBudget)
		asked := framesOf(data)
		for _, b := range framesOf(x.out.Bytes()) {
			for len(asked) > 0 && len(asked[0]) >= headerMin && !bytes.Equal(asked[0][4:8], b[:4]) {
				asked = asked[1:]
			}
			if len(asked) == 0 || len(asked[0]) < headerMin {
				t.Fatalf("an answer with correlation ID %x, which no request has that is not answered", b[:4])
			}
			asked = asked[1:]
		}
	})
}

// framesOf splits what a connection carried.
func framesOf(b []byte) (out [][]byte) {
	r := bytes.NewReader(b)
	for {
		var n uint32
		if binary.Read(r, binary.BigEndian, &n) != nil || n < 4 || int64(n) > int64(r.Len()) {
			return out
		}
		f := make([]byte, n)
		_, _ = io.ReadFull(r, f)
		out = append(out, f)
	}
}
