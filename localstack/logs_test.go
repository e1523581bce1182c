package localstack

import (
	"fmt"
	"testing"

	"github.com/estran/estran/localstack/logs"
)

// groupLabels are the groups of a node, as its metrics name them, and their directories.
func groupLabels(t *testing.T, n *Node) map[string]string {
	t.Helper()
	out, err := logs.Groups(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func groupMetric(t *testing.T, n *Node, name, group string) float64 {
	t.Helper()
	return metric(t, n, name, fmt.Sprintf("{group=%q", group))
}

// sameLogs ends a test: it waits until every voter knows what is committed, kills them all and compares their logs as they lie on their disks.
func sameLogs(t *testing.T, nodes []*Node) {
	t.Helper()
	committed := map[string]uint64{}
	var dirs []string
	for label, dir := range groupLabels(t, nodes[0]) {
		commit := 0.0
		for _, n := range nodes {
			commit = max(commit, groupMetric(t, n, "estran_raft_commit_index", label))
		}
		for i, n := range nodes {
			until(t, fmt.Sprintf("node %d to have entry %.0f of group %s", i+1, commit, label), func() bool { return groupMetric(t, n, "estran_raft_commit_index", label) >= commit })
		}
		committed[dir] = uint64(commit)
	}
	for _, n := range nodes {
		dirs = append(dirs, n.dir)
		if err := n.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	if err := logs.Compare(dirs, committed, nil); err != nil {
		t.Errorf("the logs differ: %v", err)
	}
}
