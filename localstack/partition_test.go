package localstack

import (
	"context"
	"fmt"
	"hash/maphash"
	"maps"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/estran/estran/tiering/record"
)

// probe speaks to one node and to no other, whatever that says of who leads.
type probe struct {
	t       *testing.T
	b       *kgo.Broker
	topic   string
	id      [16]byte
	written atomic.Int64 // requests that the kernel has
}

// OnBrokerWrite implements kgo.HookBrokerWrite.
func (p *probe) OnBrokerWrite(_ kgo.BrokerMetadata, _ int16, _ int, _, _ time.Duration, err error) {
	if err == nil {
		p.written.Add(1)
	}
}

func probeOf(t *testing.T, n *Node, topic string) *probe {
	t.Helper()
	p := &probe{t: t, topic: topic}
	cl := client(t, n, kgo.WithHooks(p))
	p.b = cl.SeedBrokers()[0]
	until(t, "the topic to be known", func() bool {
		m, err := kadm.NewClient(cl).Metadata(t.Context(), topic)
		if err != nil || !m.Topics.Has(topic) || m.Topics[topic].Err != nil {
			return false
		}
		p.id = m.Topics[topic].ID
		return true
	})
	return p
}

// ask sends one request to the node, once. A request that is not answered in time is not answered: nil.
func ask[R any](p *probe, limit time.Duration, req kmsg.Request) (answer R, ok bool) {
	ctx, cancel := context.WithTimeout(p.t.Context(), limit)
	defer cancel()
	resp, err := p.b.Request(ctx, req)
	if err != nil {
		return answer, false
	}
	return resp.(R), true
}

const noAnswer = -100

// produce sends one record to partition 0 and returns its offset, or the error code.
func (p *probe) produce(acks int16, value string, limit time.Duration) (offset int64, code int16) {
	w := record.NewBuilder(record.CodecNone)
	w.Add(record.Timestamp(time.Now().UnixMilli()), nil, []byte(value))
	b, err := w.Batch()
	if err != nil {
		p.t.Fatal(err)
	}
	req := kmsg.NewPtrProduceRequest()
	req.Acks, req.TimeoutMillis = acks, int32(limit.Milliseconds())
	rt, rp := kmsg.NewProduceRequestTopic(), kmsg.NewProduceRequestTopicPartition()
	rt.Topic, rt.TopicID, rp.Records = p.topic, p.id, b
	rt.Partitions = append(rt.Partitions, rp)
	req.Topics = append(req.Topics, rt)
	resp, ok := ask[*kmsg.ProduceResponse](p, limit+time.Second, req)
	if !ok {
		return -1, noAnswer
	}
	a := resp.Topics[0].Partitions[0]
	return a.BaseOffset, a.ErrorCode
}

// latest asks for the end of partition 0.
func (p *probe) latest() (offset int64, code int16) {
	req := kmsg.NewPtrListOffsetsRequest()
	rt, rp := kmsg.NewListOffsetsRequestTopic(), kmsg.NewListOffsetsRequestTopicPartition()
	req.ReplicaID, rt.Topic, rp.Timestamp, rp.CurrentLeaderEpoch = -1, p.topic, -1, -1
	rt.Partitions = append(rt.Partitions, rp)
	req.Topics = append(req.Topics, rt)
	resp, ok := ask[*kmsg.ListOffsetsResponse](p, 5*time.Second, req)
	if !ok {
		return -1, noAnswer
	}
	a := resp.Topics[0].Partitions[0]
	return a.Offset, a.ErrorCode
}

// fetch reads partition 0 from an offset on, as far as one answer goes.
func (p *probe) fetch(partition int32, from int64) (values []string, high int64, code int16) {
	req := kmsg.NewPtrFetchRequest()
	rt, rp := kmsg.NewFetchRequestTopic(), kmsg.NewFetchRequestTopicPartition()
	req.ReplicaID, req.MinBytes, req.MaxBytes, req.SessionEpoch = -1, 0, 8<<20, -1
	rt.Topic, rt.TopicID, rp.Partition, rp.FetchOffset, rp.PartitionMaxBytes, rp.CurrentLeaderEpoch = p.topic, p.id, partition, from, 8<<20, -1
	rt.Partitions = append(rt.Partitions, rp)
	req.Topics = append(req.Topics, rt)
	resp, ok := ask[*kmsg.FetchResponse](p, 10*time.Second, req)
	if !ok || resp.ErrorCode != 0 || len(resp.Topics) == 0 {
		return nil, -1, noAnswer
	}
	a := resp.Topics[0].Partitions[0]
	for rest := a.RecordBatches; len(rest) >= record.HeaderBytes; {
		b, more, err := record.Next(rest)
		if err != nil {
			break // the last one is cut
		}
		if err := b.CheckCRC(); err != nil {
			p.t.Errorf("partition %d: %v", partition, err)
		}
		if err := record.Each(b, 0, func(o record.Offset, r *record.Record) bool {
			if int64(o) >= from {
				if int64(o) != from+int64(len(values)) {
					p.t.Errorf("partition %d: offset %d where %d is due", partition, o, from+int64(len(values)))
				}
				values = append(values, string(r.Value))
			}
			return true
		}); err != nil {
			p.t.Error(err)
		}
		rest = more
	}
	return values, a.HighWatermark, a.ErrorCode
}

// leader is the number of the node that leads a partition, as this node says; 0 if it knows none.
func (p *probe) leader(partition int32) int {
	req := kmsg.NewPtrMetadataRequest()
	rt := kmsg.NewMetadataRequestTopic()
	rt.Topic = &p.topic
	req.Topics = append(req.Topics, rt)
	resp, ok := ask[*kmsg.MetadataResponse](p, 5*time.Second, req)
	if !ok || len(resp.Topics) != 1 {
		return 0
	}
	for _, a := range resp.Topics[0].Partitions {
		if a.Partition == partition && a.ErrorCode == 0 {
			return max(0, int(a.Leader))
		}
	}
	return 0
}

// verifyFromEach reads every partition from every node while that leads it, and compares each with what was acknowledged. Leadership is moved by pausing whoever leads:
// the others stand alike, so in the end everyone has led everything.
func (l *ledger) verifyFromEach(t *testing.T, nodes []*Node, topic string, partitions int32) {
	t.Helper()
	for i, n := range nodes {
		p := probeOf(t, n, topic)
		left := map[int32]bool{}
		for k := range partitions {
			left[k] = true
		}
		until(t, fmt.Sprintf("node %d to have led everything", i+1), func() bool {
			for k := range left {
				if p.leader(k) == i+1 && l.verifyPartition(t, p, k) {
					delete(left, k)
				}
			}
			for k := range left {
				if lead := p.leader(k); lead != 0 && lead != i+1 {
					deposed(t, nodes, lead, func() bool { now := p.leader(k); return now != 0 && now != lead })
				}
				break
			}
			return len(left) == 0
		})
	}
}

// deposed pauses a node until cond holds.
func deposed(t *testing.T, nodes []*Node, lead int, cond func() bool) {
	t.Helper()
	pid := nodes[lead-1].PID
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Error(err)
		}
	}()
	until(t, "another leader", cond)
}

// verifyPartition reads a partition from one node; ok is false if that does not lead it any more.
func (l *ledger) verifyPartition(t *testing.T, p *probe, partition int32) (ok bool) {
	t.Helper()
	l.mu.Lock()
	want := maps.Clone(l.acked[partition])
	l.mu.Unlock()
	next, high := int64(0), int64(1)
	for next < high {
		var values []string
		var code int16
		if values, high, code = p.fetch(partition, next); code != 0 {
			return false
		}
		for _, v := range values {
			in, number, whole := intact(v)
			if !whole || in != partition || int64(number) != next { // one producer, one record per offset
				t.Fatalf("partition %d offset %d: record %d of partition %d, whole: %v", partition, next, number, in, whole)
			}
			if h, acked := want[next]; acked && h != maphash.Bytes(hashSeed, []byte(v)) {
				t.Fatalf("partition %d offset %d: another record than was acknowledged", partition, next)
			}
			delete(want, next)
			next++
		}
	}
	if len(want) > 0 {
		t.Fatalf("partition %d: %d acknowledged records are not there, the log ends at %d", partition, len(want), next)
	}
	return true
}

// The leader of a partition is cut off under load, wholly or one way, with the bytes held or lost: it acknowledges nothing at any acks, and once the others have a leader
// it calls nothing current that is not. The others go on. With everything cut nobody acknowledges anything. When it heals there is one history, the same everywhere.
func TestPartitions(t *testing.T) {
	net := NewNetwork()
	t.Cleanup(func() { _ = net.Close() })
	nodes := startQuorumOver(t, net, 3)
	createReplicated(t, nodes[0], "t", 6, 3)
	createReplicated(t, nodes[0], "raw", 1, 3)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { l.produce(t, nodes[0], "t", 6, ctx, 1<<30) })
	var probes []*probe
	for _, n := range nodes {
		probes = append(probes, probeOf(t, n, "raw"))
	}
	acked := map[int64]string{} // of raw
	tries := 0
	another := func(s string) string { tries++; return fmt.Sprint(s, " ", tries) } // what nobody answered may be there all the same
	for i, c := range []struct {
		name     string
		out, in  bool
		everyone bool
		fault    Fault
	}{
		{"both ways, held", true, true, false, Held},
		{"both ways, swallowed", true, true, false, Swallowed},
		{"what it sends, swallowed", true, false, false, Swallowed},
		{"what it is sent, swallowed", false, true, false, Swallowed},
		{"what it sends, held", true, false, false, Held},
		{"everything, held", true, true, true, Held},
		{"everything, swallowed", true, true, true, Swallowed},
	} {
		t.Run(c.name, func(t *testing.T) {
			old := 0
			until(t, "a leader that acknowledges", func() bool {
				if old = probes[i%3].leader(0); old == 0 {
					return false
				}
				v := another("before")
				o, code := probes[old-1].produce(-1, v, 10*time.Second)
				if code == 0 {
					acked[o] = v
				}
				return code == 0
			})
			for from := 1; from <= 3; from++ {
				for to := 1; to <= 3; to++ {
					if from != to && (c.everyone || c.out && from == old || c.in && to == old) {
						net.Set(from, to, c.fault)
					}
				}
			}
			cut := probes[old-1]
			var asked sync.WaitGroup
			for _, acks := range []int16{1, -1} {
				asked.Go(func() { // one that is sent while it still takes itself for the leader
					if o, code := cut.produce(acks, fmt.Sprint("lost ", i, acks), 20*time.Second); code == 0 {
						t.Errorf("acks=%d was acknowledged at offset %d by a leader that is cut off", acks, o)
					}
				})
			}
			if c.everyone {
				asked.Wait()
				for j, p := range probes {
					for _, acks := range []int16{1, -1} {
						if _, code := p.produce(acks, "nobody", 2*time.Second); code == 0 {
							t.Errorf("node %d acknowledged acks=%d with no majority anywhere", j+1, acks)
						}
					}
					if o, code := p.latest(); code == 0 {
						t.Errorf("node %d says that the log ends at %d: nobody can know", j+1, o)
					}
				}
			} else {
				other := probes[old%3]
				until(t, "an acknowledgement by another leader", func() bool {
					lead := other.leader(0)
					if lead == 0 || lead == old {
						return false
					}
					v := another("after")
					o, code := probes[lead-1].produce(-1, v, 2*time.Second)
					if code == 0 {
						acked[o] = v
					}
					return code == 0
				})
				var end int64
				for o := range acked {
					end = max(end, o+1)
				}
				if o, code := cut.latest(); code == 0 && o < end { // one way it may have heard of the new leader, but it does not lead
					t.Errorf("the old leader says that the log ends at %d, %d is acknowledged", o, end-1)
				}
				values, high, code := cut.fetch(0, end-1)
				if code == 0 && (len(values) > 0 || high >= end) {
					t.Errorf("the old leader serves %q, high watermark %d", values, high)
				}
				if _, code := cut.produce(1, "late", 2*time.Second); code == 0 {
					t.Error("the old leader acknowledged a record after its successor")
				}
				asked.Wait()
				before := l.count()
				until(t, "acknowledgements while a node is cut off", func() bool { return l.count() > before+300 })
			}
			net.Heal()
			before := l.count()
			until(t, "acknowledgements after it has healed", func() bool { return l.count() > before+300 })
		})
	}
	cancel()
	wg.Wait()
	began := time.Now()
	l.verifyFromEach(t, nodes, "t", 6)
	t.Logf("read from each in %s", time.Since(began))
	var all []string
	until(t, "what was acknowledged to be read", func() bool {
		lead := probes[0].leader(0)
		if lead == 0 {
			return false
		}
		values, high, code := probes[lead-1].fetch(0, int64(len(all)))
		all = append(all, values...)
		return code == 0 && int64(len(all)) == high
	})
	seen := map[string]int64{}
	for o, v := range all {
		if at, ok := seen[v]; ok && v != "nobody" && v != "late" {
			t.Errorf("%q is there at %d and at %d", v, at, o)
		}
		seen[v] = int64(o)
	}
	for o, v := range acked {
		if o >= int64(len(all)) || all[o] != v {
			t.Errorf("offset %d was acknowledged as %q: %q", o, v, all)
		}
	}
	t.Logf("%d records acknowledged", l.count())
	sameLogs(t, nodes)
}

// A leader is paused, the others go on without it, and it wakes up with requests that came meanwhile: for a moment it takes itself for the leader. It acknowledges nothing and
// it does not tell a client that the log ends before what its successor has acknowledged.
func TestWakingLeader(t *testing.T) {
	nodes := startQuorum(t, 3)
	createReplicated(t, nodes[0], "raw", 1, 3)
	var probes []*probe
	for _, n := range nodes {
		probes = append(probes, probeOf(t, n, "raw"))
	}
	acked, end := map[int64]string{}, int64(0)
	write := func(by int, v string) bool {
		o, code := probes[by-1].produce(-1, v, 2*time.Second)
		if code == 0 {
			if was, ok := acked[o]; ok {
				t.Fatalf("offset %d is acknowledged for %q and for %q", o, was, v)
			}
			acked[o], end = v, max(end, o+1)
		}
		return code == 0
	}
	for i := range kills() {
		old, now := 0, 0
		until(t, "a leader that acknowledges", func() bool {
			old = probes[i%3].leader(0)
			return old != 0 && write(old, fmt.Sprint("before ", i))
		})
		p := probes[old-1]
		_, _ = p.latest() // the connections are there
		_, _, _ = p.fetch(0, end)
		pid := nodes[old-1].PID
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
		until(t, "an acknowledgement by another leader", func() bool {
			now = probes[old%3].leader(0)
			return now != 0 && now != old && write(now, fmt.Sprint("after ", i))
		})
		var wg sync.WaitGroup
		before := p.written.Load()
		for range 4 {
			wg.Go(func() {
				if o, code := p.latest(); code == 0 && o < end {
					t.Errorf("round %d: it wakes up and says that the log ends at %d, %d is acknowledged", i, o, end-1)
				}
			})
			wg.Go(func() {
				if values, high, code := p.fetch(0, end); code == 0 && high < end {
					t.Errorf("round %d: it wakes up and serves %q at %d with a high watermark of %d", i, values, end, high)
				}
			})
		}
		for _, acks := range []int16{1, -1} {
			wg.Go(func() {
				if o, code := p.produce(acks, "lost", 2*time.Second); code == 0 {
					if was, ok := acked[o]; ok {
						t.Errorf("round %d: it wakes up and acknowledges acks=%d at %d, where %q is", i, acks, o, was)
					}
				}
			})
		}
		until(t, "the requests to be with it", func() bool { return p.written.Load() >= before+10 })
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
	}
	all := []string{}
	until(t, "everything to be read", func() bool {
		lead := probes[0].leader(0)
		if lead == 0 {
			return false
		}
		values, high, code := probes[lead-1].fetch(0, int64(len(all)))
		all = append(all, values...)
		return code == 0 && int64(len(all)) == high
	})
	for o, v := range acked {
		if o >= int64(len(all)) || all[o] != v {
			t.Errorf("offset %d was acknowledged as %q: %q", o, v, all)
		}
	}
	sameLogs(t, nodes)
}

// A node of the quorum is a black hole to the others: connections stay and nothing comes back. What others lead goes on in its term; only calls to that node fail.
func TestBlackHole(t *testing.T) {
	net := NewNetwork()
	t.Cleanup(func() { _ = net.Close() })
	nodes := startQuorumOver(t, net, 3)
	createReplicated(t, nodes[0], "t", 6, 3)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { l.produce(t, nodes[0], "t", 6, ctx, 1<<30) })
	groups := groupLabels(t, nodes[0])
	// others are the terms of the groups that node 3 does not lead.
	others := func() map[string]float64 {
		terms := map[string]float64{}
		for g := range groups {
			if metric(t, nodes[2], "estran_raft_state", fmt.Sprintf("{group=%q", g), `state="Leader"`) == 0 {
				terms[g] = groupMetric(t, nodes[0], "estran_raft_term", g)
			}
		}
		return terms
	}
	stayed := func(terms map[string]float64) bool {
		calm := len(terms) > 0
		for g, was := range terms {
			if now := groupMetric(t, nodes[0], "estran_raft_term", g); now != was {
				t.Logf("group %s went from term %.0f to %.0f", g, was, now)
				calm = false
			}
		}
		return calm
	}
	// attempt cuts node 3 off and reports whether the groups that it did not lead stayed in their terms. A busy machine elects by itself: one calm attempt shows the claim.
	attempt := func() (calm bool) {
		before := l.count()
		until(t, "acknowledgements with all up", func() bool { return l.count() > before+300 })
		terms := others()
		if len(terms) == 0 {
			return false
		}
		failed := func(from int, peer string) float64 {
			return metric(t, nodes[from], "estran_raft_rpc_errors_total", fmt.Sprintf("peer=%q", peer))
		}
		toHole, toOther := failed(0, "3"), failed(0, "2")
		for _, other := range []int{1, 2} {
			net.Set(3, other, Swallowed)
			net.Set(other, 3, Swallowed)
		}
		defer net.Heal()
		until(t, "calls to the black hole to fail", func() bool { return failed(0, "3") > toHole+3 })
		before = l.count()
		until(t, "acknowledgements beside a black hole", func() bool { return l.count() > before+300 })
		return stayed(terms) && failed(0, "2") == toOther
	}
	calm, against := false, 0
	for i := 0; i < 10 && !calm && against < 4; i++ {
		began := time.Now()
		if calm = attempt(); calm {
			break
		}
		took := time.Since(began)
		before := l.count()
		until(t, "acknowledgements with all up", func() bool { return l.count() > before+300 })
		terms := others()
		<-time.After(took) // what is looked at is a period: does nobody elect without a black hole?
		if stayed(terms) {
			against++
		}
	}
	switch {
	case calm:
	case against >= 4:
		t.Error("each time a node was a black hole, groups that it did not lead elected, or calls between the others failed")
	default:
		t.Log("this machine is so busy that voters elect all the time: whether a black hole makes them do so cannot be told")
	}
	before := l.count()
	until(t, "acknowledgements with all up", func() bool { return l.count() > before+300 })
	cancel()
	wg.Wait()
	l.verify(t, nodes[1], "t")
	sameLogs(t, nodes)
}
