package sim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/estran/estran/broker"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/twmb/franz-go/pkg/kgo"
)

// serve lets a node answer Kafka's clients.
func (w *world) serve(n *node, l *life) {
	cfg := *w.kafka
	cfg.Registerer = prometheus.NewRegistry()
	l.server = broker.NewServer(cfg, l.Host, l.reader)
	at := w.net.listen(fmt.Sprintf("kafka-%d:9092", n.id))
	go func() {
		if err := l.server.Serve(at); !errors.Is(err, broker.ErrServerClosed) {
			w.failf("node %d: serving: %v", n.id, err)
		}
	}()
}

const (
	session   = 10 * time.Minute
	heartbeat = time.Minute
	rebalance = 2 * time.Minute
	members   = 3
)

// member is a real client in the group.
type member struct {
	name string
	cl   *kgo.Client

	mu    sync.Mutex
	owned map[int32]bool
}

func (w *world) join(i int) *member {
	m := &member{name: fmt.Sprint("client-", i), owned: map[int32]bool{}}
	dial := w.net.dialer(m.name)
	took := func(_ context.Context, _ *kgo.Client, ps map[string][]int32) {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, p := range ps["for-ever"] {
			m.owned[p] = true
		}
	}
	gave := func(_ context.Context, _ *kgo.Client, ps map[string][]int32) {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, p := range ps["for-ever"] {
			delete(m.owned, p)
		}
	}
	var err error
	m.cl, err = kgo.NewClient(kgo.SeedBrokers("kafka-1:9092", "kafka-2:9092", "kafka-3:9092"), kgo.Dialer(func(ctx context.Context, _, host string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		return dial(ctx, host)
	}), kgo.RetryTimeout(session), kgo.RequestRetries(1000), kgo.RetryBackoffFn(func(int) time.Duration { return 5 * time.Second }),
		kgo.ConsumerGroup("members"), kgo.ConsumeTopics("for-ever"), kgo.Balancers(kgo.RoundRobinBalancer()), kgo.SessionTimeout(session), kgo.HeartbeatInterval(heartbeat), kgo.RebalanceTimeout(rebalance),
		kgo.FetchMaxWait(time.Minute), kgo.DisableAutoCommit(), kgo.OnPartitionsAssigned(took), kgo.OnPartitionsRevoked(gave), kgo.OnPartitionsLost(gave))
	if err != nil {
		w.t.Fatal(err)
	}
	w.wg.Go(func() {
		for !m.cl.PollFetches(context.Background()).IsClientClosed() {
		}
	})
	return m
}

// owners are the members by what they own, of those that are there: each partition must have one.
func owners(all []*member, away *member) (out map[int32]string, whole bool) {
	out, n := map[int32]string{}, 0
	for _, m := range all {
		if m == away {
			continue
		}
		m.mu.Lock()
		for p := range m.owned {
			out[p] = m.name
			n++
		}
		m.mu.Unlock()
	}
	return out, len(out) == members && n == members
}

// cutOff keeps clients from every node.
func (w *world) cutOff(all ...*member) {
	cut := map[[2]string]bool{}
	for _, m := range all {
		for i := range 3 {
			at := fmt.Sprintf("kafka-%d:9092", i+1)
			cut[[2]string{m.name, at}], cut[[2]string{at, m.name}] = true, true
		}
	}
	w.net.set(cut)
}

// coordinator is the node that leads the group's shard: leadership may be on its way to another one.
func (w *world) coordinator() *node {
	w.t.Helper()
	rng := w.rng("coordinators", uint64(time.Now().UnixNano()))
	for range 60 {
		for _, n := range w.nodes {
			if l := n.live.Load(); l != nil {
				if l = w.proven(l.GroupShard("members"), rng); l != nil {
					return w.nodes[l.NodeID()-1]
				}
				break
			}
		}
		time.Sleep(5 * time.Second)
	}
	w.t.Fatal("the group has no coordinator for five minutes")
	return nil
}

// A member that is silent for less than its session keeps its partitions and the group its generation; one that is silent for longer loses them to the others, not before its session
// ends and soon after; when it is back it takes part again. A new coordinator gives everybody a new session: nobody loses anything by it.
func TestGroupSessions(t *testing.T) {
	dirs, seed, rounds := []string{t.TempDir(), t.TempDir(), t.TempDir()}, number(t, "ESTRAN_SIM_SEED", 1), 2+number(t, "ESTRAN_SIM_HOURS", 0)/2
	synctest.Test(t, func(t *testing.T) {
		o := draw(uint64(seed), time.Hour, 20)
		o.Partitions = members
		cfg := broker.DefaultConfig()
		w := &world{t: t, o: o, logger: slog.New(slog.DiscardHandler), kafka: &cfg}
		defer w.stop()
		if !w.begin(dirs) {
			return
		}
		var all []*member
		for i := range members {
			all = append(all, w.join(i+1))
		}
		defer func() {
			w.net.set(nil)
			for _, m := range all {
				m.cl.Close()
			}
			w.wg.Wait()
		}()
		everybody := func(when string) (own map[int32]string, generation int32) {
			t.Helper()
			whole := false
			for range 60 {
				if own, whole = owners(all, nil); whole && len(slices.Compact(slices.Sorted(maps.Values(own)))) == members {
					_, generation = all[0].cl.GroupMetadata()
					return own, generation
				}
				time.Sleep(15 * time.Second)
			}
			t.Fatalf("%s: after a quarter of an hour the partitions belong to %v", when, own)
			return nil, 0
		}
		rng := w.rng("members", 0)
		own, generation := everybody("at first")
		for round := range rounds {
			m := all[rng.IntN(members)]
			w.cutOff(m)
			time.Sleep(session - 2*heartbeat - time.Duration(rng.IntN(300))*time.Second) // of the last heartbeat before
			w.net.set(nil)
			time.Sleep(5 * heartbeat)
			if now, g := everybody("after a short silence"); g != generation || !maps.Equal(now, own) {
				t.Errorf("round %d: after a short silence generation %d with %v, before %d with %v", round, g, now, generation, own)
			}

			w.cutOff(m)
			began := time.Now()
			for {
				time.Sleep(10 * time.Second)
				if _, whole := owners(all, m); whole {
					break
				}
				if time.Since(began) > session+rebalance+2*heartbeat {
					t.Fatalf("round %d: nobody takes the place of %s, which has been silent for %s", round, m.name, time.Since(began))
				}
			}
			if silent := time.Since(began); silent < session-heartbeat {
				t.Errorf("round %d: %s has lost its partitions after %s", round, m.name, silent)
			}
			time.Sleep(time.Duration(rng.IntN(40)) * time.Minute)
			w.net.set(nil)
			own, generation = everybody("after a long silence")

			n := w.coordinator()
			n.stop()
			time.Sleep(time.Duration(1+rng.IntN(40)) * time.Minute)
			if now, g := everybody("with another coordinator"); g != generation || !maps.Equal(now, own) {
				t.Errorf("round %d: another coordinator's generation is %d with %v, before %d with %v", round, g, now, generation, own)
			}
			n.start()
			<-n.opened
		}
		w.cutOff(all...) // the next coordinator hears of nobody: it goes by what is durable
		w.coordinator().stop()
		time.Sleep(session + rebalance)
		if g := w.coordinator().live.Load().Group("members"); g == nil || g.EmptySince == 0 {
			t.Errorf("all members are silent, and the group is not empty: %+v", g)
		}
		t.Logf("%s of cluster time", time.Since(w.began))
	})
}
