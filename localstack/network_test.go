package localstack

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"
)

// What a network promises: bytes that are held arrive later and whole, those that are swallowed never do, each way for itself; a delay delays; a connection to nobody ends.
func TestNetwork(t *testing.T) {
	n := NewNetwork()
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	addr, err := n.Proxy(1, 2, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	dial := func() (one, two net.Conn) {
		t.Helper()
		one, err := net.Dial("tcp", addr)
		if err == nil {
			two, err = l.Accept()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = one.Close(), two.Close() })
		return one, two
	}
	say := func(c net.Conn, s string) {
		t.Helper()
		if _, err := io.WriteString(c, s); err != nil {
			t.Fatal(err)
		}
	}
	hear := func(c net.Conn, want string) {
		t.Helper()
		b := make([]byte, len(want))
		_ = c.SetReadDeadline(time.Now().Add(waitMost))
		if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
			t.Fatalf("%q, want %q: %v", b, want, err)
		}
	}
	silent := func(c net.Conn) {
		t.Helper()
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)) // nothing may come: there is no event to wait for
		if k, err := c.Read(make([]byte, 1)); k > 0 || err == io.EOF {
			t.Fatalf("%d bytes came, %v", k, err)
		}
	}
	one, two := dial()
	say(one, "a")
	hear(two, "a")
	n.Set(1, 2, Held)
	say(one, "b")
	say(two, "c")
	hear(one, "c") // the other way is open
	silent(two)
	n.Set(1, 2, Open)
	hear(two, "b")
	n.Set(2, 1, Swallowed)
	say(two, "d")
	say(one, "e")
	hear(two, "e")
	silent(one)
	n.Heal()
	_ = one.SetReadDeadline(time.Now().Add(waitMost))
	if _, err := one.Read(make([]byte, 1)); err == nil {
		t.Error("a connection that has lost bytes goes on")
	}
	one, two = dial()
	n.Delay(1, 2, 100*time.Millisecond)
	began := time.Now()
	for i := range 100 { // all at once: the delays do not add up to anything that a read would not wait for
		say(one, fmt.Sprintf("%03d", i))
	}
	for i := range 100 {
		hear(two, fmt.Sprintf("%03d", i))
	}
	if d := time.Since(began); d < 100*time.Millisecond {
		t.Errorf("delayed by %s", d)
	}
	_ = l.Close()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return // the reset was faster
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(waitMost))
	if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("a connection to nobody: %v", err)
	}
}

func isTimeout(err error) bool {
	e, ok := err.(net.Error)
	return ok && e.Timeout()
}
