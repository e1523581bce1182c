package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/estran/estran/localstack"
)

// world is what a nemesis may harm.
type world struct {
	cluster *localstack.Cluster
	network *localstack.Network
	store   *localstack.Double
	rng     *rand.Rand
}

// nemesis brings a fault about; errUnavailable says that this machine cannot. hit reports whether it has taken effect; heal undoes it and returns when the processes serve, its errors
// are those of a cluster that does not come back.
type nemesis struct {
	name  string
	begin func(*world) (what string, hit func() bool, heal func(context.Context) error, err error)
}

var nemeses = []nemesis{{"none", none}, {"kill", kill(1)}, {"kill-majority", kill(2)}, {"kill-all", kill(3)}, {"wipe", wipe}, {"pause", pause},
	{"partition", cut(localstack.Swallowed, func(a, b, c int) [][2]int { return [][2]int{{a, b}, {b, a}, {a, c}, {c, a}} })},
	{"partition-held", cut(localstack.Held, func(a, b, c int) [][2]int { return [][2]int{{a, b}, {b, a}, {a, c}, {c, a}} })},
	{"one-way", cut(localstack.Swallowed, func(a, b, c int) [][2]int { return [][2]int{{a, b}, {a, c}} })},
	{"bridge", cut(localstack.Swallowed, func(a, b, _ int) [][2]int { return [][2]int{{a, b}, {b, a}} })},
	{"store-down", script(localstack.Step{Reset: true})}, {"store-503", script(localstack.Step{Status: 503, Code: "SlowDown"})},
	{"store-silent", script(localstack.Step{Silent: true, Times: 3})}, {"store-flipped-put", script(localstack.Step{Op: "put", Flip: 100, Times: 3})},
	{"store-lost-reply", script(localstack.Step{Op: "put", Reset: true, Effect: true, Times: 5})}}

func none(*world) (string, func() bool, func(context.Context) error, error) {
	return "nothing", func() bool { return true }, func(context.Context) error { return nil }, nil
}

func restart(ctx context.Context, nodes []*localstack.Node) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			if err := n.Start(ctx); err != nil {
				fail(err)
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// kill -9 so many voters at once.
func kill(count int) func(*world) (string, func() bool, func(context.Context) error, error) {
	return func(w *world) (what string, hit func() bool, heal func(context.Context) error, err error) {
		var nodes []*localstack.Node
		for _, i := range w.rng.Perm(len(w.cluster.Nodes))[:count] {
			what += fmt.Sprintf(" %d", i+1)
			nodes = append(nodes, w.cluster.Nodes[i])
		}
		for _, n := range nodes {
			if err := n.Kill(); err != nil {
				return what, nil, nil, err
			}
		}
		dead := func() bool {
			for _, n := range nodes {
				if n.Alive() {
					return false
				}
			}
			return true
		}
		return "kill -9" + what, dead, func(ctx context.Context) error { return restart(ctx, nodes) }, nil
	}
}

const groups = 1 + shards // meta's too

// wipe kills a voter and takes its disk. It is healed when the new one votes in every group: another disk lost before that would be a majority's, which nothing survives.
func wipe(w *world) (string, func() bool, func(context.Context) error, error) {
	i := w.rng.IntN(len(w.cluster.Nodes))
	n, added := w.cluster.Nodes[i], fmt.Sprintf(`"event":"voter.added","server":"%d.`, i+1)
	before := w.cluster.Said(added)
	err := n.Kill()
	if err == nil {
		err = n.Wipe()
	}
	return fmt.Sprintf("wipe %d", i+1), func() bool { return !n.Alive() }, func(ctx context.Context) error {
		if err := restart(ctx, []*localstack.Node{n}); err != nil {
			return err
		}
		if !until(func() bool { return w.cluster.Said(added) >= before+groups }) {
			return fmt.Errorf("voter %d is not in every group %v after it was wiped", i+1, patience)
		}
		return nil
	}, err
}

// pause stops a voter while hogs take the processors, which go on for a while after it wakes.
func pause(w *world) (string, func() bool, func(context.Context) error, error) {
	i := w.rng.IntN(len(w.cluster.Nodes))
	pid := w.cluster.Nodes[i].PID
	stopped := func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err == nil && strings.Contains(string(b), ") T ")
	}
	var done atomic.Bool
	for range 2 * runtime.NumCPU() {
		go func() {
			for !done.Load() { // it is to take a processor
			}
		}()
	}
	err := syscall.Kill(pid, syscall.SIGSTOP)
	done.Store(err != nil)
	return fmt.Sprintf("pause %d", i+1), stopped, func(context.Context) error {
		defer done.Store(true)
		return syscall.Kill(pid, syscall.SIGCONT)
	}, err
}

// cut closes ways between three voters in a random order.
func cut(f localstack.Fault, ways func(a, b, c int) [][2]int) func(*world) (string, func() bool, func(context.Context) error, error) {
	return func(w *world) (string, func() bool, func(context.Context) error, error) {
		p, before := w.rng.Perm(3), w.network.Hits()
		all := ways(p[0]+1, p[1]+1, p[2]+1)
		for _, k := range all {
			w.network.Set(k[0], k[1], f)
		}
		return fmt.Sprintf("%v %v", f, all), func() bool { return w.network.Hits() > before }, func(context.Context) error { w.network.Heal(); return nil }, nil
	}
}

// script makes the object store misbehave.
func script(s localstack.Step) func(*world) (string, func() bool, func(context.Context) error, error) {
	return func(w *world) (string, func() bool, func(context.Context) error, error) {
		before := w.store.Hits()
		w.store.Script(s)
		return "the store", func() bool { return w.store.Hits() > before }, func(context.Context) error { w.store.Script(); return nil }, nil
	}
}

// hold is how long a fault lasts after it took effect.
func (w *world) hold() time.Duration { return time.Duration(200+w.rng.IntN(2000)) * time.Millisecond }
