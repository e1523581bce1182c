package raftmeta

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/tiering/record"
)

// stallFS is a disk that stops answering, below one directory.
type stallFS struct {
	raftlog.OS
	mu   sync.Mutex
	dir  string        // "" = it answers
	free chan struct{} // closed when it answers again
}

// stall makes every sync below dir wait until the function that it returns is called.
func (s *stallFS) stall(dir string) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	free := make(chan struct{})
	s.dir, s.free = dir, free
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.dir = ""
		close(free)
	})
}

func (s *stallFS) wait(name string) {
	s.mu.Lock()
	dir, free := s.dir, s.free
	s.mu.Unlock()
	if dir != "" && filepath.Dir(name) == dir {
		<-free
	}
}

func (s *stallFS) Create(name string) (raftlog.File, error) { return s.wrap(s.OS.Create(name))(name) }
func (s *stallFS) Open(name string) (raftlog.File, error)   { return s.wrap(s.OS.Open(name))(name) }

func (s *stallFS) wrap(f raftlog.File, err error) func(string) (raftlog.File, error) {
	return func(name string) (raftlog.File, error) {
		if err != nil {
			return nil, err
		}
		return &stallFile{f, s, name}, nil
	}
}

type stallFile struct {
	raftlog.File
	fs   *stallFS
	name string
}

func (f *stallFile) Sync() error {
	f.fs.wait(f.name)
	return f.File.Sync()
}

// terms are the terms of all groups at a node, by the metrics that it shows.
func terms(t *testing.T, r *prometheus.Registry) map[string]float64 {
	t.Helper()
	all, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range all {
		if f.GetName() == "estran_raft_term" {
			for _, m := range f.Metric {
				out[m.Label[0].GetValue()] = m.Gauge.GetValue()
			}
		}
	}
	return out
}

// attempts: a machine that is too busy to send a heartbeat in time elects by itself. What is claimed is that a stall elects nobody: of so many one is enough to show it, and
// were it not so, all would show the contrary.
const attempts = 10

// The disk below one shard of one node stops answering. Of a follower: nothing is held up, nothing is elected. Of the shard's leader: another takes over, though the
// leader's process and its network are well; the other groups of that node go on in their terms. When it answers again that node has what the others have.
func TestStalledShard(t *testing.T) {
	for _, who := range []string{"follower", "leader"} {
		t.Run(who, func(t *testing.T) {
			c := newTrio(t, 3)
			disks, metrics := make([]*stallFS, 3), make([]*prometheus.Registry, 3)
			c.change = func(i int, cfg *Config) {
				disks[i], metrics[i] = &stallFS{}, prometheus.NewRegistry()
				cfg.FS, cfg.Registerer = disks[i], metrics[i]
			}
			c.start(0, 1, 2)
			topic := newTopic(t, c.hosts[0], "t", 2)
			shard := topic.Partitions[0].Shard
			if shard == topic.Partitions[1].Shard {
				t.Fatal("both partitions are in one shard")
			}
			hit, calm := record.TopicPartition{Topic: topic.ID}, record.TopicPartition{Topic: topic.ID, Partition: 1}
			var inHit, inCalm []string
			write := func(tp record.TopicPartition, to *[]string, n int) {
				for range n {
					v := fmt.Sprint(len(*to))
					if base := c.append(tp, batchOf(t, 7, record.Sequence(len(*to)), v)); int(base) != len(*to) {
						t.Fatalf("record %s of partition %d at offset %d", v, tp.Partition, base)
					}
					*to = append(*to, v)
				}
			}
			for _, id := range []record.ShardID{1, 2} { // a new cluster moves its shards to who should lead them
				until(t, "every shard to be led by who should lead it", func() bool {
					n, ok := c.hosts[0].Leader(id)
					return ok && n == c.hosts[0].shardByID(id).preferred()
				})
			}
			write(hit, &inHit, 5)
			write(calm, &inCalm, 5)
			calmly := false
			for i := 0; i < attempts && !calmly; i++ {
				calmly = stallOnce(t, c, disks, metrics, who, hit, shard, func(tp record.TopicPartition, n int) {
					if tp == hit {
						write(tp, &inHit, n)
					} else {
						write(tp, &inCalm, n)
					}
				}, calm)
			}
			if !calmly {
				t.Errorf("groups that were not hit held elections in each of %d attempts", attempts)
			}
			write(hit, &inHit, 5)
			c.agree(hit, inHit)
			c.agree(calm, inCalm)
		})
	}
}

// stallOnce stalls a disk and lets it go, and reports whether the groups that it should not concern stayed in their terms.
func stallOnce(t *testing.T, c *trio, disks []*stallFS, metrics []*prometheus.Registry, who string, hit record.TopicPartition, shard record.ShardID,
	write func(record.TopicPartition, int), calm record.TopicPartition) (calmly bool) {
	t.Helper()
	node := c.leads(shard)
	if who == "follower" {
		node = (node + 1) % 3
	}
	before := make([]map[string]float64, 3)
	for i := range before {
		before[i] = terms(t, metrics[i])
	}
	release := disks[node].stall(filepath.Join(c.dirs[node], fmt.Sprintf("shard-%d", shard)))
	defer release()
	g := c.hosts[node].shardByID(shard)
	if who == "leader" {
		stuck := make(chan []AppendResult, 1)
		c.hosts[node].Append(t.Context(), AppendRequest{Batches: []AppendBatch{{hit, batchOf(t, -1, -1, "stuck")}}}, func(r []AppendResult) { stuck <- r })
		until(t, "a write to be stuck", func() bool { return g.log.Stalled() > 0 })
		write(calm, 20)
		if r := <-stuck; !errors.Is(r[0].Err, ErrUnknownOutcome) { // while the disk is still stuck
			t.Errorf("what is stuck in a leader's disk is answered %v", r[0].Err)
		}
		refused := make(chan []AppendResult, 1)
		c.hosts[node].Append(t.Context(), AppendRequest{Batches: []AppendBatch{{hit, batchOf(t, -1, -1, "late")}}}, func(r []AppendResult) { refused <- r })
		if r := <-refused; !errors.Is(r[0].Err, ErrNotLeader) {
			t.Errorf("what comes to a leader whose disk is stuck is answered %v", r[0].Err)
		}
		if n, ok := c.hosts[node].Leader(shard); ok && int(n) == node+1 {
			t.Error("a leader whose disk is stuck says that it leads")
		}
		until(t, "another leader", func() bool {
			for i, h := range c.hosts {
				if n, ok := h.Leader(shard); i != node && ok && int(n) != node+1 {
					return true
				}
			}
			return false
		})
	} else {
		write(hit, 5)
		until(t, "a write to be stuck", func() bool { return g.log.Stalled() > time.Second }) // longer than any timer of an election
	}
	self := c.hosts[node]
	c.hosts[node] = nil // whoever is asked must not be the one that cannot answer
	write(hit, 20)
	c.hosts[node] = self
	write(calm, 20)
	calmly = true
	for i := range before {
		for group, was := range before[i] {
			if now := terms(t, metrics[i])[group]; now != was && (who == "follower" || group != fmt.Sprint(shard)) {
				t.Logf("node %d: group %s went from term %.0f to %.0f", i+1, group, was, now)
				calmly = false
			}
		}
	}
	release()
	return calmly
}
