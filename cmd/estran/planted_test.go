package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/estran/estran/localstack"
	"github.com/estran/estran/localstack/planted"
)

// A program that is built as it is released holds no planted mistake; one with the tag holds all.
func TestNoMistakeIsReleased(t *testing.T) {
	if testing.Short() {
		t.Skip("building twice is left out with -short")
	}
	for _, c := range []struct {
		flags []string
		want  bool
	}{{nil, false}, {[]string{"-tags=planted"}, true}} {
		program, err := localstack.Build(t.Context(), filepath.Join("..", ".."), t.TempDir(), c.flags...)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(program)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range append([]string{"ESTRAN_TEST_PLANTED", "ESTRAN_TEST_CLOCK"}, planted.All...) {
			if got := bytes.Contains(b, []byte(name)); got != c.want {
				t.Errorf("built with %v: holds %q is %v", c.flags, name, got)
			}
		}
	}
}
