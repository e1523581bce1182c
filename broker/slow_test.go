package broker

import (
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// A fetch waits no longer than FetchWait, whatever the client says: the end of its connection is not seen before.
func TestFetchWaitIsBounded(t *testing.T) {
	w := start(t, func(c *Config) { c.FetchWait = 10 * time.Millisecond })
	w.topic(t, "t", 1, nil)
	r := fetchReq("t", 0)
	r.MaxWaitMillis, r.MinBytes = 1<<31-1, 1
	p := w.dial(t).ask(r, 11).(*kmsg.FetchResponse).Topics[0].Partitions[0]
	if p.ErrorCode != 0 || len(p.RecordBatches) != 0 {
		t.Errorf("%+v", p)
	}
}

// poor is a listener that has no descriptors left for its first connections.
type poor struct {
	net.Listener
	errs chan error
}

func (p poor) Accept() (net.Conn, error) {
	select {
	case err := <-p.errs:
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", err)}
	default:
		return p.Listener.Accept()
	}
}

// Connections that cannot be accepted for want of descriptors do not end the broker; another error does.
func TestAcceptFails(t *testing.T) {
	w := start(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := poor{l, make(chan error, 2)}
	p.errs <- syscall.EMFILE
	p.errs <- syscall.ENFILE
	served := make(chan error, 1)
	go func() { served <- w.s.Serve(p) }()
	c := (&whole{addr: l.Addr().String()}).dial(t)
	c.ask(kmsg.NewPtrApiVersionsRequest(), 0)
	p.errs <- syscall.EBADF
	(&whole{addr: l.Addr().String()}).dial(t) // the Accept that is under way ends
	if err := <-served; !errors.Is(err, syscall.EBADF) {
		t.Errorf("serve: %v", err)
	}
}
