package localstack

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// inIsolation reports whether this process has a network of its own; where it has not, the test is run again in one that has, and skipped or failed as it was there.
func inIsolation(t *testing.T) bool {
	if slices.Contains(os.Environ(), isolated) {
		if err := Isolate(); err != nil {
			t.Fatal(err)
		}
		return true
	}
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	if err := namespacesHere(); err != nil {
		t.Skip(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=10m")
	cmd.Env, cmd.SysProcAttr = append(os.Environ(), isolated), Leash()
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET
	out, err := cmd.CombinedOutput()
	switch {
	case errors.Is(err, syscall.EPERM):
		t.Skipf("%v: %v", ErrNoNamespaces, err)
	case err != nil || !strings.Contains(string(out), "--- ") || strings.Contains(string(out), "--- FAIL"):
		t.Errorf("%v\n%s", err, out)
	case strings.Contains(string(out), "--- SKIP"):
		t.Skip(string(out))
	}
	return false
}

// Voters in networks of their own, between which there is no proxy: the kernel loses what one sends to another, both ways or one, or a cable is taken. The others go on, who was cut off comes
// back, and everything that was acknowledged is read at every voter.
func TestNamespaces(t *testing.T) {
	if !inIsolation(t) {
		return
	}
	ns, err := NewNamespaces(3)
	if errors.Is(err, ErrNoNamespaces) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ns.Close(); err != nil {
			t.Error(err)
		}
		if out, err := exec.Command("ip", "-o", "link", "show").CombinedOutput(); err != nil || strings.Contains(string(out), "estran") || strings.Contains(string(out), "br0") {
			t.Errorf("left: %s, %v", out, err)
		}
	})
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	c := NewCluster(p, t.TempDir(), 3)
	c.Namespaces = ns
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	createReplicated(t, c.Nodes[0], "t", 6, 3)
	l := newLedger()
	load, end := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end()
	wg.Go(func() { l.produce(t, c.Nodes[0], "t", 6, load, 1<<30) })
	goesOn := func(when string) {
		t.Helper()
		before := l.counts()
		until(t, "acknowledgements in every partition "+when, func() bool {
			now := l.counts()
			for p := range int32(6) {
				if now[p] < before[p]+20 {
					return false
				}
			}
			return true
		})
	}
	goesOn("with all up")
	probe := probeOf(t, c.Nodes[0], "t")
	lead := 0
	until(t, "a leader", func() bool { lead = probe.leader(0); return lead > 0 })
	other, third := lead%3+1, (lead+1)%3+1
	for _, x := range []struct {
		name string
		ways [][2]int
	}{
		{"the leader is apart", [][2]int{{lead, other}, {lead, third}, {other, lead}, {third, lead}}},
		{"one is not heard", [][2]int{{other, lead}, {other, third}}},
		{"one hears nobody", [][2]int{{lead, third}, {other, third}}},
		{"two are apart", [][2]int{{third, lead}, {lead, third}}},
	} {
		before, err := ns.Lost()
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range x.ways {
			if err := ns.Cut(w[0], w[1]); err != nil {
				t.Fatal(err)
			}
		}
		until(t, "packets to be lost while "+x.name, func() bool {
			n, err := ns.Lost()
			if err != nil {
				t.Fatal(err)
			}
			return n > before+5
		})
		goesOn("while " + x.name)
		if err := ns.Heal(); err != nil {
			t.Fatal(err)
		}
		goesOn("when it is over that " + x.name)
	}
	if err := ns.Unplug(third); err != nil {
		t.Fatal(err)
	}
	goesOn("without one's cable")
	if err := ns.Heal(); err != nil {
		t.Fatal(err)
	}
	goesOn("with all cables")
	end()
	wg.Wait()
	l.verifyFromEach(t, c.Nodes, "t", 6)
	sameLogs(t, c.Nodes)
}

// What listens on loopback is reached from a voter's namespace through Forward.
func TestNamespacesReachTheStore(t *testing.T) {
	if !inIsolation(t) {
		return
	}
	ns, err := NewNamespaces(1)
	if errors.Is(err, ErrNoNamespaces) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	d := NewDouble()
	t.Cleanup(d.Close)
	addr, err := ns.Forward(strings.TrimPrefix(d.Endpoint, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	c := NewCluster(p, t.TempDir(), 1, d.Env()...)
	c.Namespaces, c.Storage = ns, (&Store{Endpoint: "http://" + addr}).URL("estran")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := c.Start(ctx); err != nil { // it proves the store first
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if len(d.Calls()) == 0 {
		t.Error("the store was not asked")
	}
}
