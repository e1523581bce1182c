package broker

import (
	"errors"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/estran/estran/tiering/record"
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

// A transfer that hardly moves ends when others wait for the memory that it holds, not before; whatever happens it ends in time.
func TestSlowTransfers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(1)
		x := b.transfer(10*slowest, 10*time.Second)
		on := func(n int, want bool) {
			t.Helper()
			time.Sleep(time.Until(x.next()))
			if got := x.goesOn(n); got != want {
				t.Errorf("%d bytes: it goes on: %v, want %v", n, got, want)
			}
		}
		on(0, true)
		b.waiting.Add(1)
		on(slowest, true)
		on(2*slowest+10, true)
		on(3*slowest, true)    // slow
		on(4*slowest, true)    // not any more
		on(5*slowest-1, true)  // slow
		on(6*slowest-2, false) // again
		b.waiting.Add(-1)
		for range 12 {
			on(6*slowest, true)
		}
		on(9*slowest, false)
	})
}

// tardy is a connection to a quick client, in a process that gets no processor for two seconds behind setting a deadline, the first time: the call then ends by it, whatever there is.
type tardy struct {
	net.Conn
	end time.Time
	was bool
}

func (c *tardy) SetReadDeadline(at time.Time) error  { c.end = at; return nil }
func (c *tardy) SetWriteDeadline(at time.Time) error { c.end = at; return nil }

func (c *tardy) call(b []byte) (int, error) {
	if !c.was {
		c.was = true
		time.Sleep(2 * look)
	}
	if !time.Now().Before(c.end) {
		return 0, os.ErrDeadlineExceeded
	}
	return len(b), nil
}

func (c *tardy) Read(b []byte) (int, error)  { return c.call(b) }
func (c *tardy) Write(b []byte) (int, error) { return c.call(b) }

// A broker that is late itself does not take its clients for slow, though others wait.
func TestLateBrokerCutsNobodyOff(t *testing.T) {
	s := memoryServer(t)
	for _, b := range []*budget{s.frames, s.answers} {
		b.waiting.Add(1)
	}
	synctest.Test(t, func(t *testing.T) {
		if err := newConn(s, &tardy{}, "").readFrame(make([]byte, 1000)); err != nil {
			t.Errorf("a frame: %v", err)
		}
		if err := newConn(s, &tardy{}, "").writeAll(net.Buffers{make([]byte, 1000)}, 1000); err != nil {
			t.Errorf("an answer: %v", err)
		}
	})
}

// One client sends a frame that takes the whole budget, and stops in the middle of it; another reads none of its answers. A third is served all the same.
func TestOneSlowClientStopsNobody(t *testing.T) {
	w := start(t, func(c *Config) { c.FrameBudget, c.ResponseBudget = 1<<20, answerShare<<20 })
	w.topic(t, "t", 1, nil)
	c := w.dial(t)
	for range 2 {
		c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, strings.Repeat("x", 900_000))), 9)
	}
	large := fetchReq("t", 0)
	large.MaxBytes, large.Topics[0].Partitions[0].PartitionMaxBytes = 1<<30, 1<<30
	for range 2 * answerShare {
		deaf := w.dial(t)
		for range 20 { // together more than the kernel takes
			deaf.send(deaf.encode(large, 11))
		}
	}
	half := w.dial(t)
	half.send(append(frame(make([]byte, 1<<20))[:4], 0, 0, 0, 9))
	half.send(make([]byte, 1000))
	p := c.ask(produceReq("t", -1, batchBytes(t, record.CodecNone, "y")), 9).(*kmsg.ProduceResponse).Topics[0].Partitions[0]
	if p.ErrorCode != 0 || p.BaseOffset != 2 {
		t.Errorf("%+v", p)
	}
	if f := c.ask(large, 11).(*kmsg.FetchResponse).Topics[0].Partitions[0]; f.ErrorCode != 0 || len(f.RecordBatches) < 900_000 {
		t.Errorf("code %d, %d bytes", f.ErrorCode, len(f.RecordBatches))
	}
}
