package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"
)

// A node that does not stop after a fault is ended: it would keep its place and serve nobody.
func TestFaultEndsWhatDoesNotStop(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan int, 1)
	n := &node{cfg: &config{}, log: slog.New(slog.DiscardHandler), fatal: make(chan error, 1), kafka: l, end: func() {}, faultLimit: time.Millisecond, endProcess: func(code int) { ended <- code }}
	n.wg.Add(1) // what does not stop
	defer n.wg.Done()
	fault := errors.New("a fault")
	n.fatal <- fault
	if err := n.run(context.Background(), streams{err: io.Discard}); !errors.Is(err, fault) {
		t.Errorf("%v", err)
	}
	if code := <-ended; code == 0 {
		t.Error("the process ends as if all were well")
	}
}
