package localstack

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// What voters have written is found wherever it stands at the beginning of a line, each time, and no further than asked.
func TestAfter(t *testing.T) {
	c := &Cluster{}
	for i, text := range []string{"started\npanic: one\ngoroutine 1\nstarted\npanic: two", "an error that names a panic: none\n", "started\npanic: three\nmore and more\n"} {
		f, err := os.Create(filepath.Join(t.TempDir(), "log"))
		if err != nil {
			t.Fatal(i, err)
		}
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
		c.logs = append(c.logs, f)
		defer f.Close()
	}
	if got := c.After("\npanic: ", 14); !slices.Equal(got, []string{"\npanic: one\ngo", "\npanic: two", "\npanic: three\n"}) {
		t.Errorf("%q", got)
	}
}

// What is kept of voters that do not come back: all that they have written, and what their goroutines were doing.
func TestKeep(t *testing.T) {
	if testing.Short() {
		t.Skip("processes are left out with -short")
	}
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	c := NewCluster(p, t.TempDir(), 3)
	defer c.Close()
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := c.Keep(dir); err != nil {
		t.Fatal(err)
	}
	for i := range c.Nodes {
		b, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("voter-%d.log", i+1)))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{`"event":"server.ready"`, "\ngoroutine "} {
			if !strings.Contains(string(b), want) {
				t.Errorf("voter %d: %q is not in %d bytes", i+1, want, len(b))
			}
		}
	}
}
