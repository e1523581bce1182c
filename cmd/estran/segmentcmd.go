package main

import (
	"bufio"
	"fmt"
	"os"

	"github.com/estran/estran/tiering/segment"
	"github.com/spf13/cobra"
)

func segmentCommand(s streams) *cobra.Command {
	var asJSON bool
	tool := func(use, short string, f func(w *bufio.Writer, file *os.File, size int64) error) *cobra.Command {
		c := &cobra.Command{Use: use + " FILE", Short: short, Args: usage(cobra.ExactArgs(1)), RunE: func(_ *cobra.Command, args []string) error {
			file, err := os.Open(args[0])
			if err != nil {
				return &fault{Code: "E_FILE", What: fmt.Sprintf("cannot open %s: %v", args[0], cause(err)), Err: err}
			}
			defer file.Close()
			size, err := objectSize(file)
			if err != nil {
				return err
			}
			w := bufio.NewWriter(s.out)
			if err := f(w, file, size); err != nil {
				_ = w.Flush() // what was read is shown
				return &fault{Code: "E_SEGMENT", What: fmt.Sprintf("%s: %v", args[0], err), Err: err}
			}
			return w.Flush()
		}}
		c.Flags().BoolVar(&asJSON, "json", false, "JSON lines")
		return c
	}
	return group("segment", "Read a sealed segment without a cluster",
		tool("dump", "Show what a sealed segment contains", func(w *bufio.Writer, f *os.File, size int64) error { return segment.Dump(w, f, size, asJSON) }),
		tool("cat", "Print the records of a sealed segment", func(w *bufio.Writer, f *os.File, size int64) error { return segment.Cat(w, f, size, asJSON) }))
}

// objectSize is the length of the object in a file: a file:// store keeps a trailer of its own behind it, which begins where the segment's trailer ends.
func objectSize(f *os.File) (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	tail := make([]byte, min(fi.Size(), 4096))
	if _, err := f.ReadAt(tail, fi.Size()-int64(len(tail))); err != nil {
		return 0, err
	}
	n := len(tail)
	if n < 12 || string(tail[n-8:]) != "ESTROBJ1" {
		return fi.Size(), nil
	}
	l := tail[n-12:]
	return fi.Size() - 12 - int64(int(l[0])<<24|int(l[1])<<16|int(l[2])<<8|int(l[3])), nil
}
