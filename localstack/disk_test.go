package localstack

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// disk mounts a new disk until the test ends; where that is impossible the test is skipped.
func disk(t *testing.T, size int64) (dir string) {
	t.Helper()
	if testing.Short() {
		t.Skip("disks are left out with -short")
	}
	image, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	err := MakeDisk(image, size)
	if err == nil {
		err = MountDisk(image, dir)
	}
	if errors.Is(err, ErrNoDisk) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := UnmountDisk(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A node's disk runs full, log and objects alike: records are refused with a retriable error and the node lives. When somebody makes room
// it takes records again without anybody's doing, and nothing acknowledged is lost, a crash included.
func TestNodeOnAFullDisk(t *testing.T) {
	dir := disk(t, 192<<20) // what is sealed lies there too, and must not fill it once there is room
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 128<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	n := startNode(t, filepath.Join(dir, "data"), []string{"ESTRAN_QUORUM_SHARDS=1", "ESTRAN_TIERING_SEAL_BYTES=1MiB", "ESTRAN_TIERING_SEAL_AGE=300ms"})
	createTopic(t, n, "t", 2)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { l.produce(t, n, "t", 2, ctx, 1<<30) })
	until(t, "a refusal", func() bool { return metric(t, n, "estran_hot_budget_refused_total") > 0 })
	full := l.count()
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	until(t, "acknowledgements with space again", func() bool { return l.count() > full+5000 })
	if !n.Alive() {
		t.Fatal("the node ended")
	}
	if err := n.Kill(); err != nil {
		t.Fatal(err)
	}
	before := l.count()
	restart(t, n)
	until(t, "acknowledgements after the restart", func() bool { return l.count() > before })
	cancel()
	wg.Wait()
	l.verify(t, n, "t")
	t.Logf("%d of %d records were acknowledged when the disk was full", full, l.count())
}
