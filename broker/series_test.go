package broker

import (
	"fmt"
	"testing"

	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Topics that come and go do not leave their series behind; that of a topic that stays is kept.
func TestSeriesOfDeletedTopics(t *testing.T) {
	reg := prometheus.NewRegistry()
	w := start(t, func(c *Config) { c.Registerer = reg })
	w.topic(t, "stays", 1, nil)
	c := w.dial(t)
	send := func(topic string) {
		t.Helper()
		if p := c.ask(produceReq(topic, -1, batchBytes(t, record.CodecNone, "v")), 9).(*kmsg.ProduceResponse).Topics[0].Partitions[0]; p.ErrorCode != 0 {
			t.Fatal(p.ErrorCode)
		}
	}
	send("stays")
	for i := range 8 * sweepLeast {
		name := fmt.Sprint("passes-", i)
		topic := w.topic(t, name, 1, nil)
		send(name)
		if err := w.DeleteTopics(t.Context(), []record.TopicID{topic.ID})[0]; err != nil {
			t.Fatal(err)
		}
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "kafka_server_brokertopicmetrics_messagesin_total" {
			continue
		}
		kept := false
		for _, m := range f.GetMetric() {
			kept = kept || m.GetLabel()[0].GetValue() == "stays" && m.GetCounter().GetValue() == 1
		}
		if n := len(f.GetMetric()); n > 2*sweepLeast || !kept {
			t.Errorf("%d series, that of the topic that is there among them: %v", n, kept)
		}
		return
	}
	t.Error("there are no such series")
}
