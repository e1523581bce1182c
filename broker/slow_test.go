package broker

import (
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// A fetch waits no longer than FetchWait, whatever the client says: the end of its connection is not seen before.
func TestFetchWaitIsBounded(t *testing.T) {
	w := start(t, func(c *Config) { c.FetchWait = 10 * time.Millisecond })
	w.topic(t, "t", 1, nil)
	r := fetchReq("t", 0)
	r.MaxWaitMillis, r.MinBytes = 1<<31-1, 1
	p := w.dial(t).ask(r, 11).(*kmsg.FetchResponse).Topics[0].Partitions[0]
	if p.ErrorCode != 0 || len(p.RecordBatches) != 0 {
		t.Errorf("%+v", p)
	}
}
