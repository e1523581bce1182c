package raftmeta

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
)

// damage flips a bit of every payload that a group's log holds in files; raftlog/FORMAT.md. It returns how many.
func damage(t *testing.T, dir string, text []byte) (n int) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; ; n++ {
			i := bytes.Index(b[at:], text)
			if i < 0 {
				break
			}
			if _, err := f.WriteAt([]byte{b[at+i] ^ 1}, int64(at+i)); err != nil {
				t.Fatal(err)
			}
			at += i + 1
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// A leader whose copy of a hot batch is damaged serves nothing of it, gets it whole from another voter, and serves that; it can be sealed again.
func TestDamagedHotBatchIsRepaired(t *testing.T) {
	c := newTrio(t, 3)
	c.start(0, 1, 2)
	topic := newTopic(t, c.hosts[0], "t", 1)
	tp, shard := record.TopicPartition{Topic: topic.ID}, topic.Partitions[0].Shard
	var want []string
	for i := range 4 { // together more than the tail in memory
		v := strings.Repeat(string(rune('a'+i)), 700<<10)
		if i == 0 {
			v = "to be damaged " + v // more than a piece
		}
		want = append(want, v)
		c.append(tp, batchOf(t, 7, record.Sequence(i), v))
	}
	at := c.leads(shard)
	h := c.hosts[at]
	if n := damage(t, filepath.Join(c.dirs[at], "shard-"+string(rune('0'+shard))), []byte("to be damaged")); n != 1 {
		t.Fatalf("%d places were damaged", n)
	}
	_, err := h.ReadHot(t.Context(), tp, 0, tiering.Limits{MaxBytes: 1, AtLeastOne: true, UpTo: 4})
	if !errors.Is(err, tiering.ErrStorage) || !errors.Is(err, raftlog.ErrCorrupt) {
		t.Errorf("the damaged batch: %v", err)
	}
	until(t, "the batch to be repaired", func() bool {
		res, err := h.ReadHot(t.Context(), tp, 0, tiering.Limits{MaxBytes: 1, AtLeastOne: true, UpTo: 4})
		if err == nil {
			res.Release()
		}
		return err == nil
	})
	c.agree(tp, want)
	batches, err := h.Batches(t.Context(), shard, tiering.HotRange{TP: tp, Start: 0, End: 3}, 1<<30)
	if err != nil || len(batches) != 4 {
		t.Fatalf("%d batches, %v", len(batches), err)
	}
	src := h.Payload(shard)
	defer src.Close()
	body := make([]byte, int(batches[0].Size)-record.HeaderBytes)
	if err := src.ReadBody(&batches[0], body); err != nil || !bytes.Contains(body, []byte("to be damaged")) {
		t.Errorf("what is sealed: %v", err)
	}
}

// Without another voter that has the batch whole the error stays, and says where the damage is.
func TestDamageThatNobodyCanRepair(t *testing.T) {
	dir := t.TempDir()
	h := openHost(t, dir, func(c *Config) { c.TailBytes = 64 << 10 })
	topic := newTopic(t, h, "t", 1)
	tp, shard := record.TopicPartition{Topic: topic.ID}, topic.Partitions[0].Shard
	for i := range 4 {
		appendSync(t, h, AppendBatch{tp, batchOf(t, -1, -1, "record "+string(rune('0'+i))+strings.Repeat("x", 50<<10))})
	}
	if damage(t, filepath.Join(dir, "shard-"+string(rune('0'+shard))), []byte("record 0")) != 1 {
		t.Fatal("nothing was damaged")
	}
	err := h.Repair(t.Context(), shard, tp, 0)
	if err == nil || !strings.Contains(err.Error(), "no other voter") || !strings.Contains(err.Error(), "offset 0") {
		t.Errorf("repair: %v", err)
	}
	if _, err := h.ReadHot(t.Context(), tp, 0, tiering.Limits{MaxBytes: 1, AtLeastOne: true, UpTo: 4}); !errors.Is(err, tiering.ErrStorage) {
		t.Errorf("it is served: %v", err)
	}
	if err := h.Repair(t.Context(), shard, tp, 9); err != nil {
		t.Errorf("what is not hot needs no repair: %v", err)
	}
}

// Reads find damage while the node closes. A repair that has begun is waited for, and none begins afterwards.
func TestNoRepairAfterClose(t *testing.T) {
	h := openHost(t, t.TempDir(), nil)
	topic := newTopic(t, h, "t", 1)
	g := h.shardByID(topic.Partitions[0].Shard)
	tp := record.TopicPartition{Topic: topic.ID}
	appendSync(t, h, AppendBatch{tp, batchOf(t, -1, -1, "a")})
	stop := make(chan struct{})
	var reads sync.WaitGroup
	for range 4 {
		reads.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					g.mend(tp, 0)
				}
			}
		})
	}
	if err := h.Close(t.Context()); err != nil {
		t.Error(err)
	}
	close(stop)
	reads.Wait()
	var after sync.WaitGroup
	began := false
	g.mending.begin(&after, func() { began = true })
	after.Wait()
	if began {
		t.Error("a repair has begun in a closed group")
	}
}
