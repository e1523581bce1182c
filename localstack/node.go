package localstack

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// insecure trusts any certificate: it only asks a store of this machine whether it is ready.
func insecure() *http.Transport {
	return &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
}

// Node is an Estran voter that runs as a process.
type Node struct {
	Kafka, HTTP string // addresses, known when it is ready
	Peer        string // of the peer listener; "127.0.0.1:0" unless it is one of several voters
	PID         int
	Disk        string // where the disk of its own is mounted that its data lie on; "" = it has none
	// Log receives every line that the process writes; it may be nil.
	Log func(line string)

	program string
	dir     string
	args    []string
	env     []string
	http    string               // to listen on
	attr    *syscall.SysProcAttr // of the process; it may be nil
	enter   []string             // the command that the process is started by, where it is not to run here
	cmd     *exec.Cmd
	done    chan struct{}
	err     error
	mu      sync.Mutex
	lines   []string
}

// Build builds the estran program from the module that contains dir, and returns its path.
func Build(ctx context.Context, dir, out string, flags ...string) (string, error) {
	path := filepath.Join(out, "estran")
	cmd := exec.CommandContext(ctx, "go", append(append([]string{"build"}, flags...), "-o", path, "./cmd/estran")...)
	cmd.Dir = dir
	if msg, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("localstack: building estran: %w\n%s", err, msg)
	}
	return path, nil
}

// anyPort is where a node listens that nobody has to find again.
const anyPort = "127.0.0.1:0"

// NewNode describes a voter with its data in dir. args are added to `estran serve`, env to the environment.
func NewNode(program, dir string, env []string, args ...string) *Node {
	return &Node{program: program, dir: dir, env: env, Kafka: anyPort, Peer: anyPort, http: anyPort, args: args}
}

// ready is the log line that says a node serves.
type ready struct {
	Event, Kafka, HTTP string
}

// Start starts the process and returns when it serves. A later Start uses the same Kafka port, which no connection gets in between.
func (n *Node) Start(ctx context.Context) error {
	if n.Kafka == anyPort {
		ports, err := FreePorts(1)
		if err != nil {
			return err
		}
		n.Kafka = fmt.Sprintf("127.0.0.1:%d", ports[0])
	}
	args := append([]string{"serve", "--data-dir", n.dir, "--kafka-listen", n.Kafka, "--http-listen", n.http, "--peer-listen", n.Peer}, n.args...)
	line := append(append(slices.Clone(n.enter), n.program), args...)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env, cmd.SysProcAttr = append(os.Environ(), n.env...), n.attr
	pipe, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("localstack: starting estran: %w", err)
	}
	n.cmd, n.PID, n.done = cmd, cmd.Process.Pid, make(chan struct{})
	up := make(chan ready, 1)
	go n.follow(pipe, up, n.done)
	select {
	case r := <-up:
		n.Kafka, n.HTTP = r.Kafka, r.HTTP
		return nil
	case <-n.done:
		return fmt.Errorf("localstack: estran ended at once: %w\n%s", n.err, n.Tail())
	case <-ctx.Done():
		return errors.Join(ctx.Err(), n.end(syscall.SIGQUIT)) // it says what it waits for
	}
}

func (n *Node) follow(pipe io.Reader, up chan<- ready, done chan struct{}) {
	sc := bufio.NewScanner(pipe)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := sc.Text()
		n.mu.Lock()
		if n.lines = append(n.lines, line); len(n.lines) > 200 {
			n.lines = n.lines[100:]
		}
		n.mu.Unlock()
		if n.Log != nil {
			n.Log(line)
		}
		var r ready
		if json.Unmarshal([]byte(line), &r) == nil && r.Event == "server.ready" {
			select {
			case up <- r:
			default:
			}
		}
	}
	n.err = n.cmd.Wait()
	close(done)
}

// Tail returns the last lines that the process wrote.
func (n *Node) Tail() (out string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range n.lines[max(0, len(n.lines)-40):] {
		out += l + "\n"
	}
	return out
}

// Kill ends the process at once, as a crash would.
func (n *Node) Kill() error { return n.end(syscall.SIGKILL) }

// Stop drains the process and returns its exit error.
func (n *Node) Stop() error {
	if err := n.end(syscall.SIGTERM); err != nil {
		return err
	}
	return n.err
}

func (n *Node) end(sig syscall.Signal) error {
	if n.cmd == nil {
		return nil
	}
	return endProcess(n.cmd, n.done, sig, 60*time.Second)
}

// Wipe removes the data of a process that has ended.
func (n *Node) Wipe() error { return os.RemoveAll(n.dir) }

// Dir is its data directory.
func (n *Node) Dir() string { return n.dir }

// Command runs `estran cluster …` against the node and returns what it prints.
func (n *Node) Command(ctx context.Context, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, n.program, append(append([]string{"cluster"}, args...), "--http", n.HTTP)...).CombinedOutput()
	return string(out), err
}

// Metric is the sum of the samples that a node's metrics have whose lines begin with the first of parts and contain the others.
func (n *Node) Metric(ctx context.Context, parts ...string) (sum float64, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.HTTP+"/metrics", nil)
	if err != nil {
		return 0, fmt.Errorf("localstack: %w", err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("localstack: %w", err)
	}
	defer resp.Body.Close()
	sc := bufio.NewScanner(resp.Body)
	for sc.Scan() {
		line := sc.Text()
		if !strings.HasPrefix(line, parts[0]) || slices.ContainsFunc(parts[1:], func(p string) bool { return !strings.Contains(line, p) }) {
			continue
		}
		v, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
		if err != nil {
			return 0, fmt.Errorf("localstack: %s: %w", line, err)
		}
		sum += v
	}
	return sum, sc.Err()
}

// Done is closed when the process that the last Start started has ended.
func (n *Node) Done() <-chan struct{} { return n.done }

// Alive reports whether the process runs.
func (n *Node) Alive() bool {
	select {
	case <-n.done:
		return false
	default:
		return true
	}
}
