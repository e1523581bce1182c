package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/estran/estran/objstore/mem"
	"github.com/estran/estran/raftmeta/raftlog"
)

// A disk that fails under a running node is one clear error, though its cause has several parts.
func TestDiskFault(t *testing.T) {
	cfg := &config{}
	cfg.Node.DataDir = "/data"
	write := fmt.Errorf("%w: %w", raftlog.ErrPoisoned, errors.Join(fmt.Errorf("fdatasync f: %w", syscall.EIO), errors.New("closing it")))
	for _, c := range []struct {
		code string
		err  error
	}{{"E_DISK_WRITE", write}, {"E_DISK_WRITE", fmt.Errorf("raftlog: marking snapshot x: fdatasync x: %w", syscall.EIO)}, {"E_DISK_HUNG", fmt.Errorf("%w: for 31s", raftlog.ErrHung)},
		{"E_DISK_READ", fmt.Errorf("%w: reading entry 7 from f at 4096: %w", raftlog.ErrRead, syscall.EIO)}, {"E_DATA_DIR_CORRUPT", fmt.Errorf("%w: %w: data of entry 7 in f", raftlog.ErrRead, raftlog.ErrCorrupt)}} {
		code, err := c.code, c.err
		var b bytes.Buffer
		if got := printError(&b, diskFault(cfg, err)); got != exitError {
			t.Errorf("exit %d", got)
		}
		for _, w := range []string{"error: data directory /data", "fix: ", code} {
			if strings.Count(b.String(), w) != 1 {
				t.Errorf("%q is not there once:\n%s", w, &b)
			}
		}
		if strings.Count(b.String(), "\n") != 3 {
			t.Errorf("not one line each:\n%s", &b)
		}
		if !errors.Is(diskFault(cfg, err), err) {
			t.Errorf("%s hides its cause", code)
		}
	}
	if other := errors.New("listener"); diskFault(cfg, other) != other {
		t.Error("another error was changed")
	}
}

// A node that has joined a cluster must find the cluster's mark in its store: it never makes one.
func TestJoinedNodeNeedsTheClustersStore(t *testing.T) {
	b, other := mem.New(), mem.New()
	if err := checkBucket(t.Context(), b, "c", true); err != nil {
		t.Fatal(err)
	}
	if err := checkBucket(t.Context(), b, "c", false); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := checkBucket(t.Context(), other, "c", false); !errors.Is(err, errBucketForeign) {
			t.Errorf("an empty store: %v", err)
		}
	}
}

// A recovery takes the next free epoch, and the same one when it is repeated; whoever is of an earlier epoch is fenced, whoever is of the last is not.
func TestFence(t *testing.T) {
	b := mem.New()
	take := func(server string, above, want uint64) {
		t.Helper()
		if e, err := writeFence(t.Context(), b, "c", server, above); err != nil || e != want {
			t.Errorf("%s above %d: epoch %d, %v, want %d", server, above, e, err, want)
		}
	}
	if err := checkFence(t.Context(), b, 0); err != nil {
		t.Errorf("before any recovery: %v", err)
	}
	take("1.a", 0, 1)
	take("1.a", 0, 1) // it died and is repeated
	take("2.b", 0, 2) // another survivor of the same
	take("2.b", 0, 2)
	take("2.b", 2, 3)
	for epoch, fenced := range []bool{true, true, true, false} {
		if err := checkFence(t.Context(), b, uint64(epoch)); errors.Is(err, errFenced) != fenced {
			t.Errorf("epoch %d: %v", epoch, err)
		}
	}
}
