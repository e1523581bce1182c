package localstack

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ErrNoInjection: system calls cannot be tampered with here.
var ErrNoInjection = errors.New("localstack: system calls cannot be tampered with here")

// Injection is strace at work on a process.
type Injection struct {
	trace  string
	cancel context.CancelFunc
	done   chan struct{}
}

// Inject makes a system call of a process fail, wait or be interrupted from now on, as strace's expression says, until End, or at most for limit. trace is a file for what strace writes. It returns once strace has
// attached; an error that wraps ErrNoInjection says that there is no strace, or that it may not.
func Inject(pid int, call, expr, trace string, limit time.Duration) (*Injection, error) {
	path, err := exec.LookPath("strace")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoInjection, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	cmd := exec.CommandContext(ctx, path, "-f", "-p", strconv.Itoa(pid), "-o", trace, "-e", "trace="+call, "-e", "inject="+call+":"+expr)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it lets the process go
	cmd.WaitDelay = 10 * time.Second
	pipe, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, err
	}
	i := &Injection{trace: trace, cancel: cancel, done: make(chan struct{})}
	said := make(chan string, 1)
	go func() {
		defer close(i.done)
		for sc := bufio.NewScanner(pipe); sc.Scan(); {
			select {
			case said <- sc.Text():
			default:
			}
		}
		_ = cmd.Wait() // killed by us, or over with the process
	}()
	var line string
	select {
	case line = <-said:
	case <-i.done:
	}
	if !strings.Contains(line, "attached") {
		i.End()
		return nil, fmt.Errorf("%w: %s", ErrNoInjection, line)
	}
	return i, nil
}

// Hits is how many calls were tampered with so far.
func (i *Injection) Hits() int {
	b, err := os.ReadFile(i.trace)
	if err != nil {
		return 0
	}
	return bytes.Count(b, []byte("(INJECTED")) + bytes.Count(b, []byte("(DELAYED)"))
}

// End lets the process go and returns when strace has ended.
func (i *Injection) End() {
	i.cancel()
	<-i.done
}
