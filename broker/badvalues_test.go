package broker

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/estran/estran/tiering/record"
	"github.com/twmb/franz-go/pkg/kmsg"
	"go.uber.org/goleak"
)

// asCase is a request that is well-formed and wrong.
func (b *bench) asCase(name string, want int16, version int16, req kmsg.Request) badCase {
	a := b.s.apis[req.Key()]
	c := raw{t: b.t}
	return badCase{fmt.Sprintf("%s v%d: %s", a.name, version, name), a, version, c.encode(req, version), int(want), false}
}

// changed is a batch with bytes put over its header at a place, its CRC renewed.
func changed(b record.Batch, at int, with ...byte) record.Batch {
	b = bytes.Clone(b)
	copy(b[at:], with)
	b.SealCRC()
	return b
}

// withRecords is a batch of one record with these bytes as its records.
func withRecords(b record.Batch, records []byte) record.Batch {
	b = append(bytes.Clone(b[:record.HeaderBytes]), records...)
	binary.BigEndian.PutUint32(b[8:], uint32(len(b)-12))
	b.SealCRC()
	return b
}

func be64(v int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(v)) }

// Every malformed field of a batch has its code; behind Produce 8 the message says what is wrong.
func TestBadBatches(t *testing.T) {
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, leaks) })
	b := newBench(t)
	good := batchBytes(t, record.CodecNone, "a", "b")
	one := batchBytes(t, record.CodecNone, "a")
	future := be64(time.Now().Add(3 * time.Hour).UnixMilli())
	idempotent := changed(good, 43, append(be64(7), 0, 1, 0, 0, 0, 5)...)
	const corrupt, invalid, codec = codeCorruptMessage, codeInvalidRecord, codeUnsupportedCompression
	type row struct {
		name  string
		want  int16
		batch []byte
	}
	rows := []row{
		{"none", corrupt, nil}, {"one byte", corrupt, []byte{1}}, {"half a header", corrupt, good[:30]}, {"a header without its count", corrupt, good[:60]},
		{"a header without records", corrupt, good[:61]}, {"one byte missing", corrupt, good[:len(good)-1]}, {"one byte too many", invalid, append(bytes.Clone(good), 0)},
		{"two batches", invalid, append(bytes.Clone(good), good...)}, {"half a batch behind one", invalid, append(bytes.Clone(good), good[:40]...)},
		{"length 0", invalid, changed(good, 8, 0, 0, 0, 0)}, {"length -1", invalid, changed(good, 8, 255, 255, 255, 255)}, {"the least length", invalid, changed(good, 8, 128, 0, 0, 0)},
		{"the greatest length", corrupt, changed(good, 8, 127, 255, 255, 255)}, {"length of less than a header", invalid, changed(good, 8, 0, 0, 0, 48)},
		{"magic 0", invalid, changed(good, 16, 0)}, {"magic 1", invalid, changed(good, 16, 1)}, {"magic 3", invalid, changed(good, 16, 3)}, {"magic -1", invalid, changed(good, 16, 255)},
		{"unknown attribute 0x80", invalid, changed(good, 21, 0, 0x80)}, {"unknown attribute 0x8000", invalid, changed(good, 21, 0x80, 0)}, {"every attribute", invalid, changed(good, 21, 255, 255)},
		{"codec 5", codec, changed(good, 21, 0, 5)}, {"codec 6", codec, changed(good, 21, 0, 6)}, {"codec 7", codec, changed(good, 21, 0, 7)},
		{"control batch", invalid, changed(good, 21, 0, 0x20)}, {"delete horizon", invalid, changed(good, 21, 0, 0x40)},
		{"transactional without producer", invalid, changed(good, 21, 0, 0x10)}, {"transactional", codeInvalidTransactionState, changed(idempotent, 21, 0, 0x10)},
		{"last offset delta -1", invalid, changed(good, 23, 255, 255, 255, 255)}, {"last offset delta 0 of two", invalid, changed(good, 23, 0, 0, 0, 0)}, {"last offset delta 2 of two", invalid, changed(good, 23, 0, 0, 0, 2)},
		{"the greatest last offset delta", invalid, changed(good, 23, 127, 255, 255, 255)},
		{"count -1", invalid, changed(good, 57, 255, 255, 255, 255)}, {"count 0", invalid, changed(good, 57, 0, 0, 0, 0)}, {"count 1 of two", invalid, changed(good, 57, 0, 0, 0, 1)},
		{"the greatest count", invalid, changed(changed(good, 23, 127, 255, 255, 254), 57, 127, 255, 255, 255)},
		{"count 3 of two", invalid, changed(changed(good, 23, 0, 0, 0, 2), 57, 0, 0, 0, 3)},
		{"timestamp in the future", codeInvalidTimestamp, changed(good, 35, future...)}, {"the greatest timestamp", codeInvalidTimestamp, changed(good, 35, be64(math.MaxInt64)...)},
		{"producer -2", invalid, changed(good, 43, be64(-2)...)}, {"the least producer", invalid, changed(good, 43, be64(math.MinInt64)...)},
		{"producer without epoch", invalid, changed(idempotent, 51, 255, 255)}, {"producer without sequence", invalid, changed(idempotent, 53, 255, 255, 255, 255)}, {"the least sequence", invalid, changed(idempotent, 53, 128, 0, 0, 0)},
		{"more than max.message.bytes", codeMessageTooLarge, batchBytes(t, record.CodecNone, strings.Repeat("x", 1<<20))},
	}
	wrong := bytes.Clone(good)
	wrong[17] ^= 1
	rows = append(rows, row{"CRC", corrupt, wrong})
	for _, at := range []int{21, 27, 35, 43, 57, 61, len(good) - 1} {
		wrong := bytes.Clone(good)
		wrong[at] ^= 1
		rows = append(rows, row{fmt.Sprintf("byte %d changed", at), corrupt, wrong})
	}
	v := func(parts ...any) (out []byte) { // a record from varints and bytes
		for _, p := range parts {
			switch p := p.(type) {
			case int:
				out = binary.AppendVarint(out, int64(p))
			case string:
				out = append(out, p...)
			}
		}
		return out
	}
	records := []struct {
		name  string
		bytes []byte
	}{
		{"length -1", v(-1)}, {"length 0", v(0, "0123456")}, {"longer than the batch", v(100, "\x00", 0, 0, -1, -1, 0)}, {"the greatest length", v(math.MaxInt64, "\x00", 0, 0, -1, -1, 0)}, {"a length of 11 bytes", append(bytes.Repeat([]byte{255}, 10), 1, 1, 1)},
		{"offset delta 1", v(6, "\x00", 0, 1, -1, -1, 0)}, {"offset delta -1", v(6, "\x00", 0, -1, -1, -1, 0)}, {"a great offset delta", v(11, "\x00", 0, 1<<40, -1, -1, 0)},
		{"key of length -2", v(6, "\x00", 0, 0, -2, -1, 0)}, {"key longer than the record", v(6, "\x00", 0, 0, 9, -1, 0)}, {"value of length -2", v(6, "\x00", 0, 0, -1, -2, 0)},
		{"value longer than the record", v(6, "\x00", 0, 0, -1, 9, 0)}, {"the greatest value", v(15, "\x00", 0, 0, -1, math.MaxInt64, 0)}, {"headers of number -1", v(6, "\x00", 0, 0, -1, -1, -1)}, {"more headers than bytes", v(6, "\x00", 0, 0, -1, -1, 9)},
		{"the greatest number of headers", v(15, "\x00", 0, 0, -1, -1, math.MaxInt64)}, {"header without key", v(8, "\x00", 0, 0, -1, -1, 1, -1, -1)}, {"header longer than the record", v(8, "\x00", 0, 0, -1, -1, 1, 9, -1)},
		{"bytes behind the headers", v(7, "\x00", 0, 0, -1, -1, 0, "x")}, {"bytes behind the record", v(6, "\x00", 0, 0, -1, -1, 0, "x")}, {"cut", v(6, "\x00", 0, 0)},
	}
	for c := record.CodecNone; c <= record.CodecZstd; c++ {
		shell := changed(one, 21, 0, byte(c))
		for _, r := range records {
			z, err := record.Compress(c, r.bytes)
			if err != nil {
				t.Fatal(err)
			}
			want := invalid
			if c != record.CodecNone && strings.HasPrefix(r.name, "the greatest length") {
				want = codeMessageTooLarge // of what it would be decompressed
			}
			rows = append(rows, row{fmt.Sprintf("%s: record: %s", c, r.name), want, withRecords(shell, z)})
		}
		if c == record.CodecNone {
			continue
		}
		ok := batchBytes(t, c, strings.Repeat("abc", 1000))
		rows = append(rows, row{c.String() + ": nothing", invalid, withRecords(shell, nil)}, row{c.String() + ": garbage", invalid, withRecords(shell, []byte("this was never compressed"))},
			row{c.String() + ": ones", invalid, withRecords(shell, bytes.Repeat([]byte{255}, 100))}, row{c.String() + ": cut", invalid, withRecords(ok, ok.Records()[:len(ok.Records())/2])},
			row{c.String() + ": another codec's", invalid, withRecords(changed(ok, 21, 0, byte(c%4+1)), ok.Records())})
		// A bomb says how much it holds before it is decompressed: a gigabyte in one record.
		bomb, err := record.Compress(c, append(v(1<<30, "\x00", 0, 0, -1, 1<<30-20), make([]byte, 1<<20)...))
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, row{c.String() + ": bomb", codeMessageTooLarge, withRecords(shell, bomb)})
	}
	rows = append(rows,
		row{"a snappy block that says sixty times its bytes", invalid, withRecords(changed(one, 21, 0, 2), append(binary.AppendUvarint(nil, 6_000_000), make([]byte, 100_000)...))},
		row{"snappy: block longer than the batch", invalid, withRecords(changed(one, 21, 0, 2), append([]byte{0x82, 'S', 'N', 'A', 'P', 'P', 'Y', 0, 0, 0, 0, 1, 0, 0, 0, 1}, 0x7f, 0xff, 0xff, 0xff, 1))},
		row{"snappy: block that says it holds a gigabyte", invalid, withRecords(changed(one, 21, 0, 2), append([]byte{0x82, 'S', 'N', 'A', 'P', 'P', 'Y', 0, 0, 0, 0, 1, 0, 0, 0, 1}, 0, 0, 0, 6, 0x80, 0x80, 0x80, 0x80, 4, 0))},
		row{"zstd: window of 64 MiB and more", invalid, withRecords(changed(one, 21, 0, 4), []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 1, 0, 0})})
	for _, r := range rows {
		for _, version := range []int16{7, 11} {
			x := b.asCase(r.name, r.want, version, produceReq("t", -1, r.batch))
			x.decodes = strings.Contains(r.name, ": ")
			b.run(x)
		}
	}
	b.run(b.asCase("zstd before version 7", codec, 6, produceReq("t", -1, batchBytes(t, record.CodecZstd, "a"))))
	for _, acks := range []int16{2, -2, math.MaxInt16, math.MinInt16} {
		b.run(b.asCase(fmt.Sprint("acks ", acks), codeInvalidRequiredAcks, 9, produceReq("t", acks, good)))
	}
	for _, p := range []int32{2, -1, math.MaxInt32, math.MinInt32} {
		r := produceReq("t", -1, good)
		r.Topics[0].Partitions[0].Partition = p
		b.run(b.asCase(fmt.Sprint("partition ", p), codeUnknownTopicOrPartition, 9, r))
	}
	r := produceReq("t", -1, good)
	r.TransactionID = kmsg.StringPtr("x")
	b.run(b.asCase("transactional ID", codeTransactionalIDAuth, 9, r))
	for _, bad := range []*kmsg.ProduceRequest{produceReq("t", 0, good[:30]), produceReq("u", 0, good)} { // without an answer the end of the connection is the only word there is
		x := b.asCase("acks 0 with an error", 0, 9, bad)
		x.want = closed
		b.run(x)
	}
	b.report()
}

// Values that are no values: each has its code, in every API that takes them.
func TestBadValues(t *testing.T) {
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, leaks) })
	b := newBench(t)
	long := strings.Repeat("x", math.MaxInt16)
	names := map[string]string{"empty": "", "a dot": ".", "two dots": "..", "a space": "a b", "a slash": "a/b", "a path": "../../etc/passwd", "a backslash": `a\b`, "a zero": "a\x00", "a line break": "a\nb", "a colon": "a:b",
		"a comma": "a,b", "an umlaut": "ä", "an emoji": "😀", "bytes that are no UTF-8": "\xff\xfe", "half a rune": "a\xc3", "a surrogate": "\xed\xa0\x80", "a byte order mark": "\ufefft", "a format": "%s%n", "a quote": `"`,
		"250 characters": strings.Repeat("x", 250), "32767 characters": long}
	create := func(change func(*kmsg.CreateTopicsRequestTopic)) *kmsg.CreateTopicsRequest {
		r, x := kmsg.NewPtrCreateTopicsRequest(), kmsg.NewCreateTopicsRequestTopic()
		x.Topic, x.NumPartitions, x.ReplicationFactor = "new", 1, 1
		change(&x)
		r.Topics, r.ValidateOnly = append(r.Topics, x), true
		return r
	}
	for what, name := range names {
		for _, version := range []int16{4, 9} {
			r, x := kmsg.NewPtrMetadataRequest(), kmsg.NewMetadataRequestTopic()
			x.Topic = &name
			r.Topics = append(r.Topics, x)
			b.run(b.asCase("topic name: "+what, codeInvalidTopic, version, r))
		}
		for _, version := range []int16{1, 7} {
			b.run(b.asCase("topic name: "+what, codeInvalidTopic, version, create(func(x *kmsg.CreateTopicsRequestTopic) { x.Topic = name })))
		}
		d := kmsg.NewPtrDeleteTopicsRequest()
		d.TopicNames = []string{name}
		b.run(b.asCase("topic name: "+what, codeUnknownTopicOrPartition, 4, d))
		l, x := kmsg.NewPtrListOffsetsRequest(), kmsg.NewListOffsetsRequestTopic()
		x.Topic, x.Partitions = name, append(x.Partitions, kmsg.NewListOffsetsRequestTopicPartition())
		l.Topics = append(l.Topics, x)
		b.run(b.asCase("topic name: "+what, codeUnknownTopicOrPartition, 6, l))
		b.run(b.asCase("topic name: "+what, codeUnknownTopicOrPartition, 8, produceReq(name, -1, batchBytes(t, record.CodecNone, "a"))))
		p, y := kmsg.NewPtrCreatePartitionsRequest(), kmsg.NewCreatePartitionsRequestTopic()
		y.Topic, y.Count = name, 9
		p.Topics = append(p.Topics, y)
		b.run(b.asCase("topic name: "+what, codeUnknownTopicOrPartition, 1, p))
	}
	b.badConfigs(create, long)
	b.badTopics(create)
	b.badGroups(long)
	b.badOffsets()
	b.report()
}

// alter is a change of one setting of topic t.
func alterOf(typ kmsg.ConfigResourceType, name, key string, op int8, value *string) *kmsg.IncrementalAlterConfigsRequest {
	r, x, c := kmsg.NewPtrIncrementalAlterConfigsRequest(), kmsg.NewIncrementalAlterConfigsRequestResource(), kmsg.NewIncrementalAlterConfigsRequestResourceConfig()
	c.Name, c.Op, c.Value = key, kmsg.IncrementalAlterConfigOp(op), value
	x.ResourceType, x.ResourceName = typ, name
	x.Configs = append(x.Configs, c)
	r.Resources = append(r.Resources, x)
	return r
}

func (b *bench) badConfigs(create func(func(*kmsg.CreateTopicsRequestTopic)) *kmsg.CreateTopicsRequest, long string) {
	bad := map[configType][]string{
		typeInt:  {"", "x", "1.5", "-3", " 1", "1 ", "0x10", "9223372036854775808", "\xff", "1\x00"},
		typeLong: {"", "x", "1.5", "-3", " 1", "1 ", "0x10", "9223372036854775808", "\xff", "1\x00"},
	}
	for _, s := range topicSettings() {
		values := bad[s.typ]
		if len(values) == 0 && !s.inert {
			values = []string{"", "x", "PRODUCER", "\xff"}
		}
		for _, v := range values {
			b.run(b.asCase(fmt.Sprintf("%s=%q", s.name, v), codeInvalidConfig, 1, alterOf(kmsg.ConfigResourceTypeTopic, "t", s.name, opSet, &v)))
			b.run(b.asCase(fmt.Sprintf("%s=%q", s.name, v), codeInvalidConfig, 5, create(func(x *kmsg.CreateTopicsRequestTopic) {
				x.Configs = append(x.Configs, kmsg.CreateTopicsRequestTopicConfig{Name: s.name, Value: &v})
			})))
		}
		b.run(b.asCase(s.name+" without a value", codeInvalidRequest, 0, alterOf(kmsg.ConfigResourceTypeTopic, "t", s.name, opSet, nil)))
		if s.typ != typeList {
			b.run(b.asCase(s.name+": append", codeInvalidConfig, 1, alterOf(kmsg.ConfigResourceTypeTopic, "t", s.name, opAppend, kmsg.StringPtr("1"))))
			b.run(b.asCase(s.name+": subtract", codeInvalidConfig, 1, alterOf(kmsg.ConfigResourceTypeTopic, "t", s.name, opSubtract, kmsg.StringPtr("1"))))
		}
	}
	for what, name := range map[string]string{"empty": "", "unknown": "nope", "of a broker": "num.partitions", "with a space": "retention.ms ", "in capitals": "RETENTION.MS", "no UTF-8": "\xff", "of 32767 characters": long} {
		for _, version := range []int16{0, 1} {
			b.run(b.asCase("setting "+what, codeInvalidConfig, version, alterOf(kmsg.ConfigResourceTypeTopic, "t", name, opSet, kmsg.StringPtr("1"))))
		}
		for _, version := range []int16{1, 5} {
			b.run(b.asCase("setting "+what, codeInvalidConfig, version, create(func(x *kmsg.CreateTopicsRequestTopic) {
				x.Configs = append(x.Configs, kmsg.CreateTopicsRequestTopicConfig{Name: name, Value: kmsg.StringPtr("1")})
			})))
		}
	}
	for _, op := range []int8{4, -1, 127, -128} {
		b.run(b.asCase(fmt.Sprint("operation ", op), codeInvalidRequest, 1, alterOf(kmsg.ConfigResourceTypeTopic, "t", "retention.ms", op, kmsg.StringPtr("1"))))
	}
	for _, typ := range []int8{0, 1, 3, 4, 8, 127, -1, -128} {
		b.run(b.asCase(fmt.Sprint("resource type ", typ), codeInvalidRequest, 1, alterOf(kmsg.ConfigResourceType(typ), "1", "retention.ms", opSet, kmsg.StringPtr("1"))))
	}
	twice := alterOf(kmsg.ConfigResourceTypeTopic, "t", "retention.ms", opSet, kmsg.StringPtr("1"))
	twice.Resources[0].Configs = append(twice.Resources[0].Configs, twice.Resources[0].Configs[0])
	b.run(b.asCase("a setting twice", codeInvalidRequest, 1, twice))
	b.run(b.asCase("unknown topic", codeUnknownTopicOrPartition, 1, alterOf(kmsg.ConfigResourceTypeTopic, "u", "retention.ms", opSet, kmsg.StringPtr("1"))))
	for _, x := range []struct {
		typ  int8
		name string
		want int16
	}{{2, "u", codeUnknownTopicOrPartition}, {2, "", codeUnknownTopicOrPartition}, {2, long, codeUnknownTopicOrPartition}, {4, "2", codeInvalidRequest}, {4, "x", codeInvalidRequest}, {4, "01", codeInvalidRequest},
		{4, long, codeInvalidRequest}, {0, "", codeInvalidRequest}, {8, "1", codeInvalidRequest}, {-1, "1", codeInvalidRequest}} {
		for _, version := range []int16{3, 4} {
			r, y := kmsg.NewPtrDescribeConfigsRequest(), kmsg.NewDescribeConfigsRequestResource()
			y.ResourceType, y.ResourceName = kmsg.ConfigResourceType(x.typ), x.name
			r.Resources = append(r.Resources, y)
			b.run(b.asCase(fmt.Sprintf("type %d, name %.9q of %d", x.typ, x.name, len(x.name)), x.want, version, r))
		}
	}
}

func (b *bench) badTopics(create func(func(*kmsg.CreateTopicsRequestTopic)) *kmsg.CreateTopicsRequest) {
	assign := func(parts ...kmsg.CreateTopicsRequestTopicReplicaAssignment) func(*kmsg.CreateTopicsRequestTopic) {
		return func(x *kmsg.CreateTopicsRequestTopic) {
			x.NumPartitions, x.ReplicationFactor, x.ReplicaAssignment = -1, -1, parts
		}
	}
	to := func(p int32, nodes ...int32) kmsg.CreateTopicsRequestTopicReplicaAssignment {
		return kmsg.CreateTopicsRequestTopicReplicaAssignment{Partition: p, Replicas: nodes}
	}
	rows := map[string]struct {
		want   int16
		change func(*kmsg.CreateTopicsRequestTopic)
	}{
		"exists":           {codeTopicExists, func(x *kmsg.CreateTopicsRequestTopic) { x.Topic = "t" }},
		"assigned to none": {codeInvalidReplicaAssignment, assign(to(0))}, "assigned to a stranger": {codeInvalidReplicaAssignment, assign(to(0, 9))}, "assigned to node -1": {codeInvalidReplicaAssignment, assign(to(0, -1))},
		"assigned to one twice": {codeInvalidReplicaAssignment, assign(to(0, 1, 1))}, "partition assigned twice": {codeInvalidReplicaAssignment, assign(to(0, 1), to(0, 1))}, "partition 0 not assigned": {codeInvalidReplicaAssignment, assign(to(1, 1))},
		"partition -1 assigned": {codeInvalidReplicaAssignment, assign(to(-1, 1))}, "partitions with different numbers": {codeInvalidReplicaAssignment, assign(to(0, 1), to(1))},
		"assigned and counted": {codeInvalidRequest, func(x *kmsg.CreateTopicsRequestTopic) {
			x.ReplicaAssignment = append(x.ReplicaAssignment, to(0, 1))
		}},
	}
	for name, x := range rows {
		for _, version := range []int16{4, 7} {
			b.run(b.asCase(name, x.want, version, create(x.change)))
		}
	}
	for _, n := range []int32{0, -2, partitionsMax + 1, math.MaxInt32, math.MinInt32} {
		b.run(b.asCase(fmt.Sprint(n, " partitions"), codeInvalidPartitions, 7, create(func(x *kmsg.CreateTopicsRequestTopic) { x.NumPartitions = n })))
	}
	for _, n := range []int16{0, -2, 2, math.MaxInt16, math.MinInt16} {
		b.run(b.asCase(fmt.Sprint("replication factor ", n), codeInvalidReplicationFactor, 7, create(func(x *kmsg.CreateTopicsRequestTopic) { x.ReplicationFactor = n })))
	}
	twice := create(func(*kmsg.CreateTopicsRequestTopic) {})
	twice.Topics = append(twice.Topics, twice.Topics[0])
	b.run(b.asCase("a topic twice", codeInvalidRequest, 7, twice))
	for _, n := range []int32{2, 1, 0, -1, partitionsMax + 1, math.MaxInt32, math.MinInt32} {
		r, x := kmsg.NewPtrCreatePartitionsRequest(), kmsg.NewCreatePartitionsRequestTopic()
		x.Topic, x.Count = "t", n
		r.Topics = append(r.Topics, x)
		b.run(b.asCase(fmt.Sprint(n, " partitions"), codeInvalidPartitions, 3, r))
	}
	for name, x := range map[string][2]string{"no software name": {"", "1"}, "no software version": {"a", ""}, "a space": {"a b", "1"}, "a dash at the end": {"a", "1-"}, "a zero": {"a\x00", "1"}, "no UTF-8": {"\xff", "1"}, "a megabyte with a space": {strings.Repeat("a", 1<<20) + " ", "1"}} {
		r := kmsg.NewPtrApiVersionsRequest()
		r.ClientSoftwareName, r.ClientSoftwareVersion = x[0], x[1]
		b.run(b.asCase("software: "+name, codeInvalidRequest, 3, r))
	}
	for _, kind := range []int8{0, 2, 3, -1, 127} {
		r := kmsg.NewPtrDescribeClusterRequest()
		r.EndpointType = kind
		b.run(b.asCase(fmt.Sprint("endpoint type ", kind), codeInvalidRequest, 2, r))
	}
	for _, kind := range []int8{1, 2, 3, -1, 127} {
		want := codeInvalidRequest
		if kind == 1 {
			want = codeTransactionalIDAuth
		}
		for _, version := range []int16{2, 4} {
			r := kmsg.NewPtrFindCoordinatorRequest()
			r.CoordinatorType, r.CoordinatorKey, r.CoordinatorKeys = kind, "g", []string{"g"}
			b.run(b.asCase(fmt.Sprint("kind ", kind), want, version, r))
		}
	}
	r := kmsg.NewPtrInitProducerIDRequest()
	r.TransactionalID = kmsg.StringPtr("")
	b.run(b.asCase("transactional ID", codeTransactionalIDAuth, 4, r))
}

func (b *bench) badGroups(long string) {
	join := func(change func(*kmsg.JoinGroupRequest)) *kmsg.JoinGroupRequest {
		r := kmsg.NewPtrJoinGroupRequest()
		r.Group, r.ProtocolType, r.SessionTimeoutMillis, r.RebalanceTimeoutMillis = "j", "consumer", 10_000, 10_000
		r.Protocols = []kmsg.JoinGroupRequestProtocol{{Name: "range"}}
		change(r)
		return r
	}
	many := make([]kmsg.JoinGroupRequestProtocol, protocolsMax+1)
	for name, x := range map[string]struct {
		want   int16
		change func(*kmsg.JoinGroupRequest)
	}{
		"no group": {codeInvalidGroupID, func(r *kmsg.JoinGroupRequest) { r.Group = "" }}, "no session": {codeInvalidSessionTimeout, func(r *kmsg.JoinGroupRequest) { r.SessionTimeoutMillis = 0 }},
		"session of -1": {codeInvalidSessionTimeout, func(r *kmsg.JoinGroupRequest) { r.SessionTimeoutMillis = -1 }}, "session of a day": {codeInvalidSessionTimeout, func(r *kmsg.JoinGroupRequest) { r.SessionTimeoutMillis = 86_400_000 }},
		"no protocols": {codeInconsistentProtocol, func(r *kmsg.JoinGroupRequest) { r.Protocols = nil }}, "no protocol type": {codeInconsistentProtocol, func(r *kmsg.JoinGroupRequest) { r.ProtocolType = "" }},
		"unknown member": {codeUnknownMember, func(r *kmsg.JoinGroupRequest) { r.MemberID = "m" }}, "too many protocols": {codeInconsistentProtocol, func(r *kmsg.JoinGroupRequest) { r.Protocols = many }},
		"new member": {codeMemberIDRequired, func(*kmsg.JoinGroupRequest) {}},
	} {
		for _, version := range []int16{5, 9} {
			b.run(b.asCase(name, x.want, version, join(x.change)))
		}
	}
	for what, id := range map[string]string{"empty": "", "too long": long + "x"} {
		h, l, s := kmsg.NewPtrHeartbeatRequest(), kmsg.NewPtrLeaveGroupRequest(), kmsg.NewPtrSyncGroupRequest()
		h.Group, l.Group, s.Group = id, id, id
		d, e := kmsg.NewPtrDescribeGroupsRequest(), kmsg.NewPtrDeleteGroupsRequest()
		d.Groups, e.Groups = []string{id}, []string{id}
		f, x := kmsg.NewPtrOffsetFetchRequest(), kmsg.NewOffsetFetchRequestGroup()
		x.Group = id
		f.Groups = append(f.Groups, x)
		for _, r := range []kmsg.Request{h, l, s, d, e, f, offsetCommit(id, "t", 0, "")} {
			b.run(b.asCase("group ID "+what, codeInvalidGroupID, b.s.apis[r.Key()].max, r))
		}
		b.run(b.asCase("group ID "+what, codeInvalidGroupID, 9, join(func(r *kmsg.JoinGroupRequest) { r.Group = id })))
	}
	h, s := kmsg.NewPtrHeartbeatRequest(), kmsg.NewPtrSyncGroupRequest()
	h.Group, h.MemberID, s.Group, s.MemberID = "j", "m", "j", "m"
	l := kmsg.NewPtrLeaveGroupRequest()
	l.Group, l.Members = "j", []kmsg.LeaveGroupRequestMember{{MemberID: "m"}}
	for _, r := range []kmsg.Request{h, s, l} {
		for _, version := range []int16{3, 4} {
			b.run(b.asCase("unknown member", codeUnknownMember, version, r))
		}
	}
	c := offsetCommit("j", "t", 0, "")
	c.MemberID, c.Generation = "m", 5
	b.run(b.asCase("unknown member", codeUnknownMember, 7, c))
}

func offsetCommit(group, topic string, partition int32, metadata string) *kmsg.OffsetCommitRequest {
	r, x := kmsg.NewPtrOffsetCommitRequest(), kmsg.NewOffsetCommitRequestTopic()
	r.Group, r.Generation, x.Topic = group, -1, topic
	p := kmsg.NewOffsetCommitRequestTopicPartition()
	p.Partition, p.Metadata = partition, &metadata
	x.Partitions = append(x.Partitions, p)
	r.Topics = append(r.Topics, x)
	return r
}

func (b *bench) badOffsets() {
	b.run(b.asCase("metadata too long", codeOffsetMetadataTooLarge, 7, offsetCommit("g", "t", 0, strings.Repeat("m", 4097))))
	b.run(b.asCase("unknown topic", codeUnknownTopicOrPartition, 7, offsetCommit("g", "u", 0, "")))
	for _, p := range []int32{2, -1, math.MaxInt32, math.MinInt32} {
		name := fmt.Sprint("partition ", p)
		b.run(b.asCase(name, codeUnknownTopicOrPartition, 7, offsetCommit("g", "t", p, "")))
		b.run(b.asCase(name, codeUnknownTopicOrPartition, 6, listOffsets(p, -1, -1)))
		b.run(b.asCase(name, codeUnknownTopicOrPartition, 12, fetchOf(func(_ *kmsg.FetchRequest, x *kmsg.FetchRequestTopicPartition) { x.Partition = p })))
		e, x := kmsg.NewPtrOffsetForLeaderEpochRequest(), kmsg.NewOffsetForLeaderEpochRequestTopic()
		x.Topic, x.Partitions = "t", []kmsg.OffsetForLeaderEpochRequestTopicPartition{{Partition: p, CurrentLeaderEpoch: -1}}
		e.Topics = append(e.Topics, x)
		b.run(b.asCase(name, codeUnknownTopicOrPartition, 4, e))
		d, y := kmsg.NewPtrDeleteRecordsRequest(), kmsg.NewDeleteRecordsRequestTopic()
		y.Topic, y.Partitions = "t", []kmsg.DeleteRecordsRequestTopicPartition{{Partition: p}}
		d.Topics = append(d.Topics, y)
		b.run(b.asCase(name, codeUnknownTopicOrPartition, 2, d))
	}
	for _, ts := range []int64{-6, -99, math.MinInt64} {
		b.run(b.asCase(fmt.Sprint("timestamp ", ts), codeUnsupportedForFormat, 10, listOffsets(0, -1, ts)))
	}
	for version, ts := range map[int16]int64{6: timeMax, 7: timeEarliestLocal, 8: timeLatestTiered} {
		b.run(b.asCase(fmt.Sprint("timestamp of a later version: ", ts), codeUnsupportedForFormat, version, listOffsets(0, -1, ts)))
	}
	for epoch, want := range map[int32]int16{0: codeFencedLeaderEpoch, 2: codeUnknownLeaderEpoch, math.MaxInt32: codeUnknownLeaderEpoch} {
		b.run(b.asCase(fmt.Sprint("leader epoch ", epoch), want, 6, listOffsets(0, epoch, -2)))
		b.run(b.asCase(fmt.Sprint("leader epoch ", epoch), want, 12, fetchOf(func(_ *kmsg.FetchRequest, x *kmsg.FetchRequestTopicPartition) { x.CurrentLeaderEpoch = epoch })))
	}
	for _, offset := range []int64{-1, 11, math.MaxInt64, math.MinInt64} {
		b.run(b.asCase(fmt.Sprint("offset ", offset), codeOffsetOutOfRange, 12, fetchOf(func(_ *kmsg.FetchRequest, x *kmsg.FetchRequestTopicPartition) { x.FetchOffset = offset })))
	}
	b.run(b.asCase("offset -2", codeOffsetOutOfRange, 2, deleteRecords(-2)))
	b.run(b.asCase("the least offset", codeOffsetOutOfRange, 2, deleteRecords(math.MinInt64)))
	b.run(b.asCase("unknown topic ID", codeUnknownTopicID, 13, fetchOf(func(r *kmsg.FetchRequest, _ *kmsg.FetchRequestTopicPartition) { r.Topics[0].TopicID = [16]byte{9} })))
	b.run(b.asCase("unknown topic", codeUnknownTopicOrPartition, 12, fetchOf(func(r *kmsg.FetchRequest, _ *kmsg.FetchRequestTopicPartition) { r.Topics[0].Topic = "u" })))
	for _, epoch := range []int32{1, math.MaxInt32, -2, math.MinInt32} {
		b.run(b.asCase(fmt.Sprint("no session, epoch ", epoch), codeFetchSessionNotFound, 12, fetchOf(func(r *kmsg.FetchRequest, _ *kmsg.FetchRequestTopicPartition) {
			r.SessionID, r.SessionEpoch = 99, epoch
		})))
	}
}

func listOffsets(partition, epoch int32, ts int64) *kmsg.ListOffsetsRequest {
	r, x := kmsg.NewPtrListOffsetsRequest(), kmsg.NewListOffsetsRequestTopic()
	x.Topic, x.Partitions = "t", []kmsg.ListOffsetsRequestTopicPartition{{Partition: partition, CurrentLeaderEpoch: epoch, Timestamp: ts}}
	r.Topics = append(r.Topics, x)
	return r
}

func deleteRecords(offset int64) *kmsg.DeleteRecordsRequest {
	r, x := kmsg.NewPtrDeleteRecordsRequest(), kmsg.NewDeleteRecordsRequestTopic()
	x.Topic, x.Partitions = "t", []kmsg.DeleteRecordsRequestTopicPartition{{Offset: offset}}
	r.Topics = append(r.Topics, x)
	return r
}

func fetchOf(change func(*kmsg.FetchRequest, *kmsg.FetchRequestTopicPartition)) *kmsg.FetchRequest {
	r, x, p := kmsg.NewPtrFetchRequest(), kmsg.NewFetchRequestTopic(), kmsg.NewFetchRequestTopicPartition()
	x.Topic, x.TopicID, p.PartitionMaxBytes = "t", memoryTopic, 1000
	r.SessionEpoch, r.MaxBytes = -1, 1000
	x.Partitions = append(x.Partitions, p)
	r.Topics = append(r.Topics, x)
	change(r, &r.Topics[0].Partitions[0])
	return r
}
