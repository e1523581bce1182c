package main

import (
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"testing"
	"time"
)

// A voter that runs looks again and again whether the cluster was recovered from another's log. Once it was, it ends, says why, and does not start any more.
func TestRunningVoterIsFenced(t *testing.T) {
	cfg, err := devConfig(map[string]string{"data-dir": filepath.Join(t.TempDir(), "data"), "kafka-listen": "127.0.0.1:0", "http-listen": "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	cfg.fenceEvery = 10 * time.Millisecond
	n, err := startNode(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- n.run(t.Context(), streams{out: io.Discard, err: io.Discard}) }()
	if epoch, err := writeFence(t.Context(), n.bucket, n.host.ClusterID(), "2.b", 0); err != nil || epoch != 1 {
		t.Fatalf("epoch %d: %v", epoch, err)
	}
	select {
	case err = <-ended:
	case <-t.Context().Done():
	}
	f, ok := errors.AsType[*fault](err)
	if !ok || f.Code != "E_NODE_FENCED" || !errors.Is(err, errFenced) {
		t.Fatalf("it ended with %v", err)
	}
	if _, err := startNode(t.Context(), cfg, slog.New(slog.DiscardHandler)); !errors.Is(err, errFenced) {
		t.Errorf("it starts again: %v", err)
	}
}
