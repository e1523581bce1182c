package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/estran/estran/localstack"
	"github.com/estran/estran/localstack/check"
	"github.com/estran/estran/localstack/logs"
)

// sameLogs ends a life: it waits until every voter knows what is committed, kills them all and compares their logs as they lie on their disks, and what the logs
// come to; store has what they refer to, flips are the bits of logs that the tool itself has changed.
func sameLogs(ctx context.Context, cluster *localstack.Cluster, store *localstack.Double, flips map[string]int) ([]check.Anomaly, error) {
	for i, n := range cluster.Nodes {
		if n.Alive() { // one that ended late of a failed call is not
			continue
		}
		if err := restart(ctx, n); err != nil {
			return nil, fmt.Errorf("%w: voter %d: %w", errStuck, i+1, err)
		}
	}
	groups, err := logs.Groups(cluster.Nodes[0].Dir())
	if err != nil {
		return nil, err
	}
	committed := map[string]uint64{}
	for label, dir := range groups {
		i, err := committedEverywhere(ctx, cluster.Nodes, label)
		if err != nil {
			return nil, err
		}
		committed[dir] = i
	}
	var dirs []string
	for _, n := range cluster.Nodes {
		if err := n.Kill(); err != nil {
			return nil, err
		}
		dirs = append(dirs, n.Dir())
	}
	if err := logs.Compare(dirs, committed, flips); err != nil {
		return []check.Anomaly{{Rule: "logs-differ", Text: err.Error(), Key: -1}}, nil
	}
	return logs.States(dirs, committed, below(store.Keys(), store.Object))
}

// committedEverywhere is an index up to which every voter knows that a group's entries are committed.
func committedEverywhere(ctx context.Context, nodes []*localstack.Node, group string) (uint64, error) {
	var err error
	ask := func(n *localstack.Node) (at float64) {
		at, err = n.Metric(ctx, "estran_raft_commit_index{", fmt.Sprintf("group=%q", group))
		return at
	}
	commit := 0.0
	for _, n := range nodes {
		commit = max(commit, ask(n))
	}
	for i, n := range nodes {
		at := 0.0
		if !until(ctx, func() bool { at = ask(n); return err == nil && at >= commit }) {
			return 0, fmt.Errorf("%w: voter %d knows of %.0f entries of group %s, %.0f are committed (%w)", errStuck, i+1, at, group, commit, err)
		}
	}
	return uint64(commit), nil
}

// below are a store's objects by their keys below the prefix of the only cluster in it.
func below(keys []string, object func(string) ([]byte, bool)) map[string][]byte {
	out := map[string][]byte{}
	for _, k := range keys {
		if i := strings.Index(k, "v1/data/"); i >= 0 {
			if b, ok := object(k); ok {
				out[k[i:]] = b
			}
		}
	}
	return out
}
