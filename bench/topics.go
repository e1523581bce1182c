package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// topics creates topics, one request after the other, and prints the latency of a request.
func topics(ctx context.Context, o options) error {
	cl, err := kgo.NewClient(o.seeds())
	if err != nil {
		return err
	}
	defer cl.Close()
	adm := kadm.NewClient(cl)
	lat := make([]time.Duration, 0, o.count)
	for i := range o.count {
		sent := time.Now()
		r, err := adm.CreateTopic(ctx, int32(o.partitions), int16(o.rf), nil, fmt.Sprintf("%s-%d", o.topic, i))
		if err := errors.Join(err, r.Err); err != nil {
			return err
		}
		lat = append(lat, time.Since(sent))
	}
	slices.Sort(lat)
	ms := func(p float64) float64 {
		return float64(lat[min(len(lat)-1, int(p*float64(len(lat))))].Microseconds()) / 1000
	}
	fmt.Printf("topics count=%d partitions=%d p50_ms=%.2f p99_ms=%.2f max_ms=%.2f\n", o.count, o.partitions, ms(.5), ms(.99), ms(1))
	return nil
}

// many creates topics at once and prints how long it takes until a record in the first partition of each has been acknowledged.
func many(ctx context.Context, o options) error {
	cl, err := kgo.NewClient(o.seeds(), kgo.MetadataMinAge(100*time.Millisecond), kgo.MaxBufferedRecords(2*o.count), kgo.ProducerLinger(0), kgo.UnknownTopicRetries(-1),
		kgo.RecordPartitioner(kgo.ManualPartitioner()))
	if err != nil {
		return err
	}
	defer cl.Close()
	adm := kadm.NewClient(cl)
	names := make([]string, o.count)
	for i := range names {
		names[i] = fmt.Sprintf("%s-%d", o.topic, i)
	}
	begin := time.Now()
	for part := range slices.Chunk(names, (len(names)+o.requests-1)/o.requests) {
		rs, err := adm.CreateTopics(ctx, int32(o.partitions), int16(o.rf), nil, part...)
		if err := errors.Join(err, rs.Error()); err != nil {
			return err
		}
	}
	created := time.Since(begin)
	records := make([]*kgo.Record, len(names))
	for i, n := range names {
		records[i] = &kgo.Record{Topic: n, Value: []byte("first")}
	}
	if err := cl.ProduceSync(ctx, records...).FirstErr(); err != nil {
		return err
	}
	fmt.Printf("many count=%d partitions=%d requests=%d created_ms=%d writable_ms=%d\n", o.count, o.partitions, o.requests, created.Milliseconds(), time.Since(begin).Milliseconds())
	return nil
}
