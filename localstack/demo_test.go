package localstack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// demoRun is `estran demo` as a process.
type demoRun struct {
	cmd *exec.Cmd
	dir string

	mu     sync.Mutex
	out    bytes.Buffer
	voters []int // their processes
}

func (d *demoRun) Write(b []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.out.Write(b)
}

func (d *demoRun) text() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.out.String()
}

var voterLine = regexp.MustCompile(`voter \d+ .*pid (\d+)`)

// startDemo starts it; up waits until the voters serve.
func startDemo(t *testing.T, up bool, env []string, args ...string) *demoRun {
	t.Helper()
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	d := &demoRun{dir: t.TempDir()}
	ctx, cancel := context.WithTimeout(t.Context(), 2*waitMost)
	d.cmd = exec.CommandContext(ctx, p, append([]string{"demo", "--dir", d.dir}, args...)...)
	d.cmd.Env = append(os.Environ(), env...)
	d.cmd.Stdout, d.cmd.Stderr = d, d
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = d.cmd.Wait()
		for _, pid := range d.voters { // if the demo did not
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if t.Failed() {
			t.Log(d.text())
		}
	})
	if up {
		until(t, "the demo's start", func() bool { return strings.Contains(d.text(), "Ctrl-C to stop") })
		for _, m := range voterLine.FindAllStringSubmatch(d.text(), -1) {
			pid, _ := strconv.Atoi(m[1])
			d.voters = append(d.voters, pid)
		}
		if len(d.voters) != 3 {
			t.Fatalf("voters %v", d.voters)
		}
	}
	return d
}

// end waits for the demo and checks that it has left no processes, and files only after a failure; then it says where they are.
func (d *demoRun) end(t *testing.T) (code int) {
	t.Helper()
	err := d.cmd.Wait()
	if e, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || e.ExitCode() < 0) {
		t.Errorf("the demo's end: %v", err)
	}
	left, err := os.ReadDir(d.dir)
	code = d.cmd.ProcessState.ExitCode()
	switch failed := code != 0 && !strings.Contains(d.text(), "E_DEMO_INTERRUPTED"); {
	case err != nil || !failed && len(left) > 0:
		t.Errorf("it has left %v, %v", left, err)
	case failed && (len(left) != 1 || !strings.Contains(d.text(), "files kept: "+filepath.Join(d.dir, left[0].Name())+"\n")):
		t.Errorf("after a failure it has left %v, or does not say where", left)
	case failed:
		if logs, err := filepath.Glob(filepath.Join(d.dir, left[0].Name(), "*")); err != nil || len(logs) == 0 {
			t.Errorf("nothing was kept of a failure: %v", err)
		}
	}
	for _, m := range voterLine.FindAllStringSubmatch(d.text(), -1) { // those that were started again, too
		pid, _ := strconv.Atoi(m[1])
		until(t, fmt.Sprintf("process %d to end", pid), func() bool { return !running(pid) }) // one that was killed is not gone at once
	}
	return code
}

// running reports whether a process that is not this one's child does anything.
func running(pid int) bool {
	if syscall.Kill(pid, 0) != nil {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || !strings.Contains(string(stat), ") Z ") // one that nobody has waited for has ended
}

// The demo runs a whole cluster under load and through a kill, tells how it goes, finds every record, and leaves nothing.
func TestDemo(t *testing.T) {
	var missing []string
	for _, length := range []string{"6s", "60s"} { // on a busy machine a voter may not be back and nothing sealed before the first is over
		if missing = demoLines(t, length); len(missing) == 0 {
			return
		}
	}
	t.Errorf("no line is like one of %q", missing)
}

// demoLines runs a demo, which must be without fault, and returns what it should have told and did not.
func demoLines(t *testing.T, length string) (missing []string) {
	t.Helper()
	d := startDemo(t, true, []string{"ESTRAN_TIERING_SEAL_AGE=500ms"}, "--rate", "500kB/s", "--duration", length, "--kill-every", "2s")
	if code := d.end(t); code != 0 {
		t.Errorf("exit %d", code)
	}
	for _, w := range []string{
		`(?m)^estran demo .* 3 voters ready in \d+ ms$`,
		`(?m)^  voter 3   kafka 127\.0\.0\.1:\d+   metrics http://127\.0\.0\.1:\d+/metrics   pid \d+$`,
		`(?m)^  topic     demo, 6 partitions, 3 replicas; 500 kB/s `,
		`(?m)^t=\d+s produced=\S+B/s consumed=\S+B/s lag=\d+ ack_p50=\S+ms ack_p99=\S+ms objects=[1-9]\d* stored=\S+B voter1=\S+ voter2=\S+ voter3=\S+$`,
		`(?m)^t=\d+s .*=(\S+,)?meta[ ,\n]`,
		`(?m)^kill -9  voter \d \(pid \d+\), which led \S+$`,
		`(?m)^back     voter \d \(pid \d+\) after \S+s$`,
		`(?m)^summary   every acknowledged record was consumed exactly once, in order and unchanged$`,
		`(?m)^  records   [1-9],?\d+ sent, [1-9],?\d+ acknowledged, [1-9],?\d+ consumed and checked in \S+s; \S+ were given to the group again$`,
		`(?m)^  voters    killed [1-9]\d? times$`,
	} {
		if !regexp.MustCompile(w).MatchString(d.text()) {
			missing = append(missing, w)
		}
	}
	m := regexp.MustCompile(`records   (\S+) sent, (\S+) acknowledged, (\S+) consumed`).FindStringSubmatch(d.text())
	if m == nil || m[1] != m[2] || m[2] != m[3] {
		t.Errorf("records: %v", m)
	}
	return missing
}

// A record that the demo did not write ends it with a fault, while it runs.
func TestDemoFindsFaults(t *testing.T) {
	d := startDemo(t, true, nil, "--rate", "100kB/s")
	kafka := regexp.MustCompile(`voter 2 +kafka (\S+)`).FindStringSubmatch(d.text())[1]
	cmd := exec.CommandContext(t.Context(), d.cmd.Path, "topic", "produce", "demo", "-b", kafka)
	cmd.Stdin = strings.NewReader("of somebody else\n")
	out, err := cmd.CombinedOutput()
	if err != nil { // the demo may be gone before the record is acknowledged, but it has found it
		t.Logf("%v: %s", err, out)
	}
	if code := d.end(t); code != 1 || !strings.Contains(d.text(), "code:     E_DEMO_ALTERED") || !strings.Contains(d.text(), `"of somebody else"`) || !strings.Contains(d.text(), "FAILED") {
		t.Errorf("exit %d", code)
	}
}

// Voters that answer nothing cannot hold up the demo's end when it is interrupted twice; one interrupt waits for them.
func TestDemoInterrupted(t *testing.T) {
	d := startDemo(t, true, nil)
	for _, pid := range d.voters {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "records that wait", func() bool { return strings.Contains(d.text(), "produced=0B/s") })
	lines := strings.Count(d.text(), "\nt=")
	signal := func() {
		if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
	}
	signal()
	until(t, "the demo to go on after one interrupt", func() bool { return strings.Count(d.text(), "\nt=") > lines })
	signal()
	if code := d.end(t); code != 1 || !strings.Contains(d.text(), "E_DEMO_INTERRUPTED") {
		t.Errorf("exit %d", code)
	}
}

// One voter's own end is a fault, and so is a start that fails; nothing is left of the others.
func TestDemoVoterEnds(t *testing.T) {
	d := startDemo(t, true, nil)
	if err := syscall.Kill(d.voters[1], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := d.end(t); code != 1 || !regexp.MustCompile(`error: voter \d ended by itself`).MatchString(d.text()) || !strings.Contains(d.text(), "E_DEMO_VOTER") {
		t.Errorf("exit %d", code)
	}
	d = startDemo(t, false, []string{"ESTRAN_HOT_MAX_BYTES=1"})
	if code := d.end(t); code != 1 || !strings.Contains(d.text(), "hot.max_bytes: 1 B is below 64 MiB") || !strings.Contains(d.text(), "E_DEMO_VOTER") {
		t.Errorf("exit %d", code)
	}
}

// The voters end with a demo that is killed.
func TestDemoKilled(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux ends processes with the one that started them")
	}
	d := startDemo(t, true, nil)
	if err := d.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = d.cmd.Wait()
	until(t, "the voters' end", func() bool { return !running(d.voters[0]) && !running(d.voters[1]) && !running(d.voters[2]) })
}

// A port that was free when it was chosen and is taken when a voter wants it costs another attempt; a voter that cannot start ends the others.
func TestClusterPorts(t *testing.T) {
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for at := 3; at < 6; at++ { // the second voter's, whichever it is
		c := NewCluster(p, t.TempDir(), 3)
		attempts := 0
		c.ports = func(n int) ([]int, error) {
			ports, err := FreePorts(n)
			if attempts++; attempts == 1 && err == nil {
				ports[at] = taken.Addr().(*net.TCPAddr).Port
			}
			return ports, err
		}
		ctx, cancel := context.WithTimeout(t.Context(), waitMost)
		err := c.Start(ctx)
		cancel()
		if err != nil || attempts != 2 {
			t.Errorf("port %d: %d attempts, %v", at, attempts, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		for _, n := range c.Nodes {
			if n.Alive() {
				t.Error("a voter outlives its cluster")
			}
		}
	}
	c := NewCluster(filepath.Join(t.TempDir(), "none"), t.TempDir(), 3)
	if err := c.Start(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a program: %v", err)
	}
}
