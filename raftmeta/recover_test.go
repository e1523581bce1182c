package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/estran/estran/tiering/record"
)

// Two of three are lost for good. The third becomes the cluster: what its log holds is there and at its offset, leader epochs rise, what is left of the others gets no hearing, and two new
// nodes make it three again. A recovery that is interrupted anywhere is repeated, and the node does not start before.
func TestRecover(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	topic := newTopic(t, c.hosts[0], "t", 4)
	want := map[int32][]string{}
	write := func(n int) {
		t.Helper()
		for range n {
			p := int32(len(want[0])+len(want[1])+len(want[2])+len(want[3])) % 4
			v := fmt.Sprint(p, len(want[p]), strings.Repeat("r", 2000))
			if base := c.append(record.TopicPartition{Topic: topic.ID, Partition: p}, batchOf(t, record.ProducerID(7+p), record.Sequence(len(want[p])), v)); int(base) != len(want[p]) {
				t.Fatalf("partition %d: record %d at offset %d", p, len(want[p]), base)
			}
			want[p] = append(want[p], v)
		}
	}
	write(40)
	for _, g := range c.hosts[2].groups() { // a snapshot and a log behind it
		snapshotNow(t, g)
	}
	write(40)
	for p := range int32(4) {
		c.agree(record.TopicPartition{Topic: topic.ID, Partition: p}, want[p])
	}
	tp := record.TopicPartition{Topic: topic.ID, Partition: 0}
	before, _ := c.hosts[2].Partition(tp)

	server := c.hosts[2].identity.serverID()
	epochs := []uint64{}
	rec := Recovery{DataDir: c.dirs[2], NodeID: 3, Voters: c.voters, Progress: func(string) {},
		Fence: func(_ context.Context, cluster, s string, above uint64) (uint64, error) {
			if s != server {
				t.Errorf("fence for %s", s)
			}
			e := above + 1
			epochs = append(epochs, e)
			return e, nil
		}}
	backup := func() string { return filepath.Join(t.TempDir(), "backup") }
	rec.Backup = backup()
	if _, err := Recover(t.Context(), rec); !errors.Is(err, ErrLocked) {
		t.Errorf("while it runs: %v", err)
	}
	c.stop(2)
	if _, err := Recover(t.Context(), rec); !errors.Is(err, ErrPeerAnswers) {
		t.Errorf("while the others run: %v", err)
	}
	c.stop(0)
	c.stop(1)
	rec.Fence = func(context.Context, string, string, uint64) (uint64, error) {
		return 0, errors.New("no store")
	}
	if _, err := Recover(t.Context(), rec); err == nil || len(epochs) > 0 {
		t.Errorf("without a fence: %v", err)
	}
	if id, _, err := readIdentity(rec.Backup, 3, false); err != nil || id.serverID() != server {
		t.Errorf("the backup is of %v: %v", id, err)
	}
	rec.Fence = func(_ context.Context, cluster, s string, above uint64) (uint64, error) {
		e := above + 1
		epochs = append(epochs, e)
		return e, nil
	}
	for stop := range 3 { // it dies before each of the groups
		rec.Backup = backup()
		n := 0
		rec.Progress = func(s string) {
			if strings.HasPrefix(s, "making") {
				if n++; n > stop {
					panic("died")
				}
			}
		}
		func() {
			defer func() { _ = recover() }()
			_, _ = Recover(t.Context(), rec)
			t.Error("it did not die")
		}()
		if err := c.open(2); !errors.Is(err, ErrRecovering) {
			t.Fatalf("a node whose recovery did not end: %v", err)
		}
		if l, err := net.Listen("tcp", c.voters[2].Addr); err != nil {
			t.Fatalf("a node that did not open keeps its listener: %v", err)
		} else if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	rec.Backup, rec.Progress = backup(), func(string) {}
	out, err := Recover(t.Context(), rec)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range epochs {
		if e != 1 {
			t.Errorf("epochs %v: one recovery that is repeated is one epoch", epochs)
		}
	}
	if len(out) != 4 {
		t.Errorf("%d partitions", len(out))
	}
	for _, r := range out {
		if r.Topic != "t" || int(r.End) != len(want[r.Partition]) {
			t.Errorf("%+v, want end %d", r, len(want[r.Partition]))
		}
	}

	c.start(2)
	h := c.hosts[2]
	awaitStates(t, h, "3:voter")
	for p := range int32(4) {
		c.agree(record.TopicPartition{Topic: topic.ID, Partition: p}, want[p])
	}
	until(t, "the partition to be led", func() bool { _, err := h.Partition(tp); return err == nil })
	if now, _ := h.Partition(tp); now.LeaderEpoch < before.LeaderEpoch+recoverTerms {
		t.Errorf("leader epoch %d after %d", now.LeaderEpoch, before.LeaderEpoch)
	}
	write(20)

	// what is left of the others does not get in the way
	ctx, cancel := context.WithCancel(t.Context())
	opened := make(chan error, 1)
	cfg := c.config(0)
	cfg.PeerListener = listenAt(t, c.voters[0].Addr)
	go func() { h, err := Open(ctx, cfg); _ = closeIf(h); opened <- err }()
	until(t, "what is left of another to answer", func() bool { _, err := h.peers.Ask(t.Context(), c.voters[0].Addr); return err == nil })
	write(20)
	cancel()
	if err := <-opened; err == nil {
		t.Error("a voter of the lost majority found a cluster by itself")
	}

	for _, i := range []int{0, 1} {
		if err := os.RemoveAll(c.dirs[i]); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- c.open(i) }()
		until(t, "a new node to announce itself", func() bool { _, ok := h.Cluster().Node(int32(i + 1)); return ok })
		decided(t, "the node to be added", func() error { return h.AddMember(t.Context(), int32(i+1), "") })
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.stop(i) })
	}
	awaitStates(t, h, "1:voter 2:voter 3:voter")
	c.stop(2)
	write(20)
	for p := range int32(4) {
		c.agree(record.TopicPartition{Topic: topic.ID, Partition: p}, want[p])
	}
}
