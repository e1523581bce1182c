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
	clocks  []string // files that say how wrong each voter's clock is; none if the program does not ask
	rng     *rand.Rand
	flips   map[string]int // how many bits of a voter's logs were changed, by its directory
	// leader is the voter that leads partition 0, from 1.
	leader func() (int32, error)
}

// fault is one that has begun. hit reports whether it has taken effect; heal undoes it and returns when the processes serve, its errors are those of a cluster that does not come back.
type fault struct {
	what string
	hit  func() bool
	heal func(context.Context) error
}

// nemesis brings a fault about; errUnavailable says that this machine cannot.
type nemesis struct {
	name  string
	begin func(*world) (*fault, error)
	// What it needs: so many voters (0 = three), disks of their own, clocks that can be wrong.
	voters      int
	disk, clock bool
	// proxies and netns: that its voters reach one another through proxies, or have networks of their own.
	proxies, netns bool
}

var nemeses = []nemesis{
	{name: "none", begin: none},
	{name: "kill", begin: kill(one)}, {name: "kill-majority", begin: kill(majority)}, {name: "kill-all", begin: kill(all)}, {name: "kill-leader", begin: killLeader},
	{name: "wipe", begin: wipe}, {name: "pause", begin: pause}, {name: "flap", begin: flap}, {name: "members", begin: members}, {name: "drain", begin: drain},

	{name: "power-cut", begin: powerCut(one, 1), disk: true}, {name: "power-cut-all", begin: powerCut(all, 1), disk: true}, {name: "power-cut-twice", begin: powerCut(all, 2), disk: true},
	{name: "frozen-disk", begin: frozen, disk: true}, {name: "flipped-log", begin: flipped("log")}, {name: "flipped-snapshot", begin: flipped("snap")},
	{name: "fsync-fails", begin: inject("fdatasync", "error=EIO:when=3+", true)}, {name: "fsync-slow", begin: inject("fdatasync", "delay_enter=100000", false)},
	{name: "write-fails", begin: inject("pwritev", "error=EIO:when=3+", true)}, {name: "disk-full", begin: inject("pwritev", "error=ENOSPC:when=3+", true)},
	{name: "killed-in-fsync", begin: inject("fdatasync", "signal=SIGKILL:when=3", true)}, {name: "killed-in-write", begin: inject("pwritev", "signal=SIGKILL:when=3", true)},

	{name: "clock", begin: clockJump(one), clock: true}, {name: "clock-two", begin: clockJump(majority), clock: true}, {name: "clock-all", begin: clockJump(all), clock: true},

	{name: "partition", begin: cut(localstack.Swallowed, apart), proxies: true}, {name: "partition-leader", begin: leaderApart, proxies: true}, {name: "partition-held", begin: cut(localstack.Held, apart), proxies: true},
	{name: "one-way", begin: cut(localstack.Swallowed, mute), proxies: true}, {name: "bridge", begin: cut(localstack.Swallowed, bridge), proxies: true}, {name: "ring", begin: cut(localstack.Swallowed, ring), voters: 5, proxies: true},
	{name: "netns-partition", begin: lose(apart), netns: true}, {name: "netns-one-way", begin: lose(mute), netns: true}, {name: "netns-bridge", begin: lose(bridge), netns: true},
	{name: "netns-cut", begin: unplug, netns: true},

	{name: "store-down", begin: script(localstack.Step{Reset: true})}, {name: "store-503", begin: script(localstack.Step{Status: 503, Code: "SlowDown"})},
	{name: "store-silent", begin: script(localstack.Step{Silent: true, Times: 3})}, {name: "store-flipped-put", begin: script(localstack.Step{Op: "put", Flip: 100, Times: 3})},
	{name: "store-lost-reply", begin: script(localstack.Step{Op: "put", Reset: true, Effect: true, Times: 5})},
	{name: "store-500-done", begin: script(localstack.Step{Op: "put", Status: 500, Code: "InternalError", Effect: true, Times: 5})},
	{name: "store-cut-get", begin: script(localstack.Step{Op: "get", Cut: 100, Times: 3})}, {name: "store-flipped-get", begin: script(localstack.Step{Op: "get", Flip: 100, Times: 3})},
	{name: "store-stalled-get", begin: script(localstack.Step{Op: "get", Stall: 100, Times: 2})}, {name: "store-whole-get", begin: script(localstack.Step{Op: "get", Whole: true, Times: 3})},
	{name: "store-vanished", begin: script(localstack.Step{Op: "get", Status: 404, Code: "NoSuchKey"})},
}

// How many of n voters a fault befalls.
func one(int) int        { return 1 }
func majority(n int) int { return n/2 + 1 }
func all(n int) int      { return n }

// victims are some of the voters, in a random order.
func (w *world) victims(count func(n int) int) (nodes []*localstack.Node, names string) {
	for _, i := range w.rng.Perm(len(w.cluster.Nodes))[:count(len(w.cluster.Nodes))] {
		nodes = append(nodes, w.cluster.Nodes[i])
		names += fmt.Sprintf(" %d", i+1)
	}
	return nodes, names
}

// hold is how long a fault lasts after it took effect: now and then longer than any patience of a voter or a client.
func (w *world) hold() time.Duration {
	if w.rng.IntN(8) == 0 {
		return time.Duration(3000+w.rng.IntN(9000)) * time.Millisecond
	}
	return time.Duration(200+w.rng.IntN(2000)) * time.Millisecond
}

func yes() bool                     { return true }
func nothing(context.Context) error { return nil }

func none(*world) (*fault, error) { return &fault{"nothing", yes, nothing}, nil }

func restart(ctx context.Context, nodes ...*localstack.Node) error {
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
func kill(count func(int) int) func(*world) (*fault, error) {
	return func(w *world) (*fault, error) {
		nodes, names := w.victims(count)
		return killed(nodes, names)
	}
}

func killed(nodes []*localstack.Node, names string) (*fault, error) {
	for _, n := range nodes {
		if err := n.Kill(); err != nil {
			return nil, err
		}
	}
	return &fault{"kill -9" + names, dead(nodes...), func(ctx context.Context) error { return restart(ctx, nodes...) }}, nil
}

func dead(nodes ...*localstack.Node) func() bool {
	return func() bool {
		for _, n := range nodes {
			if n.Alive() {
				return false
			}
		}
		return true
	}
}

// killLeader kills the voter that leads partition 0.
func killLeader(w *world) (*fault, error) {
	leader, err := w.leader()
	if err != nil {
		return nil, err
	}
	return killed(w.cluster.Nodes[leader-1:leader], fmt.Sprintf(" %d, which leads", leader))
}

// flap stops one voter after another for a little longer than an election takes: leaders change all the time.
func flap(w *world) (*fault, error) {
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
	return &fault{fmt.Sprintf("stop one after another from %d on", first+1), func() bool { return stops.Load() >= 3 }, func(context.Context) error {
		stop()
		return <-done
	}}, nil
}

const groups = 1 + shards // meta's too

// blank starts a voter whose disk was taken. It is in its place again when it votes in every group: another disk lost before that could be a majority's, which nothing survives.
func (w *world) blank(ctx context.Context, n *localstack.Node, id int, added func() error) error {
	joined := fmt.Sprintf(`"event":"voter.added","server":"%d.`, id)
	before := w.cluster.Said(joined)
	up := make(chan error, 1)
	go func() { up <- restart(ctx, n) }()
	if err := errors.Join(added(), <-up); err != nil {
		return err
	}
	if !until(ctx, func() bool { return w.cluster.Said(joined) >= before+groups }) {
		return fmt.Errorf("voter %d is not in every group %v after it lost its disk", id, patience)
	}
	return nil
}

// wipe kills a voter and takes its disk.
func wipe(w *world) (*fault, error) {
	i := w.rng.IntN(len(w.cluster.Nodes))
	n := w.cluster.Nodes[i]
	if err := errors.Join(n.Kill(), n.Wipe()); err != nil {
		return nil, err
	}
	return &fault{fmt.Sprintf("wipe %d", i+1), dead(n), func(ctx context.Context) error {
		return w.blank(ctx, n, i+1, func() error { return nil })
	}}, nil
}

// members removes a voter by its operator's command and adds it again, blank.
func members(w *world) (*fault, error) {
	i := w.rng.IntN(len(w.cluster.Nodes))
	n, other := w.cluster.Nodes[i], w.cluster.Nodes[(i+1)%len(w.cluster.Nodes)]
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	id := fmt.Sprint(i + 1)
	if out, err := other.Command(ctx, "members", "remove", id); err != nil {
		return nil, fmt.Errorf("%w: removing voter %s: %w\n%s", errStuck, id, err, out)
	}
	return &fault{"remove " + id, dead(n), func(ctx context.Context) error {
		if err := errors.Join(n.Kill(), n.Wipe()); err != nil {
			return err
		}
		return w.blank(ctx, n, i+1, func() (err error) {
			var out string
			if !until(ctx, func() bool { // it must have announced itself
				out, err = other.Command(ctx, "members", "add", id)
				return err == nil
			}) {
				err = fmt.Errorf("adding voter %s: %w\n%s", id, err, out)
			}
			return err
		})
	}}, nil
}

// drain moves every leadership away from a voter, and lets it lead again.
func drain(w *world) (*fault, error) {
	i := w.rng.IntN(len(w.cluster.Nodes))
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	if out, err := w.cluster.Nodes[i].Command(ctx, "drain", "--self"); err != nil {
		return nil, fmt.Errorf("%w: draining voter %d: %w\n%s", errStuck, i+1, err, out)
	}
	return &fault{fmt.Sprintf("drain %d", i+1), yes, func(ctx context.Context) error {
		if out, err := w.cluster.Nodes[i].Command(ctx, "undrain", fmt.Sprint(i+1)); err != nil {
			return fmt.Errorf("undraining voter %d: %w\n%s", i+1, err, out)
		}
		return nil
	}}, nil
}

// pause stops a voter while hogs take the processors, which go on for a while after it wakes.
func pause(w *world) (*fault, error) {
	i := w.rng.IntN(len(w.cluster.Nodes))
	pid := w.cluster.Nodes[i].PID
	var done atomic.Bool
	for range 2 * runtime.NumCPU() {
		go func() {
			for !done.Load() { // it is to take a processor
			}
		}()
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		done.Store(true)
		return nil, err
	}
	return &fault{fmt.Sprintf("pause %d", i+1), func() bool { return inState(pid, "T") > 0 }, func(context.Context) error {
		defer done.Store(true)
		return syscall.Kill(pid, syscall.SIGCONT)
	}}, nil
}

// inState counts a process's threads that the kernel has in this state.
func inState(pid int, state string) (n int) {
	tasks := fmt.Sprintf("/proc/%d/task", pid)
	entries, err := os.ReadDir(tasks)
	if err != nil {
		return 0
	}
	for _, e := range entries {
		b, err := os.ReadFile(fmt.Sprintf("%s/%s/stat", tasks, e.Name()))
		if err == nil && strings.Contains(string(b), ") "+state+" ") {
			n++
		}
	}
	return n
}

// clockJump moves the wall clocks of some voters by an hour to ten years, ahead or back.
func clockJump(count func(int) int) func(*world) (*fault, error) {
	return func(w *world) (*fault, error) {
		if w.clocks == nil {
			return nil, fmt.Errorf("%w: the program asks the machine for the time", errUnavailable)
		}
		jumps := []time.Duration{time.Hour, 3 * time.Hour, 24 * time.Hour, 400 * 24 * time.Hour, 3650 * 24 * time.Hour}
		by := jumps[w.rng.IntN(len(jumps))]
		if w.rng.IntN(3) == 0 {
			by = -by
		}
		n := len(w.cluster.Nodes)
		which := w.rng.Perm(n)[:count(n)]
		set := func(by time.Duration) (errs error) {
			for _, i := range which {
				errs = errors.Join(errs, os.WriteFile(w.clocks[i], []byte(by.String()), 0o600))
			}
			return errs
		}
		seen := func() bool {
			for _, i := range which {
				if b, _ := os.ReadFile(w.clocks[i] + ".seen"); string(b) != by.String() { // not there yet
					return false
				}
			}
			return true
		}
		what := ""
		for _, i := range which {
			what += fmt.Sprintf(" %d", i+1)
		}
		return &fault{fmt.Sprintf("the clocks of%s by %v", what, by), seen, func(context.Context) error { return set(0) }}, set(by)
	}
}
