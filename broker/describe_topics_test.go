package broker

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeReq asks for topics, in an answer of so many partitions, from a cursor on ("" = the beginning).
func describeReq(limit int32, from string, partition int32, topics ...string) *kmsg.DescribeTopicPartitionsRequest {
	r := kmsg.NewPtrDescribeTopicPartitionsRequest()
	r.ResponsePartitionLimit = limit
	for _, name := range topics {
		x := kmsg.NewDescribeTopicPartitionsRequestTopic()
		x.Topic = name
		r.Topics = append(r.Topics, x)
	}
	if from != "" {
		r.Cursor = &kmsg.DescribeTopicPartitionsRequestCursor{Topic: from, Partition: partition}
	}
	return r
}

// described is an answer in words: a topic's code if it has one, its partitions, and what is next.
func described(r *kmsg.DescribeTopicPartitionsResponse) string {
	var out []string
	for _, x := range r.Topics {
		s := *x.Topic + ":"
		if x.ErrorCode != 0 {
			s += fmt.Sprint(" code ", x.ErrorCode)
		}
		for _, p := range x.Partitions {
			s += fmt.Sprint(" ", p.Partition)
		}
		out = append(out, s)
	}
	if c := r.NextCursor; c != nil {
		out = append(out, fmt.Sprintf("then %s %d", c.Topic, c.Partition))
	}
	return strings.Join(out, "; ")
}

// What is asked for comes in the order of the names, each topic once, up to the limit of partitions, and the cursor leads to the rest; what Kafka refuses is refused.
func TestDescribeTopicPartitions(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "c", 2, nil)
	w.topic(t, "a", 3, nil)
	w.topic(t, "b", 1, nil)
	c := w.dial(t)
	for _, x := range []struct {
		req  *kmsg.DescribeTopicPartitionsRequest
		want string
	}{
		{describeReq(2000, "", 0), "a: 0 1 2; b: 0; c: 0 1"},
		{describeReq(2, "", 0), "a: 0 1; then a 2"},
		{describeReq(2, "a", 2), "a: 2; b: 0; then c 0"},
		{describeReq(2, "c", 0), "c: 0 1"},
		{describeReq(3, "", 0), "a: 0 1 2; then b 0"},
		{describeReq(0, "", 0), "a: 0; then a 1"},
		{describeReq(-5, "bb", 7), "c: 0; then c 1"}, // a topic that has gone meanwhile
		{describeReq(9, "a", 99), "a:; b: 0; c: 0 1"},
		{describeReq(9, "z", 0), ""},
		{describeReq(9, "", 0, "c", "a", "c"), "a: 0 1 2; c: 0 1"},
		{describeReq(9, "c", 1, "c", "a"), "c: 1"},
		{describeReq(9, "", 0, "b", "none", "bad name"), fmt.Sprintf("b: 0; bad name: code %d; none: code %d", codeInvalidTopic, codeUnknownTopicOrPartition)},
		{describeReq(9, "b", 0, "a", "c"), "a: code 42; c: code 42"},
		{describeReq(9, "a", -1, "a"), "a: code 42"},
		{describeReq(9, "a", -1), ""},
	} {
		got := described(c.ask(x.req, 0).(*kmsg.DescribeTopicPartitionsResponse))
		if got != x.want {
			t.Errorf("limit %d from %+v of %v:\n%s, want\n%s", x.req.ResponsePartitionLimit, x.req.Cursor, x.req.Topics, got, x.want)
		}
	}
	if _, ok := w.Cluster().Topic("none"); ok {
		t.Error("a topic was made because it was asked for")
	}
}

// It says the same as Metadata. The lists of eligible replicas are empty, not null.
func TestDescribeTopicPartitionsAgreesWithMetadata(t *testing.T) {
	w := start(t, nil)
	topic := w.topic(t, "t", 3, nil)
	c := w.dial(t)
	got := c.ask(describeReq(10, "", 0, "t"), 0).(*kmsg.DescribeTopicPartitionsResponse).Topics[0]
	m := kmsg.NewPtrMetadataRequest()
	mt := kmsg.NewMetadataRequestTopic()
	mt.Topic = kmsg.StringPtr("t")
	m.Topics = append(m.Topics, mt)
	want := c.ask(m, 12).(*kmsg.MetadataResponse).Topics[0]
	if got.TopicID != want.TopicID || got.TopicID != topic.ID || got.IsInternal || got.AuthorizedOperations != topicOperations || len(got.Partitions) != len(want.Partitions) {
		t.Fatalf("%+v\n%+v", got, want)
	}
	for i, p := range got.Partitions {
		if p.EligibleLeaderReplicas == nil || p.LastKnownELR == nil {
			t.Errorf("partition %d: a list of eligible replicas is null", i)
		}
		q := kmsg.MetadataResponseTopicPartition{ErrorCode: p.ErrorCode, Partition: p.Partition, Leader: p.LeaderID, LeaderEpoch: p.LeaderEpoch, Replicas: p.Replicas, ISR: p.ISR, OfflineReplicas: p.OfflineReplicas}
		if d := cmp.Diff(want.Partitions[i], q, cmp.AllowUnexported(kmsg.Tags{})); d != "" {
			t.Errorf("partition %d: %s", i, d)
		}
	}
}

// However much is asked for, an answer has no more partitions than Kafka's.
func TestDescribeTopicPartitionsIsBounded(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "large", describedMost+1, nil)
	c := w.dial(t)
	r := c.ask(describeReq(1<<31-1, "", 0), 0).(*kmsg.DescribeTopicPartitionsResponse)
	if n := len(r.Topics[0].Partitions); n != describedMost || r.NextCursor == nil || r.NextCursor.Partition != describedMost {
		t.Errorf("%d partitions, then %+v", n, r.NextCursor)
	}
}
