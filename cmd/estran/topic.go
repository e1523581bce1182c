package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

// client flags that every command which talks Kafka has.
type clientFlags struct {
	bootstrap string
	timeout   time.Duration
	format    string
}

func (f *clientFlags) add(c *cobra.Command) {
	c.PersistentFlags().StringVarP(&f.bootstrap, "bootstrap", "b", "localhost:9092", "address of a broker")
	c.PersistentFlags().DurationVar(&f.timeout, "timeout", 15*time.Second, "how long to wait for the cluster")
	c.PersistentFlags().StringVarP(&f.format, "output", "o", "table", "table or json")
}

func (f *clientFlags) open(opts ...kgo.Opt) (*kgo.Client, error) {
	if f.format != "table" && f.format != "json" {
		return nil, &fault{Code: "E_USAGE", What: fmt.Sprintf("--output %q is not table or json", f.format), Exit: exitUsage}
	}
	opts = append([]kgo.Opt{kgo.SeedBrokers(strings.Split(f.bootstrap, ",")...), kgo.DialTimeout(5 * time.Second),
		kgo.RetryTimeout(f.timeout), kgo.RequestTimeoutOverhead(f.timeout)}, opts...)
	return kgo.NewClient(opts...)
}

// admin runs do with an admin client and explains a broker that does not answer.
func (f *clientFlags) admin(ctx context.Context, do func(context.Context, *kadm.Client) error) error {
	cl, err := f.open()
	if err != nil {
		return err
	}
	defer cl.Close()
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	return f.explain(do(ctx, kadm.NewClient(cl)))
}

func (f *clientFlags) explain(err error) error {
	if err == nil {
		return nil
	}
	if ke, ok := errors.AsType[*kerr.Error](err); ok {
		return &fault{Code: "E_KAFKA_" + ke.Message, What: err.Error(), Err: err}
	}
	if _, ok := errors.AsType[*fault](err); ok {
		return err
	}
	return &fault{Code: "E_BROKER_UNREACHABLE", What: fmt.Sprintf("no answer from %s: %v", f.bootstrap, err), Err: err, Exit: exitNotReady,
		Fix: "start one with `estran dev`, or give its address with --bootstrap"}
}

func topicCommand(s streams) *cobra.Command {
	f := &clientFlags{}
	c := group("topic", "Create, list, describe and delete topics; produce and consume",
		topicCreate(s, f), topicList(s, f), topicDescribe(s, f), topicDelete(s, f), topicProduce(s, f), topicConsume(s, f))
	f.add(c)
	return c
}

func topicCreate(s streams, f *clientFlags) *cobra.Command {
	var partitions int32
	var replicas int16
	var configs []string
	c := &cobra.Command{Use: "create NAME...", Short: "Create topics", Args: usage(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			cfg := map[string]*string{}
			for _, kv := range configs {
				k, v, ok := strings.Cut(kv, "=")
				if !ok {
					return &fault{Code: "E_USAGE", What: fmt.Sprintf("--config %q is not KEY=VALUE", kv), Exit: exitUsage}
				}
				cfg[k] = &v
			}
			return f.admin(cmd.Context(), func(ctx context.Context, adm *kadm.Client) error {
				res, err := adm.CreateTopics(ctx, partitions, replicas, cfg, names...)
				if err != nil {
					return err
				}
				var errs []error
				for _, name := range names {
					if r := res[name]; r.Err != nil {
						errs = append(errs, fmt.Errorf("cannot create topic %q: %w%s", name, r.Err, detail(r.ErrMessage)))
					} else {
						fmt.Fprintf(s.out, "created topic %s with %d partitions\n", name, r.NumPartitions)
					}
				}
				return errors.Join(errs...)
			})
		}}
	c.Flags().Int32VarP(&partitions, "partitions", "p", -1, "number of partitions; -1 = the cluster's default")
	c.Flags().Int16VarP(&replicas, "replication-factor", "r", -1, "number of replicas; -1 = the cluster's default")
	c.Flags().StringArrayVarP(&configs, "config", "c", nil, "topic configuration KEY=VALUE, repeatable")
	return c
}

func detail(msg string) string {
	if msg == "" {
		return ""
	}
	return " (" + msg + ")"
}

// topicRow is a topic as list and describe print it.
type topicRow struct {
	Name       string         `json:"name"`
	ID         string         `json:"id"`
	Partitions []partitionRow `json:"partitions"`
}

type partitionRow struct {
	Partition int32   `json:"partition"`
	Leader    int32   `json:"leader"`
	Epoch     int32   `json:"leader_epoch"`
	Replicas  []int32 `json:"replicas"`
	LogStart  int64   `json:"log_start_offset"`
	HighWater int64   `json:"high_watermark"`
}

func topicList(s streams, f *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "list", Short: "List topics", Args: usage(cobra.NoArgs), RunE: func(cmd *cobra.Command, _ []string) error {
		return f.admin(cmd.Context(), func(ctx context.Context, adm *kadm.Client) error {
			topics, err := adm.ListTopics(ctx)
			if err != nil {
				return err
			}
			if f.format == "json" {
				return json.NewEncoder(s.out).Encode(topics.Names())
			}
			w := tabwriter.NewWriter(s.out, 0, 4, 2, ' ', 0)
			fmt.Fprintln(w, "TOPIC\tPARTITIONS")
			for _, t := range topics.Sorted() {
				fmt.Fprintf(w, "%s\t%d\n", t.Topic, len(t.Partitions))
			}
			return w.Flush()
		})
	}}
}

func describe(ctx context.Context, adm *kadm.Client, names []string) ([]topicRow, error) {
	topics, err := adm.ListTopics(ctx, names...)
	if err != nil {
		return nil, err
	}
	starts, err := adm.ListStartOffsets(ctx, names...)
	if err != nil {
		return nil, err
	}
	ends, err := adm.ListEndOffsets(ctx, names...)
	if err != nil {
		return nil, err
	}
	var rows []topicRow
	for _, t := range topics.Sorted() {
		if t.Err != nil {
			return nil, fmt.Errorf("topic %q: %w", t.Topic, t.Err)
		}
		row := topicRow{Name: t.Topic, ID: t.ID.String()}
		for _, p := range t.Partitions.Sorted() {
			start, _ := starts.Lookup(t.Topic, p.Partition)
			end, _ := ends.Lookup(t.Topic, p.Partition)
			row.Partitions = append(row.Partitions, partitionRow{p.Partition, p.Leader, p.LeaderEpoch, p.Replicas, start.Offset, end.Offset})
		}
		rows = append(rows, row)
	}
	return rows, nil
}

func topicDescribe(s streams, f *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "describe NAME...", Short: "Show partitions, leaders and offsets", Args: usage(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			return f.admin(cmd.Context(), func(ctx context.Context, adm *kadm.Client) error {
				rows, err := describe(ctx, adm, names)
				if err != nil {
					return err
				}
				if f.format == "json" {
					return json.NewEncoder(s.out).Encode(rows)
				}
				w := tabwriter.NewWriter(s.out, 0, 4, 2, ' ', 0)
				fmt.Fprintln(w, "TOPIC\tPARTITION\tLEADER\tEPOCH\tREPLICAS\tLOG START\tHIGH WATERMARK")
				for _, t := range rows {
					for _, p := range t.Partitions {
						fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%v\t%d\t%d\n", t.Name, p.Partition, p.Leader, p.Epoch, p.Replicas, p.LogStart, p.HighWater)
					}
				}
				return w.Flush()
			})
		}}
}

func topicDelete(s streams, f *clientFlags) *cobra.Command {
	var yes bool
	c := &cobra.Command{Use: "delete NAME...", Short: "Delete topics and their records", Args: usage(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			if !yes {
				return &fault{Code: "E_CONFIRM", Exit: exitUsage, What: fmt.Sprintf("this deletes %s with all records", strings.Join(names, ", ")), Fix: "repeat with --yes"}
			}
			return f.admin(cmd.Context(), func(ctx context.Context, adm *kadm.Client) error {
				res, err := adm.DeleteTopics(ctx, names...)
				if err != nil {
					return err
				}
				var errs []error
				for _, name := range names {
					if r := res[name]; r.Err != nil {
						errs = append(errs, fmt.Errorf("cannot delete topic %q: %w", name, r.Err))
					} else {
						fmt.Fprintf(s.out, "deleted topic %s\n", name)
					}
				}
				return errors.Join(errs...)
			})
		}}
	c.Flags().BoolVar(&yes, "yes", false, "do it without asking")
	return c
}

// jsonRecord is a record as consume --json prints and produce --json reads it.
type jsonRecord struct {
	Topic     string       `json:"topic,omitempty"`
	Partition *int32       `json:"partition,omitempty"`
	Offset    *int64       `json:"offset,omitempty"`
	Timestamp int64        `json:"timestamp,omitempty"` // ms
	Key       *string      `json:"key"`
	Value     *string      `json:"value"`
	Headers   []jsonHeader `json:"headers,omitempty"`
}

type jsonHeader struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

const lineMax = 64 << 20

func topicProduce(s streams, f *clientFlags) *cobra.Command {
	var key, codec string
	var asJSON bool
	var partition int32
	c := &cobra.Command{Use: "produce TOPIC", Short: "Produce one record per line of standard input", Args: usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			comp, ok := map[string]kgo.CompressionCodec{"none": kgo.NoCompression(), "gzip": kgo.GzipCompression(), "snappy": kgo.SnappyCompression(),
				"lz4": kgo.Lz4Compression(), "zstd": kgo.ZstdCompression()}[codec]
			if !ok {
				return &fault{Code: "E_USAGE", What: fmt.Sprintf("--compression %q is not none, gzip, snappy, lz4 or zstd", codec), Exit: exitUsage}
			}
			opts := []kgo.Opt{kgo.DefaultProduceTopic(args[0]), kgo.ProducerBatchCompression(comp), kgo.RecordDeliveryTimeout(f.timeout), kgo.AllowAutoTopicCreation()}
			if partition >= 0 {
				opts = append(opts, kgo.RecordPartitioner(kgo.ManualPartitioner()))
			}
			cl, err := f.open(opts...)
			if err != nil {
				return err
			}
			defer cl.Close()
			n, err := produceLines(cmd.Context(), cl, s, 2*f.timeout, func(line []byte) (*kgo.Record, error) {
				r := &kgo.Record{Partition: max(partition, 0), Value: line}
				if key != "" {
					r.Key = []byte(key)
				}
				if asJSON {
					return r, fromJSON(r, line)
				}
				return r, nil
			})
			if err != nil {
				return f.explain(err)
			}
			fmt.Fprintf(s.err, "produced %d records to %s\n", n, args[0])
			return nil
		}}
	c.Flags().StringVarP(&key, "key", "k", "", "key of every record")
	c.Flags().StringVarP(&codec, "compression", "z", "none", "none, gzip, snappy, lz4 or zstd")
	c.Flags().BoolVar(&asJSON, "json", false, "lines are JSON as `consume --json` prints it")
	c.Flags().Int32VarP(&partition, "partition", "p", -1, "partition of every record; -1 = by key")
	return c
}

func fromJSON(r *kgo.Record, line []byte) error {
	var j jsonRecord
	if err := json.Unmarshal(line, &j); err != nil {
		return &fault{Code: "E_INPUT", What: fmt.Sprintf("standard input is not JSON: %v", err), Exit: exitUsage, Err: err}
	}
	r.Key, r.Value = nil, nil
	if j.Key != nil {
		r.Key = []byte(*j.Key)
	}
	if j.Value != nil {
		r.Value = []byte(*j.Value)
	}
	for _, h := range j.Headers {
		r.Headers = append(r.Headers, kgo.RecordHeader{Key: h.Key, Value: []byte(h.Value)})
	}
	return nil
}

// produceLines sends every line and returns how many records were acknowledged; the first failure stops it. So does patience without an answer
// while records are on their way: the client never gives up one whose request was cut off, as it may have been stored.
func produceLines(ctx context.Context, cl *kgo.Client, s streams, patience time.Duration, parse func([]byte) (*kgo.Record, error)) (int, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var unanswered atomic.Int64
	silence := time.AfterFunc(patience, func() {
		if n := unanswered.Load(); n > 0 {
			cancel(&fault{Code: "E_TIMEOUT", What: fmt.Sprintf("%d records were sent and not acknowledged, nothing was for %v: they may or may not be stored", n, patience),
				Fix: "see whether the cluster is up: estran cluster health; then look for them before they are sent again", Exit: exitNotReady})
		}
	})
	defer silence.Stop()
	sc := bufio.NewScanner(s.in)
	sc.Buffer(nil, lineMax)
	n := 0
	for sc.Scan() && ctx.Err() == nil {
		r, err := parse(slices.Clone(sc.Bytes()))
		if err != nil {
			cancel(err)
			break
		}
		n++
		if unanswered.Load() == 0 { // before it counts: silence of a moment ago is not of this record
			silence.Reset(patience)
		}
		unanswered.Add(1)
		cl.Produce(ctx, r, func(_ *kgo.Record, err error) {
			unanswered.Add(-1)
			silence.Reset(patience)
			if err != nil {
				cancel(err)
			}
		})
	}
	if err := cl.Flush(ctx); err != nil && context.Cause(ctx) == nil {
		return 0, err
	}
	if err := context.Cause(ctx); err != nil {
		return 0, err
	}
	return n, sc.Err()
}

func topicConsume(s streams, f *clientFlags) *cobra.Command {
	var from, grp string
	var count int
	var asJSON, tail bool
	var partitions []int32
	c := &cobra.Command{Use: "consume TOPIC", Short: "Print records", Args: usage(cobra.ExactArgs(1)),
		Long: "Print records, one line each. --from start reads what is there and ends at the end; with --tail it goes on waiting.",
		RunE: func(cmd *cobra.Command, args []string) error {
			off, err := parseFrom(from)
			if err != nil {
				return err
			}
			if tail || grp != "" {
				return f.explain(tailTopic(cmd.Context(), s, f, args[0], grp, off, partitions, count, asJSON))
			}
			return f.explain(consumeToEnd(cmd.Context(), s, f, args[0], off, partitions, count, asJSON))
		}}
	c.Flags().StringVar(&from, "from", "start", "start, end, an offset, -N (the newest N), or @TIME (RFC 3339 or @-1h)")
	c.Flags().StringVarP(&grp, "group", "g", "", "consume as a member of this group and commit")
	c.Flags().IntVarP(&count, "count", "n", 0, "stop after this many records; 0 = no limit")
	c.Flags().BoolVar(&asJSON, "json", false, "one JSON object per record")
	c.Flags().BoolVar(&tail, "tail", false, "wait for new records")
	c.Flags().Int32SliceVarP(&partitions, "partitions", "p", nil, "only these partitions")
	return c
}

func parseFrom(s string) (kgo.Offset, error) {
	o := kgo.NewOffset()
	switch {
	case s == "start":
		return o.AtStart(), nil
	case s == "end":
		return o.AtEnd(), nil
	case strings.HasPrefix(s, "@-"):
		d, err := time.ParseDuration(s[2:])
		if err == nil {
			return o.AfterMilli(time.Now().Add(-d).UnixMilli()), nil
		}
	case strings.HasPrefix(s, "@"):
		for _, layout := range []string{time.RFC3339, "2006-01-02T15:04Z07:00"} {
			if t, err := time.Parse(layout, s[1:]); err == nil {
				return o.AfterMilli(t.UnixMilli()), nil
			}
		}
	default:
		n, err := strconv.ParseInt(s, 10, 64)
		if err == nil && n < 0 {
			return o.AtEnd().Relative(n), nil
		}
		if err == nil {
			return o.At(n), nil
		}
	}
	return o, &fault{Code: "E_USAGE", What: fmt.Sprintf("--from %q is not start, end, an offset, -N or @TIME", s), Exit: exitUsage}
}

func printRecord(s streams, r *kgo.Record, asJSON bool) error {
	if !asJSON {
		_, err := fmt.Fprintf(s.out, "%s\n", r.Value)
		return err
	}
	j := jsonRecord{Topic: r.Topic, Partition: &r.Partition, Offset: &r.Offset, Timestamp: r.Timestamp.UnixMilli()}
	if r.Key != nil {
		k := string(r.Key)
		j.Key = &k
	}
	if r.Value != nil {
		v := string(r.Value)
		j.Value = &v
	}
	for _, h := range r.Headers {
		j.Headers = append(j.Headers, jsonHeader{h.Key, string(h.Value)})
	}
	return json.NewEncoder(s.out).Encode(j)
}

// consumeToEnd reads up to the high watermarks found at the start and then returns.
func consumeToEnd(ctx context.Context, s streams, f *clientFlags, topic string, from kgo.Offset, partitions []int32, count int, asJSON bool) error {
	adm, err := f.open()
	if err != nil {
		return err
	}
	defer adm.Close()
	meta, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	rows, err := describe(meta, kadm.NewClient(adm), []string{topic})
	if err != nil {
		return err
	}
	assign, left := map[int32]kgo.Offset{}, map[int32]int64{}
	for _, p := range rows[0].Partitions {
		if (len(partitions) == 0 || slices.Contains(partitions, p.Partition)) && p.HighWater > p.LogStart {
			assign[p.Partition], left[p.Partition] = from, p.HighWater
		}
	}
	if len(assign) == 0 {
		return nil
	}
	cl, err := f.open(kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{topic: assign}), kgo.KeepControlRecords(), kgo.FetchMaxWait(100*time.Millisecond))
	if err != nil {
		return err
	}
	defer cl.Close()
	return pollUntilEnd(ctx, cl, s, f, topic, left, count, asJSON)
}

func pollUntilEnd(ctx context.Context, cl *kgo.Client, s streams, f *clientFlags, topic string, left map[int32]int64, count int, asJSON bool) error {
	printed := 0
	for len(left) > 0 {
		poll, cancel := context.WithTimeout(ctx, f.timeout)
		fetches := cl.PollFetches(poll)
		cancel()
		if err := ctx.Err(); err != nil {
			return err
		}
		for _, e := range fetches.Errors() {
			if errors.Is(e.Err, context.DeadlineExceeded) {
				return nil // nothing more to read: the offset asked for lies at or behind the end
			}
			return e.Err
		}
		var err error
		fetches.EachRecord(func(r *kgo.Record) {
			if err == nil && !r.Attrs.IsControl() && (count == 0 || printed < count) {
				err = printRecord(s, r, asJSON)
				printed++
			}
			if r.Offset+1 >= left[r.Partition] {
				delete(left, r.Partition)
				cl.PauseFetchPartitions(map[string][]int32{topic: {r.Partition}})
			}
		})
		if err != nil || count > 0 && printed >= count {
			return err
		}
	}
	return nil
}

func tailTopic(ctx context.Context, s streams, f *clientFlags, topic, grp string, from kgo.Offset, partitions []int32, count int, asJSON bool) error {
	opts := []kgo.Opt{kgo.ConsumeResetOffset(from), kgo.FetchMaxWait(500 * time.Millisecond)}
	switch {
	case grp != "":
		opts = append(opts, kgo.ConsumerGroup(grp), kgo.ConsumeTopics(topic))
	case len(partitions) > 0:
		m := map[int32]kgo.Offset{}
		for _, p := range partitions {
			m[p] = from
		}
		opts = append(opts, kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{topic: m}))
	default:
		opts = append(opts, kgo.ConsumeTopics(topic))
	}
	cl, err := f.open(opts...)
	if err != nil {
		return err
	}
	defer cl.Close()
	printed := 0
	for {
		fetches := cl.PollRecords(ctx, 1000)
		if ctx.Err() != nil {
			return nil
		}
		for _, e := range fetches.Errors() {
			return e.Err
		}
		for it := fetches.RecordIter(); !it.Done(); {
			r := it.Next()
			if err := printRecord(s, r, asJSON); err != nil {
				return err
			}
			cl.MarkCommitRecords(r)
			if printed++; count > 0 && printed >= count {
				if grp == "" {
					return nil
				}
				return cl.CommitMarkedOffsets(ctx)
			}
		}
	}
}
