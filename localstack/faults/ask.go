package main

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/estran/estran/localstack/check"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/kversion"
)

// Each voter is asked for what comes next where records were just acknowledged, by clients that know the leader epochs of some time ago; some questions are of clients that know none, as old ones do, whom
// nothing fences. They do not wait for one answer before they ask again: a voter that was
// stopped finds their questions when it goes on, and may believe that it leads.
const (
	askEvery  = 10 * time.Millisecond
	unknowing = 4   // one of so many
	askOpen   = 200 // questions to one voter without an answer
	prompt    = 200 * time.Millisecond
	late      = 3 * time.Second // behind which such a client's metadata may be
)

// ask asks one voter, numbered from 1, until ctx ends; the leader epochs are learned anew every so often.
func (w *workload) ask(ctx context.Context, process, voter int32, learn time.Duration, rng *rand.Rand) {
	versions := kversion.Stable()
	versions.SetMaxKeyVersion(kmsg.NewPtrFetchRequest().Key(), 12) // the last that names topics
	cl, err := w.client(kgo.RequestRetries(0), kgo.MaxVersions(versions))
	if err != nil {
		panic(err) // options that contradict one another
	}
	defer cl.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	room := make(chan struct{}, askOpen)
	b := cl.SeedBrokers()[voter-1]
	var epochs [keptPartitions]int32
	var learned time.Time
	for ; ctx.Err() == nil; sleep(ctx, askEvery) {
		if time.Since(learned) > learn {
			if m, err := kadm.NewClient(cl).Metadata(ctx, kept); err == nil {
				for p, d := range m.Topics[kept].Partitions {
					epochs[p] = d.LeaderEpoch
				}
				learned = time.Now()
			}
		}
		select {
		case room <- struct{}{}:
		default:
			continue
		}
		key := rng.Int32N(keptPartitions)
		epoch := epochs[key]
		if rng.IntN(unknowing) == 0 {
			epoch = -1
		}
		wg.Go(func() {
			w.askOne(ctx, b, process, voter, key, epoch)
			<-room
		})
	}
}

func (w *workload) askOne(ctx context.Context, b *kgo.Broker, process, voter, key, epoch int32) {
	o := check.Op{Process: process, Outcome: check.OK, Group: voter, Generation: epoch, Start: w.now()}
	o.Records = []check.Record{{Key: key, Offset: w.next[key].Load()}}
	q, t, p := kmsg.NewPtrFetchRequest(), kmsg.NewFetchRequestTopic(), kmsg.NewFetchRequestTopicPartition()
	t.Topic, p.Partition = partitionOf(key)
	p.FetchOffset, p.CurrentLeaderEpoch, p.PartitionMaxBytes = o.Records[0].Offset, epoch, 1
	t.Partitions = append(t.Partitions, p)
	q.Topics, q.MaxBytes, q.SessionEpoch = append(q.Topics, t), 1, -1
	resp, err := b.Request(ctx, q)
	if err != nil {
		return
	}
	topics := resp.(*kmsg.FetchResponse).Topics
	if len(topics) != 1 || len(topics[0].Partitions) != 1 {
		return
	}
	switch topics[0].Partitions[0].ErrorCode {
	case 0:
		o.Kind = check.Served
	case kerr.OffsetOutOfRange.Code:
		o.Kind = check.OutOfRange
	default:
		return
	}
	o.End = w.now()
	w.record(o)
}
