package localstack

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// Two of three are gone. `estran recover` on the third refuses while anything of the others answers, then makes it the cluster; what was acknowledged while all were up is there, sealed or
// not, and what is left of the others does not come back: it finds the fence in the store.
func TestRecoverByCommand(t *testing.T) {
	nodes := startQuorum(t, 3)
	createReplicated(t, nodes[0], "t", 6, 3)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { l.produce(t, nodes[0], "t", 6, ctx, 1<<30) })
	until(t, "acknowledgements", func() bool { return l.count() > 5000 })
	cancel()
	wg.Wait()
	for _, n := range nodes {
		l.verify(t, n, "t") // also: every node has everything
	}
	last := nodes[2]
	if err := last.Kill(); err != nil {
		t.Fatal(err)
	}
	backup := filepath.Join(t.TempDir(), "backup")
	recover := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), last.program, append([]string{"recover", "--data-dir", last.dir, "--backup", backup}, args...)...)
		cmd.Env = append(os.Environ(), last.env...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := recover(); err == nil || !strings.Contains(out, "E_CONFIRM") {
		t.Errorf("without --yes: %v\n%s", err, out)
	}
	if out, err := recover("--yes"); err == nil || !strings.Contains(out, "E_PEER_ANSWERS") {
		t.Errorf("while the others are up: %v\n%s", err, out)
	}
	for _, n := range nodes[:2] {
		if err := n.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	out, err := recover("--yes")
	if err != nil || !strings.Contains(out, "node 3 is the only voter now") || strings.Count(out, "\nt ") != 6 {
		t.Fatalf("recover: %v\n%s", err, out)
	}
	t.Log("\n" + out)
	if _, err := os.Stat(filepath.Join(backup, "node.json")); err != nil {
		t.Error(err)
	}
	restart(t, last)
	l.verify(t, last, "t")

	// what is left of the lost majority
	for _, n := range nodes[:2] {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), waitMost)
			defer cancel()
			if err := n.Start(ctx); err == nil || !strings.Contains(n.Tail(), "E_NODE_FENCED") {
				t.Errorf("a voter of the lost majority starts: %v\n%s", err, n.Tail())
			}
		})
	}
	wg.Wait()
	for i, n := range nodes[:2] { // with empty directories they join
		if err := os.RemoveAll(n.dir); err != nil {
			t.Fatal(err)
		}
		started := make(chan error, 1)
		go func() { started <- n.Start(t.Context()) }()
		until(t, "a node to announce itself", func() bool { s := statusOf(t, last); return len(s.Members) == i+2 })
		mustCluster(t, last, "members", "add", []string{"1", "2"}[i])
		if err := <-started; err != nil {
			t.Fatal(err)
		}
	}
	if err := last.Kill(); err != nil {
		t.Fatal(err)
	}
	l.verify(t, nodes[0], "t")
}
