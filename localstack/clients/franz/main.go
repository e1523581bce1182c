// Command franz is franz-go as a client of the test of clients, and answers what its script must know of the cluster.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "franz:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) < 3 {
		return errors.New("usage: franz BOOTSTRAP produce TOPIC | group TOPIC GROUP COUNT | read TOPIC | leader TOPIC | coordinator GROUP | committed GROUP")
	}
	seeds, op, args := kgo.SeedBrokers(strings.Split(args[0], ",")...), args[1], args[2:]
	switch op {
	case "produce":
		return produce(ctx, seeds, args[0])
	case "group":
		n, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return group(ctx, seeds, args[0], args[1], n)
	}
	cl, err := kgo.NewClient(seeds)
	if err != nil {
		return err
	}
	defer cl.Close()
	adm := kadm.NewClient(cl)
	switch op {
	case "read":
		return read(ctx, adm, seeds, args[0])
	case "leader":
		ts, err := adm.ListTopics(ctx, args[0])
		if err != nil {
			return err
		}
		fmt.Println(ts[args[0]].Partitions[0].Leader)
	case "coordinator":
		r := adm.FindGroupCoordinators(ctx, args[0])[args[0]]
		if r.Err != nil {
			return r.Err
		}
		fmt.Println(r.NodeID)
	case "committed":
		os, err := adm.FetchOffsets(ctx, args[0])
		if err != nil {
			return err
		}
		sum := int64(0)
		os.Each(func(o kadm.OffsetResponse) { sum += o.At })
		fmt.Println(sum)
	default:
		return fmt.Errorf("unknown operation %q", op)
	}
	return nil
}

// produce sends the lines of stdin and prints one for each acknowledgement.
func produce(ctx context.Context, seeds kgo.Opt, topic string) error {
	cl, err := kgo.NewClient(seeds, kgo.DefaultProduceTopic(topic))
	if err != nil {
		return err
	}
	defer cl.Close()
	acks := make(chan error, 100_000)
	done := make(chan error, 1)
	go func() {
		for err := range acks {
			if err != nil {
				done <- err
				return
			}
			fmt.Println("acked")
		}
		done <- nil
	}()
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		cl.Produce(ctx, kgo.StringRecord(in.Text()), func(_ *kgo.Record, err error) { acks <- err })
	}
	if err := cl.Flush(ctx); err != nil {
		return err
	}
	close(acks)
	return <-done
}

// group consumes until it has seen so many values, and prints them. It commits often, and at the end.
func group(ctx context.Context, seeds kgo.Opt, topic, name string, count int) error {
	cl, err := kgo.NewClient(seeds, kgo.ConsumeTopics(topic), kgo.ConsumerGroup(name), kgo.DisableAutoCommit(), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		return err
	}
	defer cl.Close()
	for seen := map[string]bool{}; len(seen) < count; {
		fs := cl.PollRecords(ctx, 100)
		if err := fs.Err(); err != nil {
			return err
		}
		fs.EachRecord(func(r *kgo.Record) {
			seen[string(r.Value)] = true
			fmt.Println(string(r.Value))
		})
		if err := cl.CommitUncommittedOffsets(ctx); err != nil {
			return err
		}
	}
	return nil
}

// read prints partition, offset and value of every record, and fails if an offset is missing.
func read(ctx context.Context, adm *kadm.Client, seeds kgo.Opt, topic string) error {
	ends, err := adm.ListEndOffsets(ctx, topic)
	if err != nil {
		return err
	}
	left, next, from := int64(0), map[int32]int64{}, map[int32]kgo.Offset{}
	ends.Each(func(o kadm.ListedOffset) {
		left += o.Offset
		from[o.Partition] = kgo.NewOffset().At(0)
	})
	cl, err := kgo.NewClient(seeds, kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{topic: from}))
	if err != nil {
		return err
	}
	defer cl.Close()
	for left > 0 {
		fs := cl.PollFetches(ctx)
		if err := fs.Err(); err != nil {
			return err
		}
		for r := range fs.RecordsAll() {
			if r.Offset != next[r.Partition] {
				return fmt.Errorf("partition %d: offset %d where %d was due", r.Partition, r.Offset, next[r.Partition])
			}
			next[r.Partition]++
			left--
			fmt.Println(r.Partition, r.Offset, string(r.Value))
		}
	}
	return nil
}
