package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/estran/estran/localstack"
)

// powerCut takes the power from some voters at once, so many times in a row; between two they only just serve again.
func powerCut(count func(int) int, times int) func(*world) (*fault, error) {
	return func(w *world) (*fault, error) {
		nodes, names := w.victims(count)
		if err := diskless(w.cluster.CutPower(nodes...)); err != nil {
			return nil, err
		}
		return &fault{fmt.Sprintf("power of%s, %d times", names, times), dead(nodes...), func(ctx context.Context) error {
			for range times - 1 {
				if err := errors.Join(restart(ctx, nodes...), w.cluster.CutPower(nodes...)); err != nil {
					return err
				}
			}
			return restart(ctx, nodes...)
		}}, nil
	}
}

// diskless tells an error that says that there are no disks here from others.
func diskless(err error) error {
	if errors.Is(err, localstack.ErrNoDisk) {
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}
	return err
}

// frozen stops what a voter writes to its disk, for longer than others wait for it. It may end itself meanwhile, or of that.
func frozen(w *world) (*fault, error) {
	nodes, name := w.victims(one)
	n := nodes[0]
	if n.Disk == "" {
		return nil, fmt.Errorf("%w: %w", errUnavailable, localstack.ErrNoDisk)
	}
	if err := diskless(localstack.FreezeDisk(n.Disk)); err != nil {
		return nil, err
	}
	hold := time.Duration(w.rng.IntN(8)) * time.Second // beside the usual one
	return &fault{"freeze the disk of" + name, func() bool { return inState(n.PID, "D") > 0 }, func(ctx context.Context) error {
		sleep(ctx, hold)
		if err := localstack.ThawDisk(n.Disk); err != nil {
			return err
		}
		if n.Alive() && !strings.Contains(n.Tail(), "E_DISK_HUNG") {
			return nil
		}
		if !until(ctx, dead(n)) {
			return fmt.Errorf("voter%s says that its disk hangs and does not end in %v", name, patience)
		}
		return restart(ctx, n)
	}}, nil
}

// endsWithin is how long a voter may take to end once a call of its log has failed: it has 10 s to stop in good order.
const endsWithin = 15 * time.Second

// inject makes system calls of a voter's log fail or wait. It is started again if it ends of that.
func inject(call, expr string, ends bool) func(*world) (*fault, error) {
	return func(w *world) (*fault, error) {
		nodes, name := w.victims(one)
		n := nodes[0]
		trace, err := os.CreateTemp("", "estran-trace-")
		if err != nil {
			return nil, err
		}
		forget := func() { _ = os.Remove(trace.Name()) } // it lies among temporary files
		if err := trace.Close(); err != nil {
			return nil, err
		}
		i, err := localstack.Inject(n.PID, call, expr, trace.Name(), 2*patience)
		if err != nil {
			forget()
			if errors.Is(err, localstack.ErrNoInjection) {
				err = fmt.Errorf("%w: %w", errUnavailable, err)
			}
			return nil, err
		}
		hit := func() bool { return i.Hits() > 0 }
		if ends {
			hit = dead(n)
		}
		return &fault{fmt.Sprintf("%s of%s: %s", call, name, expr), hit, func(ctx context.Context) error {
			i.End()
			failed := i.Hits() > 0
			forget()
			for end := time.Now().Add(endsWithin); ends && failed && n.Alive() && time.Now().Before(end); {
				sleep(ctx, 10*time.Millisecond) // the last call that failed may be on its way
			}
			switch {
			case !n.Alive():
				return restart(ctx, n)
			case ends && failed:
				return fmt.Errorf("voter%s goes on though a call of its log has failed:\n%s", name, n.Tail())
			}
			return nil
		}}, nil
	}
}

// flipped kills a voter and changes one bit of what its disk holds: of a record among the last of a log, or of the newest snapshot. The voter starts and serves nothing wrong, or it
// refuses the directory; then it comes as a new one.
func flipped(what string) func(*world) (*fault, error) {
	return func(w *world) (*fault, error) {
		i := w.rng.IntN(len(w.cluster.Nodes))
		n := w.cluster.Nodes[i]
		if err := n.Kill(); err != nil {
			return nil, err
		}
		heal := func(ctx context.Context) error {
			err := restart(ctx, n)
			if err == nil || !strings.Contains(err.Error(), "E_DATA_DIR_CORRUPT") && !strings.Contains(err.Error(), "E_DATA_DIR_BEHIND") {
				return err
			}
			if err := n.Wipe(); err != nil {
				return err
			}
			return w.blank(ctx, n, i+1, func() error { return nil })
		}
		where, err := w.flip(n.Dir(), what)
		if err != nil {
			return nil, errors.Join(err, heal(context.Background()))
		}
		return &fault{fmt.Sprintf("a bit of %s of %d", where, i+1), dead(n), heal}, nil
	}
}

func (w *world) flip(dir, what string) (where string, err error) {
	files, err := filepath.Glob(filepath.Join(dir, "*", map[string]string{"log": "*.log", "snap": filepath.Join("snapshots", "*.snap")}[what]))
	if err != nil {
		return "", err
	}
	w.rng.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			return "", err
		}
		from, to := 0, len(b)
		if what == "log" {
			from, to = lastRecords(b)
		}
		if to <= from {
			continue
		}
		at := from + w.rng.IntN(to-from)
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return "", err
		}
		if what == "log" {
			w.flips[dir]++
		}
		_, err = f.WriteAt([]byte{b[at] ^ 1<<w.rng.IntN(8)}, int64(at))
		return fmt.Sprintf("%s at %d", name, at), errors.Join(err, f.Close())
	}
	return "", fmt.Errorf("%w: no %s holds anything", errUnavailable, what)
}

// lastBytes of a log file are what a flipped bit may lie in: the rest was freed long ago.
const lastBytes = 1 << 20

// lastRecords is where the last records of a log file lie (raftlog/FORMAT.md).
func lastRecords(b []byte) (from, to int) {
	const block, header = 4096, 76
	if len(b) < block {
		return 0, 0
	}
	generation := string(b[16:24])
	for at := block; at+header <= len(b) && string(b[at:at+4]) == "REC1" && string(b[at+8:at+16]) == generation; {
		at += header + int(binary.BigEndian.Uint32(b[at+52:])) + int(binary.BigEndian.Uint32(b[at+56:]))
		if to = min(at, len(b)); at+header > len(b) || string(b[at:at+4]) != "REC1" {
			at = (at + block - 1) / block * block
		}
	}
	return max(block, to-lastBytes), to
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
