package main

import (
	"context"
	"fmt"
	"time"

	"github.com/estran/estran/localstack"
)

// Ways between voters, numbered from 0, that a fault closes.

// apart is the first from all others.
func apart(n int) (out [][2]int) {
	for i := 1; i < n; i++ {
		out = append(out, [2]int{0, i}, [2]int{i, 0})
	}
	return out
}

// mute: the first is not heard.
func mute(n int) (out [][2]int) {
	for i := 1; i < n; i++ {
		out = append(out, [2]int{0, i})
	}
	return out
}

// bridge: the halves reach one another through the last only.
func bridge(n int) (out [][2]int) {
	for i := range n / 2 {
		for j := n / 2; j < n-1; j++ {
			out = append(out, [2]int{i, j}, [2]int{j, i})
		}
	}
	return out
}

// ring: each reaches its neighbours only. Of five each has a majority, and no two the same.
func ring(n int) (out [][2]int) {
	for i := range n {
		for j := range n {
			if d := (i - j + n) % n; d > 1 && d < n-1 {
				out = append(out, [2]int{i, j})
			}
		}
	}
	return out
}

// cut closes ways between voters that are numbered anew each time.
func cut(f localstack.Fault, ways func(n int) [][2]int) func(*world) (*fault, error) {
	return func(w *world) (*fault, error) {
		n := len(w.cluster.Nodes)
		p, before := w.rng.Perm(n), w.network.Hits()
		var closed [][2]int
		for _, k := range ways(n) {
			closed = append(closed, [2]int{p[k[0]] + 1, p[k[1]] + 1})
			w.network.Set(p[k[0]]+1, p[k[1]]+1, f)
		}
		return &fault{fmt.Sprintf("%v %v", f, closed), func() bool { return w.network.Hits() > before }, func(context.Context) error { w.network.Heal(); return nil }}, nil
	}
}

// leaderApart cuts the voter off that leads partition 0, for longer than a client waits for an answer: others lead by then and acknowledge what clients send again, while all clients can still reach the one that led.
func leaderApart(w *world) (*fault, error) {
	leader, err := w.leader()
	if err != nil {
		return nil, err
	}
	before := w.network.Hits()
	for i := range w.cluster.Nodes {
		if other := i + 1; other != int(leader) {
			w.network.Set(int(leader), other, localstack.Swallowed)
			w.network.Set(other, int(leader), localstack.Swallowed)
		}
	}
	hold := time.Duration(4000+w.rng.IntN(4000)) * time.Millisecond // beside the usual one
	return &fault{fmt.Sprintf("%d, which leads, apart for %v longer,", leader, hold), func() bool { return w.network.Hits() > before }, func(ctx context.Context) error {
		sleep(ctx, hold)
		w.network.Heal()
		return nil
	}}, nil
}

// script makes the object store misbehave.
func script(s localstack.Step) func(*world) (*fault, error) {
	return func(w *world) (*fault, error) {
		before := w.store.Hits()
		w.store.Script(s)
		hold := time.Duration(w.rng.IntN(8)) * time.Second // beside the usual one: an upload is given up after deleteGrace
		return &fault{"the store", func() bool { return w.store.Hits() > before }, func(ctx context.Context) error {
			if s.Times == 0 {
				sleep(ctx, hold)
			}
			w.store.Script()
			return nil
		}}, nil
	}
}
