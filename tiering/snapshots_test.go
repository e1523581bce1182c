package tiering

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/mem"
)

// The newest snapshot that is whole is the one that is read; three of a group are kept, whatever else lies beside them; without leave nothing is deleted.
func TestSnapshotsInTheBucket(t *testing.T) {
	b := mem.New()
	var denied error
	s := &Snapshots{Bucket: b, Dir: t.TempDir(), MayDelete: func(context.Context) error { return denied }}
	save := func(x Snapshot, text string) error {
		return s.Save(t.Context(), x, func(w io.Writer) (int64, error) { n, err := io.WriteString(w, text); return int64(n), err })
	}
	newest := func(group string) (Snapshot, string, error) {
		var got bytes.Buffer
		x, err := s.Newest(t.Context(), group, func(r io.Reader) error { got.Reset(); _, err := got.ReadFrom(r); return err })
		return x, got.String(), err
	}
	if _, _, err := newest("meta"); !errors.Is(err, ErrNoSnapshot) {
		t.Errorf("nothing there: %v", err)
	}
	text := func(i uint64) string { return strings.Repeat(fmt.Sprint("state ", i, " "), 10_000) }
	for i := range uint64(9) {
		x := Snapshot{Group: "meta", Epoch: i / 5, Index: 100 * (9 - i%5), Term: 7} // a later epoch may begin lower
		if i < 5 {
			x.Index = 1000 + i
		}
		if err := save(x, text(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := save(Snapshot{Group: "shard-1", Index: 1, Term: 1}, "other"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Put(t.Context(), snapshotPrefix("meta")+"999999-x.zst", objstore.Bytes([]byte("?")), objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	x, got, err := newest("meta")
	if err != nil || x.Epoch != 1 || x.Index != 900 || got != text(5) {
		t.Errorf("newest: %+v %v, %d bytes", x, err, len(got))
	}
	keys, _ := s.list(t.Context(), "meta")
	if len(keys) != snapshotsKept {
		t.Errorf("kept %v", keys)
	}
	// damage, at any byte of the compressed object
	rc, info, err := b.Get(t.Context(), keys[2], objstore.Whole)
	if err != nil {
		t.Fatal(err)
	}
	whole, _ := io.ReadAll(rc)
	for i := range whole {
		bad := bytes.Clone(whole)
		bad[i] ^= 0x10
		if err := b.Delete(t.Context(), info.Key); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Put(t.Context(), info.Key, objstore.Bytes(bad), objstore.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		if x, got, err := newest("meta"); err != nil || got == text(5) && x.Index != 900 || got != text(5) && (x.Index != 800 || got != text(6)) {
			t.Fatalf("byte %d damaged: %+v %v, %d bytes", i, x, err, len(got))
		}
	}
	denied = errors.New("fenced")
	if err := save(Snapshot{Group: "meta", Epoch: 2, Index: 1, Term: 9}, "x"); !errors.Is(err, denied) {
		t.Errorf("without leave: %v", err)
	}
	if keys, _ := s.list(t.Context(), "meta"); len(keys) != snapshotsKept+1 {
		t.Errorf("without leave there are %v", keys)
	}
}
