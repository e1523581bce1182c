package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/estran/estran/localstack/check"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// What is asked about names beside records: topics that come and go, and offsets that a group without members commits. Each operation is one request to one voter, never repeated: what
// becomes of it is to be known, or not to be known.
const (
	admins    = 2
	names     = 3 // of topics and of groups; each has a history of its own
	metaPause = 100 * time.Millisecond
	// metaLimit bounds how long the order of a name's operations is looked for.
	metaLimit = time.Minute
)

func (w *workload) administer(ctx context.Context, process int, rng *rand.Rand) {
	cl, err := w.client(kgo.RequestRetries(0))
	if err != nil {
		panic(err) // options that contradict one another
	}
	defer cl.Close()
	seeds := cl.SeedBrokers()
	for n := int64(process); ctx.Err() == nil; n += admins {
		o := check.Metadata{Process: process, Value: n}
		b := seeds[rng.IntN(len(seeds))]
		name := string(rune('a' + rng.IntN(names)))
		o.Start = w.now()
		switch rng.IntN(4) {
		case 0:
			o.Name, o.Command, o.Value = "topic-"+name, check.Create, 0
			o.Outcome = create(ctx, b, o.Name)
		case 1:
			o.Name, o.Command = "topic-"+name, check.Delete
			o.Outcome = remove(ctx, b, o.Name)
		case 2:
			o.Name, o.Command = "group-"+name, check.Set
			o.Outcome = commit(ctx, b, o.Name, o.Value)
		case 3:
			o.Name, o.Command = "group-"+name, check.Get
			o.Value, o.Outcome = committed(ctx, b, o.Name)
		}
		o.End = w.now()
		w.mu.Lock()
		w.asked = append(w.asked, o)
		w.mu.Unlock()
		sleep(ctx, metaPause)
	}
}

// outcome of a request that was sent once: only these two codes say that it has not happened.
func outcome(err error, code int16) check.Outcome {
	switch {
	case err == nil && code == 0:
		return check.OK
	case err == nil && (code == kerr.TopicAlreadyExists.Code || code == kerr.UnknownTopicOrPartition.Code):
		return check.Fail
	}
	return check.Info
}

func create(ctx context.Context, b *kgo.Broker, topic string) check.Outcome {
	q := kmsg.NewPtrCreateTopicsRequest()
	t := kmsg.NewCreateTopicsRequestTopic()
	t.Topic, t.NumPartitions, t.ReplicationFactor = topic, 1, 3
	q.Topics = append(q.Topics, t)
	resp, err := b.Request(ctx, q)
	if err != nil {
		return check.Info
	}
	return outcome(nil, resp.(*kmsg.CreateTopicsResponse).Topics[0].ErrorCode)
}

func remove(ctx context.Context, b *kgo.Broker, topic string) check.Outcome {
	q := kmsg.NewPtrDeleteTopicsRequest()
	q.TopicNames = []string{topic}
	t := kmsg.NewDeleteTopicsRequestTopic()
	t.Topic = &topic
	q.Topics = append(q.Topics, t)
	resp, err := b.Request(ctx, q)
	if err != nil {
		return check.Info
	}
	return outcome(nil, resp.(*kmsg.DeleteTopicsResponse).Topics[0].ErrorCode)
}

// commit and committed use partition 0 of the topic that stays.
func commit(ctx context.Context, b *kgo.Broker, group string, offset int64) check.Outcome {
	q := kmsg.NewPtrOffsetCommitRequest()
	q.Group, q.Generation = group, -1
	t, p := kmsg.NewOffsetCommitRequestTopic(), kmsg.NewOffsetCommitRequestTopicPartition()
	t.Topic, p.Offset = kept, offset
	t.Partitions = append(t.Partitions, p)
	q.Topics = append(q.Topics, t)
	resp, err := b.Request(ctx, q)
	if err != nil {
		return check.Info
	}
	return outcome(nil, resp.(*kmsg.OffsetCommitResponse).Topics[0].Partitions[0].ErrorCode)
}

func committed(ctx context.Context, b *kgo.Broker, group string) (int64, check.Outcome) {
	q := kmsg.NewPtrOffsetFetchRequest()
	q.Group, q.RequireStable = group, true
	t := kmsg.NewOffsetFetchRequestTopic()
	t.Topic, t.Partitions = kept, []int32{0}
	q.Topics = append(q.Topics, t)
	g, gt := kmsg.NewOffsetFetchRequestGroup(), kmsg.NewOffsetFetchRequestGroupTopic()
	gt.Topic, gt.Partitions = kept, []int32{0}
	g.Group, g.Topics = group, append(g.Topics, gt)
	q.Groups = append(q.Groups, g)
	r, err := b.Request(ctx, q)
	if err != nil {
		return 0, check.Info
	}
	resp := r.(*kmsg.OffsetFetchResponse)
	code, topics := resp.ErrorCode, resp.Topics
	for _, g := range resp.Groups {
		code = g.ErrorCode
		for _, t := range g.Topics {
			for _, p := range t.Partitions {
				if code == 0 {
					code = p.ErrorCode
				}
				return p.Offset, outcome(nil, code)
			}
		}
	}
	if code == 0 && len(topics) > 0 {
		p := topics[0].Partitions[0]
		return p.Offset, outcome(nil, p.ErrorCode)
	}
	return 0, check.Info
}

// judgeMetadata asks for an order that explains what was asked about each name, and keeps the operations of a name that has none.
func (r *result) judgeMetadata(c config, asked []check.Metadata) error {
	byName := map[string][]check.Metadata{}
	for _, o := range asked {
		byName[o.Name] = append(byName[o.Name], o)
	}
	var errs []error
	for name, ops := range byName {
		ok, decided := check.Linearizable(ops, metaLimit)
		switch {
		case !decided:
			r.Undecided++
		case !ok:
			r.Found["metadata-order"]++
			r.Anomalies++
			b, err := json.Marshal(ops)
			file := filepath.Join(c.keep, fmt.Sprintf("estran-metadata-%d-%s-%d.json", c.seed, name, r.Rounds))
			r.Histories = append(r.Histories, file)
			errs = append(errs, err, os.WriteFile(file, b, 0o600))
		}
	}
	return errors.Join(errs...)
}

// lookUp asks where timestamps begin that it has asked for before, and a new one.
func (w *workload) lookUp(ctx context.Context, process int32) {
	cl, err := w.client()
	if err != nil {
		panic(err) // options that contradict one another
	}
	defer cl.Close()
	adm := kadm.NewClient(cl)
	for first := time.Now().UnixMilli(); ctx.Err() == nil; sleep(ctx, metaPause) {
		o := check.Op{Process: process, Kind: check.Lookup, Outcome: check.OK, Start: w.now()}
		for _, at := range []int64{first, (first + time.Now().UnixMilli()) / 2 / 1000 * 1000} {
			got, err := adm.ListOffsetsAfterMilli(ctx, at, kept)
			if err != nil {
				continue
			}
			got.Each(func(l kadm.ListedOffset) {
				if l.Err == nil && l.Timestamp >= 0 { // there is such a record
					o.Records = append(o.Records, check.Record{Key: keyOf(l.Topic, l.Partition), Offset: l.Offset, Value: uint64(at)})
				}
			})
		}
		o.End = w.now()
		w.record(o)
	}
}
