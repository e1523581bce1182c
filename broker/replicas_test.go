package broker

import (
	"testing"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/tiering/record"
	"github.com/google/go-cmp/cmp"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// A partition is shown on exactly as many nodes as its factor says, the preferred one first and the leader among them; in sync are those that its leader hears.
func TestReplicasThatAreShown(t *testing.T) {
	all := raftmeta.Replicas{Voters: []int32{2, 3, 1}, InSync: []int32{1, 2, 3}}
	for name, c := range map[string]struct {
		have          raftmeta.Replicas
		factor        int16
		leader        int32
		replicas, isr []int32
	}{
		"all":                      {all, 3, 2, []int32{2, 3, 1}, []int32{2, 3, 1}},
		"preferred leads":          {all, 2, 2, []int32{2, 3}, []int32{2, 3}},
		"another leads":            {all, 2, 1, []int32{2, 1}, []int32{2, 1}},
		"one":                      {all, 1, 3, []int32{3}, []int32{3}},
		"one is away":              {raftmeta.Replicas{Voters: []int32{2, 3, 1}, InSync: []int32{1, 2}}, 3, 2, []int32{2, 3, 1}, []int32{2, 1}},
		"preferred is away":        {raftmeta.Replicas{Voters: []int32{2, 3, 1}, InSync: []int32{1, 3}}, 2, 1, []int32{2, 1}, []int32{1}},
		"no leader":                {raftmeta.Replicas{Voters: []int32{2, 3, 1}}, 2, -1, []int32{2, 3}, nil},
		"a quorum that has shrunk": {raftmeta.Replicas{Voters: []int32{1}, InSync: []int32{1}}, 3, 1, []int32{1}, []int32{1}},
		"nothing is known":         {raftmeta.Replicas{}, 3, -1, nil, nil},
	} {
		replicas, isr := replicasOf(c.have, c.factor, c.leader)
		if d := cmp.Diff(c.replicas, replicas); d != "" {
			t.Errorf("%s: replicas: %s", name, d)
		}
		if d := cmp.Diff(c.isr, isr); d != "" {
			t.Errorf("%s: in sync: %s", name, d)
		}
	}
}

// create asks for a topic and returns the code.
func (c *raw) create(name string, change func(*kmsg.CreateTopicsRequestTopic)) int16 {
	r := kmsg.NewPtrCreateTopicsRequest()
	x := kmsg.NewCreateTopicsRequestTopic()
	x.Topic, x.NumPartitions, x.ReplicationFactor = name, 1, 1
	change(&x)
	r.Topics = append(r.Topics, x)
	return c.ask(r, 7).(*kmsg.CreateTopicsResponse).Topics[0].ErrorCode
}

// A factor above the number of voters, and more replicas in sync than an acknowledgement waits for, are refused; an assignment says how many and no more.
func TestReplicationIsChecked(t *testing.T) {
	w := start(t, nil)
	c := w.dial(t)
	insync := func(v string) func(*kmsg.CreateTopicsRequestTopic) {
		return func(x *kmsg.CreateTopicsRequestTopic) {
			k := kmsg.NewCreateTopicsRequestTopicConfig()
			k.Name, k.Value = "min.insync.replicas", &v
			x.Configs = append(x.Configs, k)
		}
	}
	assign := func(parts map[int32][]int32) func(*kmsg.CreateTopicsRequestTopic) {
		return func(x *kmsg.CreateTopicsRequestTopic) {
			x.NumPartitions, x.ReplicationFactor = -1, -1
			for p, nodes := range parts {
				a := kmsg.NewCreateTopicsRequestTopicReplicaAssignment()
				a.Partition, a.Replicas = p, nodes
				x.ReplicaAssignment = append(x.ReplicaAssignment, a)
			}
		}
	}
	for name, k := range map[string]struct {
		change func(*kmsg.CreateTopicsRequestTopic)
		want   int16
	}{
		"factor-1":         {func(*kmsg.CreateTopicsRequestTopic) {}, codeNone},
		"factor-default":   {func(x *kmsg.CreateTopicsRequestTopic) { x.ReplicationFactor = -1 }, codeNone},
		"factor-2":         {func(x *kmsg.CreateTopicsRequestTopic) { x.ReplicationFactor = 2 }, codeInvalidReplicationFactor},
		"factor-0":         {func(x *kmsg.CreateTopicsRequestTopic) { x.ReplicationFactor = 0 }, codeInvalidReplicationFactor},
		"insync-1":         {insync("1"), codeNone},
		"insync-2":         {insync("2"), codeInvalidConfig},
		"insync-0":         {insync("0"), codeInvalidConfig},
		"assigned":         {assign(map[int32][]int32{0: {1}, 1: {1}}), codeNone},
		"assigned-gap":     {assign(map[int32][]int32{0: {1}, 2: {1}}), codeInvalidReplicaAssignment},
		"assigned-unknown": {assign(map[int32][]int32{0: {7}}), codeInvalidReplicaAssignment},
		"assigned-twice":   {assign(map[int32][]int32{0: {1, 1}}), codeInvalidReplicaAssignment},
		"assigned-nobody":  {assign(map[int32][]int32{0: {}}), codeInvalidReplicaAssignment},
		"assigned-uneven":  {assign(map[int32][]int32{0: {1}, 1: {}}), codeInvalidReplicaAssignment},
		"assigned-and": {func(x *kmsg.CreateTopicsRequestTopic) {
			assign(map[int32][]int32{0: {1}})(x)
			x.ReplicationFactor = 1
		}, codeInvalidRequest},
	} {
		if got := c.create(name, k.change); got != k.want {
			t.Errorf("%s: code %d, want %d", name, got, k.want)
		}
	}
	alter := kmsg.NewPtrIncrementalAlterConfigsRequest()
	x := kmsg.NewIncrementalAlterConfigsRequestResource()
	x.ResourceType, x.ResourceName = kmsg.ConfigResourceTypeTopic, "factor-1"
	k := kmsg.NewIncrementalAlterConfigsRequestResourceConfig()
	k.Name, k.Value = "min.insync.replicas", kmsg.StringPtr("2")
	x.Configs = append(x.Configs, k)
	alter.Resources = append(alter.Resources, x)
	if got := c.ask(alter, 1).(*kmsg.IncrementalAlterConfigsResponse).Resources[0].ErrorCode; got != codeInvalidConfig {
		t.Errorf("altering min.insync.replicas: code %d", got)
	}
}

// quorumOf is a backend with another number of voters.
type quorumOf struct {
	Backend
	voters int
}

func (q quorumOf) Voters() int { return q.voters }

// What was a majority of three is none of one: with acks=all nothing is promised that the quorum cannot keep any more.
func TestMinInsyncAfterTheQuorumHasShrunk(t *testing.T) {
	w := start(t, nil)
	for voters, want := range map[int]int16{1: codeNotEnoughReplicas, 2: codeNone, 3: codeNone} {
		s := &Server{b: quorumOf{w.s.b, voters}}
		if err := s.checkTopicConfig(map[string]string{minInsyncReplicas: "2"}); (err == nil) != (want == codeNone) {
			t.Errorf("%d voters: %v", voters, err)
		}
	}
	spec := raftmeta.TopicSpec{Name: "t", Partitions: 1, ReplicationFactor: 1, Configs: map[string]string{minInsyncReplicas: "2"}} // as it was made when there were three
	if made := w.CreateTopics(t.Context(), []raftmeta.TopicSpec{spec}); made[0].Err != nil {
		t.Fatal(made[0].Err)
	}
	c := w.dial(t)
	for acks, want := range map[int16]int16{-1: codeNotEnoughReplicas, 1: codeNone} {
		p := kmsg.NewPtrProduceRequest()
		p.Acks, p.TimeoutMillis = acks, 5000
		x := kmsg.NewProduceRequestTopic()
		x.Topic = "t"
		part := kmsg.NewProduceRequestTopicPartition()
		part.Records = batchBytes(t, record.CodecNone, "v")
		x.Partitions = append(x.Partitions, part)
		p.Topics = append(p.Topics, x)
		if got := c.ask(p, 9).(*kmsg.ProduceResponse).Topics[0].Partitions[0].ErrorCode; got != want {
			t.Errorf("acks=%d: code %d, want %d", acks, got, want)
		}
	}
}
