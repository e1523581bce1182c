package localstack

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
)

// mustCluster runs a command that must be done. One that is decided and not done within the command's own minute, as on a machine so busy that leaders change all the time, is given
// again; a removal goes on by itself.
func mustCluster(t *testing.T, n *Node, args ...string) (out string) {
	t.Helper()
	until(t, "estran cluster "+strings.Join(args, " "), func() bool {
		var err error
		out, err = n.Command(t.Context(), args...)
		unsettled := strings.Contains(out, "E_CLUSTER_UNSETTLED")
		if err != nil && !unsettled {
			t.Fatalf("estran cluster %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return err == nil || strings.Contains(strings.Join(args, " "), "members remove")
	})
	return out
}

// status is the part of `cluster status -o json` that the tests look at.
type status struct {
	Shards  int
	Members []struct {
		ID       int
		State    string
		Draining bool
		Leads    []string
	}
}

func statusOf(t *testing.T, n *Node) (s status) {
	t.Helper()
	if err := json.Unmarshal([]byte(mustCluster(t, n, "status", "-o", "json")), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// A voter that began alone grows to three by the commands of its operator, under load; then any may be killed; each drains, and the first is removed. Its process ends and says why;
// what was acknowledged is read from those that are left.
func TestMembersByCommand(t *testing.T) {
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	var voters []string
	for i := range 3 {
		port, err := freePort()
		if err != nil {
			t.Fatal(err)
		}
		voters = append(voters, fmt.Sprintf("%d@127.0.0.1:%d", i+1, port))
	}
	store := t.TempDir()
	nodes := make([]*Node, 3)
	for i := range nodes {
		env := []string{"ESTRAN_STORAGE_URL=file://" + store, fmt.Sprint("ESTRAN_NODE_ID=", i+1), "ESTRAN_QUORUM_SHARDS=1", "ESTRAN_TIERING_SEAL_BYTES=1MiB", "ESTRAN_TIERING_SEAL_AGE=500ms"}
		if i > 0 { // the first knows of nobody
			env = append(env, "ESTRAN_QUORUM_VOTERS="+strings.Join(voters, ","))
		}
		nodes[i] = NewNode(p, t.TempDir(), env)
		_, nodes[i].Peer, _ = strings.Cut(voters[i], "@")
		t.Cleanup(func() {
			_ = nodes[i].Kill()
			if t.Failed() {
				t.Log(nodes[i].Tail())
			}
		})
	}
	restart(t, nodes[0])
	createTopic(t, nodes[0], "t", 6)
	l := newLedger()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { l.produce(t, nodes[0], "t", 6, ctx, 1<<30) })
	more := func(what string) {
		t.Helper()
		before := l.count()
		until(t, what, func() bool { return l.count() > before+500 })
	}
	more("acknowledgements of one")

	if out, err := nodes[0].Command(t.Context(), "members", "add", "2"); err == nil || !strings.Contains(out, "E_CLUSTER_REFUSED") {
		t.Errorf("adding a node that nobody has seen: %v\n%s", err, out)
	}
	for i, n := range nodes[1:] {
		started := make(chan error, 1)
		go func() { started <- n.Start(t.Context()) }()
		id := fmt.Sprint(i + 2)
		until(t, "node "+id+" to announce itself", func() bool {
			s := statusOf(t, nodes[0])
			return len(s.Members) == i+2 && s.Members[i+1].State == "waiting"
		})
		more("acknowledgements while a node waits")
		if out := mustCluster(t, nodes[0], "members", "add", voters[i+1]); !strings.Contains(out, "node "+id+" is a voter") {
			t.Errorf("members add: %s", out)
		}
		if err := <-started; err != nil {
			t.Fatal(err)
		}
		more("acknowledgements of more")
	}
	for _, n := range nodes {
		until(t, "a shard for each voter", func() bool { s := statusOf(t, n); return s.Shards == 3 && s.Members[2].State == "voter" })
	}
	createReplicated(t, nodes[2], "u", 3, 3)
	t.Log("\n" + mustCluster(t, nodes[2], "status"))

	for _, n := range nodes {
		if err := n.Kill(); err != nil {
			t.Fatal(err)
		}
		more("acknowledgements of two of three")
		restart(t, n)
	}
	for i, n := range nodes {
		mustCluster(t, n, "drain", "--self")
		until(t, fmt.Sprintf("another node to see that node %d drains and leads nothing", i+1), func() bool {
			m := statusOf(t, nodes[(i+1)%3]).Members[i]
			return m.Draining && len(m.Leads) == 0
		})
		mustCluster(t, nodes[(i+1)%3], "undrain", fmt.Sprint(i+1))
	}
	mustCluster(t, nodes[0], "leader", "transfer", "--group", "shard-1", "--to", "2")
	mustCluster(t, nodes[0], "leader", "transfer", "--group", "shard-1", "--to", "any")

	mustCluster(t, nodes[1], "members", "remove", "1")
	until(t, "the removed node to end", func() bool { return !nodes[0].Alive() })
	if tail := nodes[0].Tail(); !strings.Contains(tail, "E_NODE_REMOVED") {
		t.Errorf("the removed node does not say why it ends:\n%s", tail)
	}
	more("acknowledgements of the two that are left")
	if out, err := nodes[1].Command(t.Context(), "members", "remove", "9"); err == nil || !strings.Contains(out, "E_CLUSTER_REFUSED") {
		t.Errorf("removing a stranger: %v\n%s", err, out)
	}
	cancel()
	wg.Wait()
	for _, n := range nodes[1:] {
		l.verify(t, n, "t")
	}
	t.Logf("%d records", l.count())
}
