// Command sarama is IBM's sarama as a client of the test of clients.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/IBM/sarama"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "sarama:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 3 {
		return errors.New("usage: sarama BOOTSTRAP produce TOPIC | group TOPIC GROUP COUNT")
	}
	cfg := sarama.NewConfig()
	cfg.Version = sarama.MaxVersion
	seeds := strings.Split(args[0], ",")
	if args[1] == "produce" {
		return produce(cfg, seeds, args[2])
	}
	n, err := strconv.Atoi(args[4])
	if err != nil {
		return err
	}
	return group(cfg, seeds, args[2], args[3], n)
}

// produce sends the lines of stdin and prints one for each acknowledgement.
func produce(cfg *sarama.Config, seeds []string, topic string) error {
	cfg.Producer.Idempotent, cfg.Producer.RequiredAcks, cfg.Net.MaxOpenRequests = true, sarama.WaitForAll, 1
	cfg.Producer.Retry.Max, cfg.Metadata.Retry.Max = 100, 20 // its own 3 in 0.75 s give up while a leader is being elected
	cfg.Producer.Return.Successes = true
	p, err := sarama.NewAsyncProducer(seeds, cfg)
	if err != nil {
		return err
	}
	var open sync.WaitGroup // a producer that is closed repeats nothing any more
	go func() {
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			open.Add(1)
			p.Input() <- &sarama.ProducerMessage{Topic: topic, Value: sarama.StringEncoder(in.Text())}
		}
		open.Wait()
		p.AsyncClose()
	}()
	go func() {
		for range p.Successes() {
			fmt.Println("acked")
			open.Done()
		}
	}()
	for e := range p.Errors() { // until it is closed
		err = errors.Join(err, e)
		open.Done()
	}
	return err
}

// group consumes until it has seen so many values, and prints them. It commits often, and at the end.
func group(cfg *sarama.Config, seeds []string, topic, name string, count int) error {
	cfg.Consumer.Offsets.Initial, cfg.Consumer.Offsets.AutoCommit.Enable = sarama.OffsetOldest, false
	g, err := sarama.NewConsumerGroup(seeds, name, cfg)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	h := &handler{values: make(chan string)}
	go func() {
		defer cancel()
		for seen := map[string]bool{}; len(seen) < count; {
			v := <-h.values
			seen[v] = true
			fmt.Println(v)
		}
	}()
	for ctx.Err() == nil { // again after every rebalance
		if err := g.Consume(ctx, []string{topic}, h); err != nil && ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "sarama: consuming again after:", err)
		}
	}
	return g.Close()
}

type handler struct{ values chan string }

func (*handler) Setup(sarama.ConsumerGroupSession) error { return nil }

// Cleanup implements sarama.ConsumerGroupHandler.
func (*handler) Cleanup(s sarama.ConsumerGroupSession) error {
	s.Commit()
	return nil
}

// ConsumeClaim implements sarama.ConsumerGroupHandler.
func (h *handler) ConsumeClaim(s sarama.ConsumerGroupSession, c sarama.ConsumerGroupClaim) error {
	for n := 0; ; n++ {
		select {
		case m, ok := <-c.Messages():
			if !ok {
				return nil
			}
			select {
			case h.values <- string(m.Value):
			case <-s.Context().Done():
				return nil
			}
			s.MarkMessage(m, "")
			if n%100 == 0 {
				s.Commit()
			}
		case <-s.Context().Done():
			return nil
		}
	}
}
