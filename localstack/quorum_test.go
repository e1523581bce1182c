package localstack

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// startQuorum starts voters that share a directory as their store.
func startQuorum(t *testing.T, size int, env ...string) []*Node {
	t.Helper()
	return startQuorumOver(t, nil, size, env...)
}

// startQuorumOver starts voters that reach one another through a network; nil = directly.
func startQuorumOver(t *testing.T, net *Network, size int, env ...string) []*Node {
	t.Helper()
	nodes := newQuorum(t, net, size, env...)
	startAll(t, nodes)
	return nodes
}

// newQuorum describes voters; none is started.
func newQuorum(t *testing.T, net *Network, size int, env ...string) []*Node {
	t.Helper()
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	store := t.TempDir()
	peers := make([]string, size)
	nodes := make([]*Node, size)
	for i := range peers {
		port, err := freePort()
		if err != nil {
			t.Fatal(err)
		}
		peers[i] = fmt.Sprintf("127.0.0.1:%d", port)
	}
	for i := range nodes {
		var voters []string // as this one reaches them
		for j, addr := range peers {
			if net != nil && i != j {
				if addr, err = net.Proxy(i+1, j+1, addr); err != nil {
					t.Fatal(err)
				}
			}
			voters = append(voters, fmt.Sprintf("%d@%s", j+1, addr))
		}
		nodes[i] = NewNode(p, t.TempDir(), append([]string{"ESTRAN_STORAGE_URL=file://" + store, "ESTRAN_QUORUM_VOTERS=" + strings.Join(voters, ","), fmt.Sprint("ESTRAN_NODE_ID=", i+1),
			"ESTRAN_TIERING_SEAL_BYTES=1MiB", "ESTRAN_TIERING_SEAL_AGE=500ms", "ESTRAN_TIERING_PREPARE_TTL=5s"}, env...))
		nodes[i].Peer = peers[i]
	}
	return nodes
}

// startAll starts voters at once and returns when all serve.
func startAll(t *testing.T, nodes []*Node) {
	t.Helper()
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() { restart(t, n) })
		t.Cleanup(func() {
			_ = n.Kill()
			if t.Failed() {
				t.Log(n.Tail())
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// Three voters are killed one after the other under load, at random moments, and come back: what was acknowledged is there once, in order, at its offset, from whoever
// leads then. Nothing is acknowledged twice and nothing is lost; only retriable errors reach the producer (it gives up no record).
func TestQuorumKills(t *testing.T) {
	nodes := startQuorum(t, 3)
	createReplicated(t, nodes[1], "t", 6, 3)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { l.produce(t, nodes[0], "t", 6, ctx, 1<<30) })
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := range kills() {
		before := l.count()
		until(t, "an acknowledgement with all up", func() bool { return l.count() > before })
		time.Sleep(time.Duration(rng.IntN(1000)) * time.Millisecond) // the moment of the crash
		n := nodes[i%len(nodes)]
		if err := n.Kill(); err != nil {
			t.Fatal(err)
		}
		before = l.count()
		until(t, "acknowledgements while a voter is down", func() bool { return l.count() > before+100 })
		restart(t, n)
	}
	cancel()
	wg.Wait()
	l.verify(t, nodes[2], "t")
	t.Logf("%d records, %d MB acknowledged through %d kills", l.count(), l.bytes/1e6, kills())
	for _, n := range nodes { // all at once
		if err := n.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		wg.Go(func() { restart(t, n) })
	}
	wg.Wait()
	l.verify(t, nodes[0], "t")
	sameLogs(t, nodes)
}

// Every node shows the same cluster; a topic that is made at one can be written to and is listed at each; a group's coordinator is the same from every node.
func TestQuorumIsOneCluster(t *testing.T) {
	nodes := startQuorum(t, 3)
	ids := map[string]bool{}
	for i, n := range nodes {
		name := fmt.Sprint("made-at-", i+1)
		createReplicated(t, n, name, 3, 3)
		if err := client(t, n, kgo.DefaultProduceTopic(name)).ProduceSync(t.Context(), &kgo.Record{Value: []byte("v")}).FirstErr(); err != nil {
			t.Errorf("producing to %s: %v", name, err)
		}
	}
	for _, n := range nodes {
		adm := kadm.NewClient(client(t, n))
		until(t, "every topic to be listed", func() bool {
			topics, err := adm.ListTopics(t.Context())
			return err == nil && topics.Has("made-at-1") && topics.Has("made-at-2") && topics.Has("made-at-3")
		})
		until(t, "every broker and every leader to be known", func() bool {
			m, err := adm.Metadata(t.Context())
			if err != nil || len(m.Brokers) != 3 {
				return false
			}
			ids[m.Cluster] = true
			for _, p := range m.Topics["made-at-1"].Partitions {
				if len(p.Replicas) != 3 {
					t.Errorf("%+v", p)
				}
				if p.Leader < 1 {
					return false
				}
			}
			return true
		})
	}
	if len(ids) != 1 {
		t.Errorf("clusters %v", ids)
	}
	until(t, "one coordinator that every node names", func() bool { // an election may come in between
		coordinators := map[int32]bool{}
		for _, n := range nodes {
			c := kadm.NewClient(client(t, n)).FindGroupCoordinators(t.Context(), "g")["g"]
			if c.Err != nil {
				return false
			}
			coordinators[c.NodeID] = true
		}
		return len(coordinators) == 1
	})
	sameLogs(t, nodes)
}

// A rolling restart by SIGTERM hands leadership over: records go on being acknowledged, no error reaches the producer.
func TestRollingRestart(t *testing.T) {
	nodes := startQuorum(t, 3)
	createReplicated(t, nodes[0], "t", 6, 3)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { l.produce(t, nodes[0], "t", 6, ctx, 1<<30) })
	for _, n := range nodes {
		before := l.count()
		until(t, "acknowledgements", func() bool { return l.count() > before+1000 })
		if err := n.Stop(); err != nil {
			t.Fatalf("SIGTERM: %v\n%s", err, n.Tail())
		}
		restart(t, n)
	}
	before := l.count()
	until(t, "acknowledgements", func() bool { return l.count() > before+1000 })
	cancel()
	wg.Wait()
	l.verify(t, nodes[1], "t")
	sameLogs(t, nodes)
}

// Voters are stopped for a while at random moments (a pause of the machine, a long collection) and go on, the leader among them: a leader that was deposed in the meantime
// acknowledges nothing that the others do not have.
func TestQuorumPauses(t *testing.T) {
	nodes := startQuorum(t, 3)
	createReplicated(t, nodes[0], "t", 6, 3)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { l.produce(t, nodes[0], "t", 6, ctx, 1<<30) })
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	for range kills() {
		before := l.count()
		until(t, "acknowledgements", func() bool { return l.count() > before+500 })
		n := nodes[rng.IntN(len(nodes))]
		if err := syscall.Kill(n.PID, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(200+rng.IntN(2000)) * time.Millisecond) // how long the pause is
		if err := syscall.Kill(n.PID, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	wg.Wait()
	for _, n := range nodes {
		l.verify(t, n, "t")
	}
	t.Logf("%d records acknowledged through %d pauses", l.count(), kills())
	sameLogs(t, nodes)
}

// A voter is killed and its directory removed under load; it comes back blank, is filled by the others, and then either of them may be killed.
func TestQuorumWipe(t *testing.T) {
	nodes := startQuorum(t, 3)
	createReplicated(t, nodes[0], "t", 6, 3)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { l.produce(t, nodes[0], "t", 6, ctx, 1<<30) })
	more := func(what string) {
		before := l.count()
		until(t, what, func() bool { return l.count() > before+500 })
	}
	more("acknowledgements")
	wiped := nodes[2]
	if err := errors.Join(wiped.Kill(), os.RemoveAll(wiped.dir)); err != nil {
		t.Fatal(err)
	}
	more("acknowledgements while a voter is gone")
	restart(t, wiped)
	votesEverywhere(t, nodes)
	for _, n := range nodes[:2] {
		if err := n.Kill(); err != nil {
			t.Fatal(err)
		}
		more("acknowledgements that need the new voter")
		restart(t, n)
	}
	cancel()
	wg.Wait()
	for _, n := range nodes {
		l.verify(t, n, "t")
	}
	sameLogs(t, nodes)
}

// Topics are made, changed and deleted at one node after another, each request as soon as the one before is answered: none is told of a state that was over by then.
func TestAdminAtAnyNode(t *testing.T) {
	nodes := startQuorum(t, 3)
	var at []*kgo.Broker
	for _, n := range nodes {
		at = append(at, client(t, n).SeedBrokers()[0])
	}
	for i := range 15 {
		name := "t" // the same again and again
		create := kmsg.NewPtrCreateTopicsRequest()
		topic := kmsg.NewCreateTopicsRequestTopic()
		topic.Topic, topic.NumPartitions, topic.ReplicationFactor = name, 1, 3
		create.Topics = append(create.Topics, topic)
		grow := kmsg.NewPtrCreatePartitionsRequest()
		more := kmsg.NewCreatePartitionsRequestTopic()
		more.Topic, more.Count = name, 2
		grow.Topics = append(grow.Topics, more)
		alter := kmsg.NewPtrIncrementalAlterConfigsRequest()
		resource, config := kmsg.NewIncrementalAlterConfigsRequestResource(), kmsg.NewIncrementalAlterConfigsRequestResourceConfig()
		resource.ResourceType, resource.ResourceName = kmsg.ConfigResourceTypeTopic, name
		config.Name, config.Value = "retention.ms", kmsg.StringPtr("1000")
		resource.Configs = append(resource.Configs, config)
		alter.Resources = append(alter.Resources, resource)
		remove := kmsg.NewPtrDeleteTopicsRequest()
		gone := kmsg.NewDeleteTopicsRequestTopic()
		gone.Topic = &name
		remove.Topics, remove.TopicNames = append(remove.Topics, gone), []string{name}
		for j, q := range []kmsg.Request{create, grow, alter, remove} {
			code, tries := int16(0), 0
			until(t, fmt.Sprintf("an answer to %T in round %d", q, i), func() bool {
				resp, err := at[(i+j)%3].Request(t.Context(), q)
				tries++
				if err != nil {
					return false
				}
				switch r := resp.(type) {
				case *kmsg.CreateTopicsResponse:
					code = r.Topics[0].ErrorCode
				case *kmsg.CreatePartitionsResponse:
					code = r.Topics[0].ErrorCode
				case *kmsg.IncrementalAlterConfigsResponse:
					code = r.Resources[0].ErrorCode
				case *kmsg.DeleteTopicsResponse:
					code = r.Topics[0].ErrorCode
				}
				return code == 0 || code == kerr.UnknownTopicOrPartition.Code || !kerr.TypedErrorForCode(code).Retriable
			})
			if done := []*kerr.Error{kerr.TopicAlreadyExists, kerr.InvalidPartitions, nil, kerr.UnknownTopicOrPartition}[j]; tries > 1 && done != nil && code == done.Code {
				continue // a try whose outcome was not known has done it
			}
			if err := kerr.ErrorForCode(code); err != nil {
				t.Fatalf("round %d, %T at node %d: %v", i, q, (i+j)%3+1, err)
			}
		}
	}
}
