package localstack

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// inject makes strace fail or interrupt the node's system calls from now on, as expr says. The node goes on without it when the test ends.
func inject(t *testing.T, n *Node, call, expr string) {
	t.Helper()
	i, err := Inject(n.PID, call, expr, filepath.Join(t.TempDir(), "trace"), 2*time.Minute)
	if errors.Is(err, ErrNoInjection) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(i.End)
}

// A system call of the log fails in a real node under load, or the process dies in it: the node ends and says why, and after a restart
// without the fault everything acknowledged is served, once and in order.
func TestFailingSystemCalls(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("strace is not installed")
	}
	for _, c := range []struct{ name, call, expr, says string }{
		{"fsync fails", "fdatasync", "error=EIO:when=10", "input/output error"},
		{"no space for a write", "pwritev", "error=ENOSPC:when=10", "no space left on device"},
		{"no file can be written", "pwrite64", "error=EIO:when=2+", "input/output error"},
		{"killed in an fsync", "fdatasync", "signal=SIGKILL:when=10", ""},
		{"killed in a write", "pwritev", "signal=SIGKILL:when=10", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := startNode(t, t.TempDir(), []string{"ESTRAN_QUORUM_SHARDS=2", "ESTRAN_TIERING_SEAL_BYTES=1MiB", "ESTRAN_TIERING_SEAL_AGE=300ms"})
			createTopic(t, n, "t", 4)
			l := newLedger()
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			defer wg.Wait()
			defer cancel()
			wg.Go(func() { l.produce(t, n, "t", 4, ctx, 1<<30) })
			until(t, "an acknowledgement", func() bool { return l.count() > 0 })
			inject(t, n, c.call, c.expr)
			until(t, "the end of the node", func() bool { return !n.Alive() })
			if n.err == nil || c.says != "" && (!strings.Contains(n.Tail(), "E_DISK_WRITE") || !strings.Contains(n.Tail(), c.says)) {
				t.Errorf("ended with %v and said:\n%s", n.err, n.Tail())
			}
			before := l.count()
			restart(t, n)
			until(t, "an acknowledgement after the restart", func() bool { return l.count() > before })
			cancel()
			wg.Wait()
			l.verify(t, n, "t")
			t.Logf("%d of %d records were acknowledged before the fault", before, l.count())
		})
	}
}

// The same in a quorum, to a node that leads: it ends and says why, the others go on and lead what it led, and nothing acknowledged is lost.
func TestQuorumFailingSystemCalls(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("strace is not installed")
	}
	nodes := startQuorum(t, 3)
	createReplicated(t, nodes[0], "t", 6, 3)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { l.produce(t, nodes[0], "t", 6, ctx, 1<<30) })
	for i, c := range []struct{ name, call, expr, says string }{
		{"fsync fails", "fdatasync", "error=EIO:when=5+", "input/output error"},
		{"a write fails", "pwritev", "error=EIO:when=5+", "input/output error"},
		{"killed in an fsync", "fdatasync", "signal=SIGKILL:when=5", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, other := nodes[i], probeOf(t, nodes[(i+1)%3], "t")
			leads := func() bool {
				for k := range int32(6) {
					if other.leader(k) == i+1 {
						return true
					}
				}
				return false
			}
			before := l.count()
			until(t, "the node to lead something, under load", func() bool { return leads() && l.count() > before+300 })
			inject(t, n, c.call, c.expr)
			until(t, "the end of the node", func() bool { return !n.Alive() })
			said := n.Tail()
			if n.err == nil || c.says != "" && (!strings.Contains(said, "E_DISK_WRITE") || !strings.Contains(said, c.says)) {
				t.Errorf("ended with %v and said:\n%s", n.err, n.Tail())
			}
			until(t, "the others to lead everything", func() bool { return !leads() && other.leader(0) != 0 })
			counts := l.counts()
			until(t, "acknowledgements in every partition", func() bool {
				for k, n := range l.counts() {
					if n <= counts[k]+10 {
						return false
					}
				}
				return true
			})
			restart(t, n)
		})
	}
	cancel()
	wg.Wait()
	l.verify(t, nodes[0], "t")
	sameLogs(t, nodes)
}
