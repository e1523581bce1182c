package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"
)

// The demo's check tells records that were lost, altered or repeated from those that are as they were sent, and knows one that it was given twice.
func TestDemoCheck(t *testing.T) {
	other := newDemoCheck(2)
	for _, c := range []struct {
		name string
		get  func(c *demoCheck) error // after records 0 and 1 of partition 3
		code string
	}{
		{"in order", func(c *demoCheck) error { return c.consumed(3, 2, c.value(3, 2)) }, ""},
		{"given again", func(c *demoCheck) error { return c.consumed(3, 0, c.value(3, 0)) }, ""},
		{"altered", func(c *demoCheck) error { return c.consumed(3, 2, append(c.value(3, 2)[:998], `!}`...)) }, "E_DEMO_ALTERED"},
		{"cut", func(c *demoCheck) error { return c.consumed(3, 2, c.value(3, 2)[:40]) }, "E_DEMO_ALTERED"},
		{"foreign", func(c *demoCheck) error { return c.consumed(3, 2, other.value(3, 2)) }, "E_DEMO_ALTERED"},
		{"of no partition", func(c *demoCheck) error { return c.consumed(3, 2, c.value(77, 2)) }, "E_DEMO_ALTERED"},
		{"of another partition", func(c *demoCheck) error { return c.consumed(3, 2, c.value(4, 2)) }, "E_DEMO_ALTERED"},
		{"repeated", func(c *demoCheck) error { return c.consumed(3, 2, c.value(3, 1)) }, "E_DEMO_REPEATED"},
		{"another one at an offset that was seen", func(c *demoCheck) error { return c.consumed(3, 0, c.value(3, 1)) }, "E_DEMO_LOST"},
		{"lost, the next in its place", func(c *demoCheck) error { return c.consumed(3, 2, c.value(3, 3)) }, "E_DEMO_LOST"},
		{"lost, its offset too", func(c *demoCheck) error { return c.consumed(3, 4, c.value(3, 4)) }, "E_DEMO_LOST"},
		{"the last one lost", (*demoCheck).missing, "E_DEMO_LOST"},
	} {
		t.Run(c.name, func(t *testing.T) {
			check := newDemoCheck(1)
			for i := range int64(3) {
				if got := check.next(3); !bytes.Equal(got, check.value(3, i)) || len(got) != demoSize {
					t.Fatalf("record %d: %s", i, got)
				}
				check.acknowledged(3, time.Millisecond)
				if i < 2 {
					if err := check.consumed(3, i, check.value(3, i)); err != nil {
						t.Fatal(err)
					}
				}
			}
			if check.done() {
				t.Error("done without the last record")
			}
			err := c.get(check)
			f, _ := errors.AsType[*fault](err)
			switch {
			case c.code == "" && err != nil:
				t.Errorf("a fault: %v", err)
			case c.code != "" && (f == nil || f.Code != c.code || !strings.Contains(f.What, "partition 3")):
				t.Errorf("%v is not %s", err, c.code)
			}
			if check.done() != (c.name == "in order") {
				t.Errorf("done: %t", check.done())
			}
			if again := int64(strings.Count(c.name, "again")); check.again != again {
				t.Errorf("%d were given again, want %d", check.again, again)
			}
		})
	}
	check := newDemoCheck(1)
	check.next(0)
	check.trouble(errors.New("no leader"))
	if f, _ := errors.AsType[*fault](check.missing()); f == nil || f.Code != "E_DEMO_UNACKED" || len(f.Notes) != 1 || check.done() {
		t.Errorf("without an acknowledgement: %+v", f)
	}
}

// The histogram tells quantiles to a twentieth.
func TestDemoLatencies(t *testing.T) {
	var l latencies
	if got := l.quantile(0.5); got != "-" {
		t.Errorf("of nothing: %s", got)
	}
	for i := range 100 {
		l.add(time.Duration(i+1) * time.Millisecond)
	}
	l.add(1000 * time.Hour)
	l.add(-1)
	for q, want := range map[float64][]string{0.5: {"48ms", "49ms", "50ms", "51ms", "52ms"}, 0.05: {"4.8ms", "4.9ms", "5.0ms", "5.1ms", "5.2ms"}, 0.001: {"0.0ms"}} {
		if got := l.quantile(q); !strings.Contains(strings.Join(want, " "), got) {
			t.Errorf("quantile %g: %s, want one of %v", q, got, want)
		}
	}
}

// What the demo cannot do is refused before anything starts.
func TestDemoUsage(t *testing.T) {
	t.Setenv("ESTRAN_STORAGE_URL", "mem://")
	code, out, errOut := cli(t, "", "demo", "--nodes", "2", "--rate", "1B/s", "--kill-every", "1ms", "--duration", "-1s")
	if code != exitUsage || out != "" {
		t.Errorf("exit %d: %s", code, out)
	}
	for _, w := range []string{"--nodes 2", "--rate", "--kill-every 1ms", "--duration -1s", "ESTRAN_STORAGE_URL is set"} {
		if !strings.Contains(errOut, "error: "+w) {
			t.Errorf("the message lacks %q:\n%s", w, errOut)
		}
	}
}
