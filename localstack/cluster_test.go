package localstack

import (
	"os"
	"path/filepath"
	"slices"
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
