package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/estran/estran/localstack"
)

// double is a store that runs as a process of its own, so that its work does not pass for the clients'.
type double struct {
	url string
	env []string
	in  io.Closer
	cmd *exec.Cmd
}

func startDouble(ctx context.Context, slow bool) (*double, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env, cmd.Stderr, cmd.SysProcAttr = append(os.Environ(), fmt.Sprintf("%s=%t", doubleEnv, slow)), os.Stderr, localstack.Leash()
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	d := &double{in: in, cmd: cmd}
	sc := bufio.NewScanner(out)
	if sc.Scan() {
		d.url = sc.Text()
	}
	for sc.Scan() && sc.Text() != "" {
		d.env = append(d.env, sc.Text())
	}
	if d.url == "" || ctx.Err() != nil {
		return nil, errors.Join(errors.New("the store's double ended at once"), ctx.Err(), d.close())
	}
	return d, nil
}

func (d *double) close() error { return errors.Join(d.in.Close(), d.cmd.Wait()) }

// doubleEnv makes this program the double, which ends when its input does.
const doubleEnv = "ESTRAN_BENCH_DOUBLE"

func runDouble(slow bool) error {
	d := localstack.NewDouble()
	defer d.Close()
	if slow {
		d.Delay = slowAsS3
	}
	if _, err := fmt.Printf("%s\n%s\n\n", d.URL("bench"), strings.Join(d.Env(), "\n")); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// slowAsS3 draws the time before a request's first byte comes back: log-normal with S3's p50 and p99.
func slowAsS3(op string) time.Duration {
	p50, p99 := 60.0, 150.0
	if op == "put" {
		p50, p99 = 120, 250
	}
	const z99 = 2.326 // standard deviations below which 99 % lie
	return time.Duration(p50 * math.Exp(rand.NormFloat64()*math.Log(p99/p50)/z99) * float64(time.Millisecond))
}
