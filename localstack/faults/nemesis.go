package main

import (
	"context"
	"errors"
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
	// leader is the voter that leads partition 0, from 1.
	leader func() (int32, error)
}

// nemesis brings a fault about; errUnavailable says that this machine cannot. hit reports whether it has taken effect; heal undoes it and returns when the processes serve, its errors
// are those of a cluster that does not come back.
type nemesis struct {
	name  string
	begin func(*world) (what string, hit func() bool, heal func(context.Context) error, err error)
}

var nemeses = []nemesis{{"none", none}, {"kill", kill(1)}, {"kill-majority", kill(2)}, {"kill-all", kill(3)}, {"kill-leader", killLeader}, {"wipe", wipe}, {"pause", pause}, {"flap", flap},
	{"fsync-fails", inject("fdatasync", "error=EIO:when=3+", true)}, {"fsync-slow", inject("fdatasync", "delay_enter=100000", false)}, {"write-fails", inject("pwritev", "error=EIO:when=3+", true)},
	{"disk-full", inject("pwritev", "error=ENOSPC:when=3+", true)}, {"killed-in-fsync", inject("fdatasync", "signal=SIGKILL:when=3", true)}, {"killed-in-write", inject("pwritev", "signal=SIGKILL:when=3", true)},
	{"partition", cut(localstack.Swallowed, func(a, b, c int) [][2]int { return [][2]int{{a, b}, {b, a}, {a, c}, {c, a}} })},
	{"partition-held", cut(localstack.Held, func(a, b, c int) [][2]int { return [][2]int{{a, b}, {b, a}, {a, c}, {c, a}} })},
	{"one-way", cut(localstack.Swallowed, func(a, b, c int) [][2]int { return [][2]int{{a, b}, {a, c}} })},
	{"bridge", cut(localstack.Swallowed, func(a, b, _ int) [][2]int { return [][2]int{{a, b}, {b, a}} })},
	{"store-down", script(localstack.Step{Reset: true})}, {"store-503", script(localstack.Step{Status: 503, Code: "SlowDown"})},
	{"store-silent", script(localstack.Step{Silent: true, Times: 3})}, {"store-flipped-put", script(localstack.Step{Op: "put", Flip: 100, Times: 3})},
	{"store-lost-reply", script(localstack.Step{Op: "put", Reset: true, Effect: true, Times: 5})}, {"store-500-done", script(localstack.Step{Op: "put", Status: 500, Code: "InternalError", Effect: true, Times: 5})},
	{"store-cut-get", script(localstack.Step{Op: "get", Cut: 100, Times: 3})}, {"store-flipped-get", script(localstack.Step{Op: "get", Flip: 100, Times: 3})},
	{"store-stalled-get", script(localstack.Step{Op: "get", Stall: 100, Times: 2})}, {"store-whole-get", script(localstack.Step{Op: "get", Whole: true, Times: 3})}}

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
	return func(w *world) (string, func() bool, func(context.Context) error, error) {
		return w.kill(w.rng.Perm(len(w.cluster.Nodes))[:count])
	}
}

func (w *world) kill(victims []int) (what string, hit func() bool, heal func(context.Context) error, err error) {
	var nodes []*localstack.Node
	for _, i := range victims {
		what += fmt.Sprintf(" %d", i+1)
		nodes = append(nodes, w.cluster.Nodes[i])
		if err := w.cluster.Nodes[i].Kill(); err != nil {
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

// killLeader kills the voter that leads partition 0.
func killLeader(w *world) (string, func() bool, func(context.Context) error, error) {
	leader, err := w.leader()
	if err != nil {
		return "", nil, nil, err
	}
	return w.kill([]int{int(leader) - 1})
}

// flap stops one voter after another for a little longer than an election takes: leaders change all the time.
func flap(w *world) (string, func() bool, func(context.Context) error, error) {
	ctx, stop := context.WithCancel(context.Background())
	var stops atomic.Int64
	done := make(chan error, 1)
	first := w.rng.IntN(len(w.cluster.Nodes))
	go func() {
		for i := first; ctx.Err() == nil; i++ {
			pid := w.cluster.Nodes[i%len(w.cluster.Nodes)].PID
			if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
				done <- err
				return
			}
			stops.Add(1)
			select {
			case <-time.After(900 * time.Millisecond):
			case <-ctx.Done():
			}
			if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	return fmt.Sprintf("stop one after another from %d on", first+1), func() bool { return stops.Load() >= 3 }, func(context.Context) error {
		stop()
		return <-done
	}, nil
}

// inject makes system calls of a voter's log fail or wait. It is started again if it ends of that.
func inject(call, expr string, ends bool) func(*world) (string, func() bool, func(context.Context) error, error) {
	return func(w *world) (string, func() bool, func(context.Context) error, error) {
		k := w.rng.IntN(len(w.cluster.Nodes))
		n := w.cluster.Nodes[k]
		trace, err := os.CreateTemp("", "estran-trace-")
		if err != nil {
			return "", nil, nil, err
		}
		forget := func() { _ = os.Remove(trace.Name()) } // it lies among temporary files
		if err := trace.Close(); err != nil {
			return "", nil, nil, err
		}
		i, err := localstack.Inject(n.PID, call, expr, trace.Name(), 2*patience)
		if err != nil {
			forget()
			if errors.Is(err, localstack.ErrNoInjection) {
				err = fmt.Errorf("%w: %w", errUnavailable, err)
			}
			return "", nil, nil, err
		}
		hit := func() bool { return i.Hits() > 0 }
		if ends {
			hit = func() bool { return !n.Alive() }
		}
		return fmt.Sprintf("%s of %d: %s", call, k+1, expr), hit, func(ctx context.Context) error {
			i.End()
			forget()
			if n.Alive() {
				return nil
			}
			return restart(ctx, []*localstack.Node{n})
		}, nil
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
