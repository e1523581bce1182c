package localstack

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// freeze stops everything that is written to the disk at dir until the function that it returns is called.
func freeze(t *testing.T, dir string) (thaw func()) {
	t.Helper()
	if err := FreezeDisk(dir); err != nil {
		t.Fatal(err)
	}
	thaw = sync.OnceFunc(func() {
		if err := ThawDisk(dir); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(thaw)
	return thaw
}

// impatient producers give up a request that a node does not answer, and ask another.
var impatient = []kgo.Opt{kgo.ProduceRequestTimeout(time.Second), kgo.RequestTimeoutOverhead(time.Second)}

// The disk of a node that leads stops answering, under load. The others take over what it leads while its process goes on; when the disk answers again it follows, and
// nothing that was acknowledged is lost. ESTRAN_TEST_HANG=1 waits until the node has ended itself, half a minute later, and starts it again.
func TestQuorumFrozenDisk(t *testing.T) {
	image := disk(t, 512<<20)
	nodes := newQuorum(t, nil, 3)
	nodes[0].dir = filepath.Join(image, "data")
	startAll(t, nodes)
	createReplicated(t, nodes[0], "t", 6, 3)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { l.produce(t, nodes[1], "t", 6, ctx, 1<<30, impatient...) })
	p := probeOf(t, nodes[1], "t")
	led := func() (out []int32) { // partitions that the first node leads
		for k := range int32(6) {
			if p.leader(k) == 1 {
				out = append(out, k)
			}
		}
		return out
	}
	until(t, "the first node to lead something", func() bool { return len(led()) > 0 && l.count() > 1000 })
	thaw := freeze(t, image)
	until(t, "the others to lead everything", func() bool { return len(led()) == 0 && p.leader(0) != 0 })
	counts := l.counts()
	until(t, "acknowledgements in every partition", func() bool {
		for k, n := range l.counts() {
			if n <= counts[k]+10 {
				return false
			}
		}
		return true
	})
	if os.Getenv("ESTRAN_TEST_HANG") != "" {
		until(t, "the node to say that its disk does not answer", func() bool { return strings.Contains(nodes[0].Tail(), "E_DISK_HUNG") })
		thaw() // a process with a thread in the disk cannot end before
		until(t, "the node to end", func() bool { return !nodes[0].Alive() })
	}
	thaw()
	before := l.count()
	until(t, "acknowledgements after it has come back", func() bool {
		if !nodes[0].Alive() { // it has ended itself; that needs the disk, so it did not before
			restart(t, nodes[0])
		}
		return l.count() > before+1000
	})
	cancel()
	wg.Wait()
	l.verify(t, nodes[1], "t")
	sameLogs(t, nodes)
}

// counts is how many records of each partition are acknowledged.
func (l *ledger) counts() map[int32]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[int32]int{}
	for p, m := range l.acked {
		out[p] = len(m)
	}
	return out
}
