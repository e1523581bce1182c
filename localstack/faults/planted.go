package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/estran/estran/localstack"
	"github.com/estran/estran/localstack/planted"
)

const (
	plantedSeeds = 3                // fresh ones for each mistake
	plantedTime  = 10 * time.Minute // in which each must be caught
)

// tempters are the faults among which a mistake is looked for, where most kinds have nothing to do with it: all others, and all together, would need hours.
var tempters = map[string]string{
	planted.PutUnchecked: "store-down,store-503,store-silent,none", planted.CRCSkipped: "store-flipped-get,store-flipped-put,none",
	planted.LocalClock: "clock,clock-two,clock-all,kill-leader,none", planted.NoFsync: "power-cut,power-cut-all,power-cut-twice,kill,none",
	planted.GuessedOutOfRange: leaderFaults, planted.EpochUnchecked: leaderFaults, planted.LeaderStartSkipped: leaderFaults,
	planted.LentPayloadKept: leaderFaults, planted.CommitIndexUnclamped: "pause,partition,partition-held,flap,kill-leader",
	planted.StockHeartbeat: "pause,flap,kill-leader", planted.VerifyLeaderAsProof: "partition-leader",
	planted.SnapshotShownEarly: rejoinFaults, planted.FreeOnHint: rejoinFaults, planted.DeleteRangeByMax: rejoinFaults,
}

const (
	leaderFaults = "kill-leader,pause,flap,frozen-disk,partition,partition-held,partition-leader,one-way,bridge,drain"
	rejoinFaults = "wipe,members,kill,kill-leader,pause,partition,flap,store-down,store-503,store-silent"
)

// window is a moment that is too rare for ten minutes and lasts longer in the build that is tried, while the mistake is made: `old` in a file of raft becomes `new`.
type window struct{ mistake, says, file, old, new string }

var windows = []window{
	// Where a heartbeat on another goroutine does harm (hashicorp/raft #695): without it, once in 800 pauses of a process.
	{planted.StockHeartbeat, "a leader waits 30 ms between looking at its state and at its term", "raft.go", "\tterm := r.getCurrentTerm()\n\tlastIndex := r.getLastIndex()\n\n\tn := len(applyLogs)\n",
		"\tif os.Getenv(\"ESTRAN_TEST_PLANTED\") == \"" + planted.StockHeartbeat + "\" {\n\t\tfor range 30 { // a longer wait would be over when a stopped process goes on\n\t\t\ttime.Sleep(time.Millisecond)\n\t\t}\n\t}\n" +
			"\tterm := r.getCurrentTerm()\n\tlastIndex := r.getLastIndex()\n\n\tn := len(applyLogs)\n"},
	// An answer that was on its way when it was asked counts, however late it comes: as if each were late by up to ten seconds, in which others have elected a leader. raft's own lease, which
	// is as long as an election, would end the leader first.
	{planted.VerifyLeaderAsProof, "heartbeats' answers are taken to be on their way for 10 s, and a lease lasts as long", "raft.go", "\t\tasyncNotifyCh(repl.notifyCh)\n\t}\n}\n\n// leadershipTransfer",
		"\t\tasyncNotifyCh(repl.notifyCh)\n\t\tif os.Getenv(\"ESTRAN_TEST_PLANTED\") == \"" + planted.VerifyLeaderAsProof + "\" && time.Since(repl.LastContact()) < 10*time.Second {\n\t\t\tgo repl.notifyAll(true)\n\t\t}\n\t}\n}\n\n// leadershipTransfer"},
	{planted.VerifyLeaderAsProof, "the same", "raft.go", "\tleaseTimeout := r.config().LeaderLeaseTimeout\n",
		"\tleaseTimeout := r.config().LeaderLeaseTimeout\n\tif os.Getenv(\"ESTRAN_TEST_PLANTED\") == \"" + planted.VerifyLeaderAsProof + "\" {\n\t\tleaseTimeout = 10 * time.Second\n\t}\n"},
}

// widens says how a mistake's window is widened; "" = it is not.
func widens(mistake string) string {
	for _, w := range windows {
		if w.mistake == mistake {
			return w.says
		}
	}
	return ""
}

// plant plays rounds against a program that makes one mistake at a time, and prints what caught it and when. An error says that one was not caught.
func plant(ctx context.Context, c config, names string, out io.Writer) error {
	mistakes, err := chooseMistakes(names)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "estran-planted-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	modfile, err := widened(ctx, c.module, dir)
	if err != nil {
		return err
	}
	if c.program, err = localstack.Build(ctx, c.module, dir, "-tags=planted", "-modfile="+modfile); err != nil {
		return err
	}
	c.clocks, c.foreign = true, false
	if err := control(ctx, c, run); err != nil { // its history is kept
		return err
	}
	c.keep = dir
	var missed []error
	fmt.Fprintln(out, "| mistake | seed | caught after | rounds | by | window |\n|---|---|---|---|---|---|")
	for _, m := range mistakes {
		for range plantedSeeds {
			c.seed++
			row, caught := try(ctx, c, m, run)
			fmt.Fprintln(out, row)
			if !caught {
				missed = append(missed, fmt.Errorf("%s is not caught with seed %d", m, c.seed))
			}
		}
	}
	return errors.Join(missed...)
}

// widened makes a go.mod for a build with a raft whose windows are wider.
func widened(ctx context.Context, module, dir string) (modfile string, err error) {
	const path = "github.com/hashicorp/raft"
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", path)
	cmd.Dir = module
	at, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("where raft's source is: %w", err)
	}
	copied := filepath.Join(dir, "raft")
	if err := os.CopyFS(copied, os.DirFS(strings.TrimSpace(string(at)))); err != nil {
		return "", err
	}
	for _, w := range windows {
		if err := w.open(copied); err != nil {
			return "", err
		}
	}
	mod, err := os.ReadFile(filepath.Join(module, "go.mod"))
	if err != nil {
		return "", err
	}
	sum, err := os.ReadFile(filepath.Join(module, "go.sum"))
	if err != nil {
		return "", err
	}
	modfile = filepath.Join(dir, "go.mod")
	return modfile, errors.Join(os.WriteFile(filepath.Join(dir, "go.sum"), sum, 0o600),
		os.WriteFile(modfile, append(mod, "\nreplace "+path+" => "+copied+"\n"...), 0o600))
}

// open changes raft's source in a directory.
func (w *window) open(dir string) error {
	name := filepath.Join(dir, w.file)
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	src := string(b)
	if strings.Count(src, w.old) != 1 {
		return fmt.Errorf("%s: this raft has no such place for %s", name, w.mistake)
	}
	src = strings.Replace(src, w.old, w.new, 1)
	if imports := "import (\n"; !strings.Contains(src, "\t\"os\"\n") {
		src = strings.Replace(src, imports, imports+"\t\"os\"\n", 1)
	}
	return errors.Join(os.Chmod(name, 0o600), os.WriteFile(name, []byte(src), 0o600))
}

func chooseMistakes(names string) ([]string, error) {
	if names == "all" {
		return planted.All, nil
	}
	out := strings.Split(names, ",")
	for _, n := range out {
		if !slices.Contains(planted.All, n) {
			return nil, fmt.Errorf("no mistake %q", n)
		}
	}
	return out, nil
}

// player is run, or stands for it in tests.
type player func(context.Context, config, io.Writer) (*result, error)

// control plays a life without a mistake: what catches one must have nothing to say of the same program without it.
func control(ctx context.Context, c config, play player) error {
	c.rounds, c.perLife = 3, 3
	r, err := play(ctx, c, io.Discard)
	if err == nil && r.Anomalies > 0 {
		err = fmt.Errorf("anomalies without a mistake: %s", rules(r.Found))
	}
	return err
}

// try plays lives until the mistake is caught or its time is over. Only a rule of the checker or a cluster that does not come back catches; an error of another kind is shown and catches
// nothing.
func try(ctx context.Context, c config, mistake string, play player) (row string, caught bool) {
	ctx, cancel := context.WithTimeout(ctx, plantedTime)
	defer cancel()
	c.env = []string{"ESTRAN_TEST_PLANTED=" + mistake}
	if c.nemeses == "" {
		c.nemeses = tempters[mistake]
	}
	c.rounds, c.perLife = 5, 5 // a history is checked when its life ends
	seed, rounds, began := c.seed, 0, time.Now()
	for ; ctx.Err() == nil; c.seed += 1000 {
		r, err := play(ctx, c, io.Discard)
		rounds += r.Rounds + r.Skipped
		took := time.Since(began).Round(time.Second)
		switch {
		case ctx.Err() != nil:
		case err != nil && !errors.Is(err, errStuck):
			return fmt.Sprintf("| %s | %d | error after %v | %d | %s | %s |", mistake, seed, took, rounds, strings.ReplaceAll(err.Error(), "\n", " "), widens(mistake)), false
		case r.Anomalies > 0:
			return fmt.Sprintf("| %s | %d | %v | %d | %s | %s |", mistake, seed, took, rounds, rules(r.Found), widens(mistake)), true
		}
	}
	return fmt.Sprintf("| %s | %d | **not in %v** | %d | | %s |", mistake, seed, plantedTime, rounds, widens(mistake)), false
}

func rules(found map[string]int) string {
	var out []string
	for rule, n := range found {
		out = append(out, fmt.Sprintf("%s %d", rule, n))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}
