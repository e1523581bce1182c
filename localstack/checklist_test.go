package localstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// dump is what a node says of topics, their configuration and the offsets of a group, by itself.
func dump(ctx context.Context, t *testing.T, n *Node, group string) (string, error) {
	t.Helper()
	cl := client(t, n)
	node := cl.SeedBrokers()[0] // it, and no other
	resp, err := node.RetriableRequest(ctx, kmsg.NewPtrMetadataRequest())
	if err != nil {
		return "", err
	}
	topics := resp.(*kmsg.MetadataResponse).Topics
	slices.SortFunc(topics, func(a, b kmsg.MetadataResponseTopic) int { return strings.Compare(*a.Topic, *b.Topic) })
	var b strings.Builder
	configs := kmsg.NewPtrDescribeConfigsRequest()
	for _, topic := range topics {
		fmt.Fprintln(&b, "topic", *topic.Topic, kadm.TopicID(topic.TopicID), len(topic.Partitions))
		r := kmsg.NewDescribeConfigsRequestResource()
		r.ResourceType, r.ResourceName = kmsg.ConfigResourceTypeTopic, *topic.Topic
		configs.Resources = append(configs.Resources, r)
	}
	if resp, err = node.RetriableRequest(ctx, configs); err != nil {
		return "", err
	}
	for _, r := range resp.(*kmsg.DescribeConfigsResponse).Resources {
		if r.ErrorCode != 0 {
			return "", fmt.Errorf("%s: code %d", r.ResourceName, r.ErrorCode)
		}
		for _, c := range r.Configs {
			value := ""
			if c.Value != nil {
				value = *c.Value
			}
			fmt.Fprintln(&b, "config", r.ResourceName, c.Name, value)
		}
	}
	if group != "" {
		offsets, err := kadm.NewClient(cl).FetchOffsets(ctx, group) // from its coordinator, wherever that is
		if err != nil {
			return "", err
		}
		for _, o := range offsets.Sorted() {
			fmt.Fprintln(&b, "offset", o.Topic, o.Partition, o.At, o.Metadata)
		}
	}
	return b.String(), nil
}

// fill makes topics with configurations and a group with offsets, and returns the dump that every node gives of them.
func fill(t *testing.T, nodes []*Node) string {
	t.Helper()
	adm := kadm.NewClient(client(t, nodes[0]))
	for i := range 12 {
		value := strconv.Itoa(1 << (20 + i))
		done(t, "a topic to be made", kerr.TopicAlreadyExists, func() error {
			r, err := adm.CreateTopic(t.Context(), int32(1+i%3), 3, map[string]*string{"retention.bytes": &value, "retention.ms": kadm.StringPtr("86400000")}, fmt.Sprintf("topic-%02d", i))
			return errors.Join(err, r.Err)
		})
	}
	done(t, "a topic to be altered", nil, func() error {
		r, err := adm.AlterTopicConfigs(t.Context(), []kadm.AlterConfig{{Name: "max.message.bytes", Value: kadm.StringPtr("2000000")}}, "topic-03")
		if err == nil {
			err = r[0].Err
		}
		return err
	})
	done(t, "a topic to be deleted", kerr.UnknownTopicOrPartition, func() error { // it was there
		r, err := adm.DeleteTopic(t.Context(), "topic-05")
		return errors.Join(err, r.Err)
	})
	for i := range 30 {
		if err := client(t, nodes[i%3]).ProduceSync(t.Context(), &kgo.Record{Topic: "topic-02", Value: []byte("v")}).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	offsets := kadm.Offsets{}
	for p := range int32(3) {
		offsets.Add(kadm.Offset{Topic: "topic-02", Partition: p, At: int64(p) + 1, Metadata: fmt.Sprint("m", p)})
	}
	until(t, "the offsets to be committed", func() bool {
		r, err := adm.CommitOffsets(t.Context(), "g", offsets)
		return err == nil && r.Error() == nil
	})
	var want string
	for _, n := range nodes {
		until(t, "every node to say the same", func() bool {
			got, err := dump(t.Context(), t, n, "g")
			if want == "" {
				want = got
			}
			return err == nil && got == want
		})
	}
	if !strings.Contains(want, "config topic-03 max.message.bytes 2000000") || !strings.Contains(want, "offset topic-02 2 3 m2") || strings.Contains(want, "topic-05") {
		t.Fatal(want)
	}
	return want
}

// Rows 21, 23 and 27: what is known of topics, configurations and offsets is the same after a kill -9 of all, and at a voter that came back without its disk.
func TestMetadataSurvives(t *testing.T) {
	nodes := startQuorum(t, 3)
	want := fill(t, nodes)
	for _, n := range nodes {
		if err := n.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	startAll(t, nodes)
	same := func(when string) {
		for i, n := range nodes {
			got := ""
			until(t, when+": a dump of every node", func() (ok bool) {
				var err error
				got, err = dump(t.Context(), t, n, "g")
				return err == nil && got == want
			})
			if got != want {
				t.Errorf("%s: node %d says\n%s\nwant\n%s", when, i+1, got, want)
			}
		}
	}
	same("after a kill of all")
	if err := nodes[2].Kill(); err != nil {
		t.Fatal(err)
	}
	if err := nodes[2].Wipe(); err != nil {
		t.Fatal(err)
	}
	startAll(t, nodes[2:])
	same("after a wipe")
}

// Row 25: a node says what it knows of topics and configurations though there is no majority, let alone a leader of meta: the others are stopped.
func TestMetadataWithoutAMajority(t *testing.T) {
	nodes := startQuorum(t, 3)
	fill(t, nodes)
	want, err := dump(t.Context(), t, nodes[2], "")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes[:2] {
		if err := syscall.Kill(n.PID, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), waitMost)
	defer cancel()
	got, err := dump(ctx, t, nodes[2], "")
	if err != nil || got != want {
		t.Errorf("%v\n%s\nwant\n%s", err, got, want)
	}
	for _, n := range nodes[:2] {
		if err := syscall.Kill(n.PID, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
}

// readiness is what /readyz says.
func readiness(n *Node) (code int, body string) {
	resp, err := http.Get("http://" + n.HTTP + "/readyz?verbose")
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body) // what came of it is shown
	return resp.StatusCode, string(b)
}

// Row 52: a node is ready while it knows leaders, and says what is missing while its majority is stopped.
func TestReadiness(t *testing.T) {
	nodes := startQuorum(t, 3)
	n := nodes[0]
	is := func(what string, code int, part string) {
		t.Helper()
		until(t, what, func() bool {
			got, body := readiness(n)
			return got == code && strings.Contains(body, part)
		})
	}
	is("it to be ready", 200, "[+]")
	for _, o := range nodes[1:] {
		if err := syscall.Kill(o.PID, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	is("it to miss its majority", 503, "[-]")
	for _, o := range nodes[1:] {
		if err := syscall.Kill(o.PID, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	is("it to be ready again", 200, "[+]")
}

// Row 16: idle partitions cost nothing that runs: with 10,000 of them as many goroutines and no more messages between voters than with ten.
func TestIdlePartitionsAreFree(t *testing.T) {
	nodes := startQuorum(t, 3)
	n := nodes[0]
	createReplicated(t, n, "few", 10, 3)
	all := func(name string) (sum float64) { // whoever leads
		for _, n := range nodes {
			sum += metric(t, n, name)
		}
		return sum
	}
	rest := func() (messages, goroutines float64) {
		before := -1.0
		until(t, "the logs to be idle", func() bool { // what a change of topics leaves to do is done
			was := before
			before = all("estran_raft_applied_index")
			return was == before
		})
		from, began := all("estran_raft_rpc_total"), time.Now()
		<-time.After(5 * time.Second) // what is measured is a period
		return (all("estran_raft_rpc_total") - from) / time.Since(began).Seconds(), all("go_goroutines ")
	}
	messages, goroutines := rest()
	for i := range 10 {
		createReplicated(t, n, fmt.Sprint("many-", i), 1000, 3)
	}
	many, routines := rest()
	t.Logf("messages a second %.0f and %.0f, goroutines %.0f and %.0f", messages, many, goroutines, routines)
	if many > messages+500 || routines > goroutines+500 { // of each partition one every twenty seconds; a busy machine sends fewer heartbeats, once more and once less
		t.Errorf("with ten partitions %.0f messages a second and %.0f goroutines, with 10,000 more %.0f and %.0f", messages, goroutines, many, routines)
	}
}

// Incident 28: a start reads the indexes of the log, not its records: with 450 MB that are not sealed the process stays far below that, and all records are there.
func TestStartReadsNoHistory(t *testing.T) {
	n := startNode(t, t.TempDir(), []string{"ESTRAN_TIERING_SEAL_BYTES=256MiB", "ESTRAN_QUORUM_SHARDS=2", "ESTRAN_TIERING_SEAL_AGE=1h", "ESTRAN_HOT_MAX_BYTES=4GiB"})
	createTopic(t, n, "t", 4)
	const records, size = 4500, 100_000 // the last file of each group is read: up to twice 64 MiB; more than 256 MiB in one of them would be sealed
	cl := client(t, n, kgo.DefaultProduceTopic("t"), kgo.MaxBufferedRecords(100), kgo.ProducerBatchMaxBytes(900_000), kgo.ProducerBatchCompression(kgo.NoCompression()))
	value := make([]byte, size)
	var failed atomic.Pointer[error]
	for i := range records {
		value = slices.Clone(value)
		copy(value, strconv.Itoa(i))
		cl.Produce(t.Context(), &kgo.Record{Value: value}, func(_ *kgo.Record, err error) {
			if err != nil {
				failed.Store(&err)
			}
		})
	}
	if err := cl.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := failed.Load(); err != nil {
		t.Fatal(*err)
	}
	if hot := metric(t, n, "estran_unuploaded_bytes"); hot < records*size {
		t.Fatalf("only %.0f bytes are not sealed", hot)
	}
	if err := n.Kill(); err != nil {
		t.Fatal(err)
	}
	restart(t, n)
	total := ends(t, n, "t")
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.PID))
	if err != nil {
		t.Skip(err) // only Linux tells
	}
	var peak int64
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			if _, err := fmt.Sscan(rest, &peak); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("%d records, at most %d MiB in memory", total, peak>>10)
	if total != records || peak == 0 || peak<<10 > records*size/2 {
		t.Errorf("%d records of %d; up to %d KiB were in memory after the start", total, records, peak)
	}
}
