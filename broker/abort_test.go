package broker

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
)

// stuckReader never answers, as a disk that hangs: not even a context ends it.
type stuckReader struct {
	hotReader
	entered, disk chan struct{}
}

func (r stuckReader) Read(context.Context, record.TopicPartition, record.Offset, tiering.Limits) (tiering.Result, error) {
	r.entered <- struct{}{}
	<-r.disk
	return tiering.Result{}, tiering.ErrOutOfRange
}

// A request is stuck for ever: the client still sees its connection end, and Abort returns.
func TestAbortWaitsForNothing(t *testing.T) {
	w := start(t, nil)
	w.topic(t, "t", 1, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Registerer = prometheus.NewRegistry()
	r := stuckReader{hotReader{w.Host}, make(chan struct{}, 10), make(chan struct{})}
	s := NewServer(cfg, w.Host, r)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	c := (&whole{addr: l.Addr().String()}).dial(t)
	c.send(c.encode(fetchReq("t", 0), 11))
	<-r.entered
	s.Abort()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection did not end: %v", err)
	}
	if err := <-served; !errors.Is(err, ErrServerClosed) {
		t.Errorf("serve: %v", err)
	}
	close(r.disk)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
