package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/estran/estran/localstack"
)

// A cluster's voters reach one another either through proxies, which can hold bytes, or each in a network namespace of its own, where the kernel's TCP repeats what is lost and no connection is
// reset. Faults of the one kind are not for clusters of the other.

// isolate gives this process a network of its own, if faults want one. Where it cannot be had, their rounds are skipped.
func isolate(kinds []nemesis, out io.Writer) error {
	if !slices.ContainsFunc(kinds, func(n nemesis) bool { return n.netns }) {
		return nil
	}
	err := localstack.Isolate()
	if errors.Is(err, localstack.ErrNoNamespaces) {
		fmt.Fprintln(out, err)
		return nil
	}
	return err
}

// namespaces chooses how the voters of a life reach one another: nil means through proxies. It returns the faults that are left.
func namespaces(kinds []nemesis, voters int, rng *rand.Rand, out io.Writer) (*localstack.Namespaces, []nemesis, error) {
	of := func(n nemesis) bool { return n.netns }
	if !slices.ContainsFunc(kinds, of) || slices.ContainsFunc(kinds, func(n nemesis) bool { return n.proxies }) && rng.IntN(2) == 0 {
		return nil, slices.DeleteFunc(slices.Clone(kinds), of), nil
	}
	ns, err := localstack.NewNamespaces(voters)
	if errors.Is(err, localstack.ErrNoNamespaces) {
		fmt.Fprintln(out, err)
		return nil, kinds, nil
	}
	return ns, slices.DeleteFunc(slices.Clone(kinds), func(n nemesis) bool { return n.proxies }), err
}

// attach makes a life's voters run in namespaces and reach the store from there.
func attach(cluster *localstack.Cluster, ns *localstack.Namespaces, store *localstack.Double) error {
	addr, err := ns.Forward(strings.TrimPrefix(store.Endpoint, "http://"))
	if err != nil {
		return err
	}
	cluster.Namespaces, cluster.Network = ns, nil
	cluster.Storage = (&localstack.Store{Endpoint: "http://" + addr}).URL("estran")
	return nil
}

var errNoNamespaces = fmt.Errorf("%w: the voters have no networks of their own", errUnavailable)

// lose makes the kernel lose what is sent on ways between voters that are numbered anew each time.
func lose(ways func(n int) [][2]int) func(*world) (*fault, error) {
	return func(w *world) (*fault, error) {
		ns := w.cluster.Namespaces
		if ns == nil {
			return nil, errNoNamespaces
		}
		before, err := ns.Lost()
		if err != nil {
			return nil, err
		}
		n := len(w.cluster.Nodes)
		p := w.rng.Perm(n)
		var closed [][2]int
		for _, k := range ways(n) {
			from, to := p[k[0]]+1, p[k[1]]+1
			closed = append(closed, [2]int{from, to})
			if err := ns.Cut(from, to); err != nil {
				return nil, errors.Join(err, ns.Heal())
			}
		}
		hit := func() bool {
			now, err := ns.Lost()
			return err == nil && now > before
		}
		return &fault{fmt.Sprintf("lost %v", closed), hit, func(context.Context) error { return ns.Heal() }}, nil
	}
}

// unplug takes a voter's cable: clients and the store do not reach it either.
func unplug(w *world) (*fault, error) {
	ns := w.cluster.Namespaces
	if ns == nil {
		return nil, errNoNamespaces
	}
	i := w.rng.IntN(len(w.cluster.Nodes)) + 1
	if err := ns.Unplug(i); err != nil {
		return nil, errors.Join(err, ns.Heal())
	}
	return &fault{fmt.Sprintf("no cable %d", i), yes, func(context.Context) error { return ns.Heal() }}, nil
}
