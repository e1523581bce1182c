// Package objtest is what every Bucket must do.
package objtest

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/estran/estran/objstore"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Run runs the contract against a bucket; open is called once and the bucket may hold other objects outside objtest/.
func Run(t *testing.T, open func(t *testing.T) objstore.Bucket) {
	b := open(t)
	for _, c := range []struct {
		name string
		f    func(*testing.T, objstore.Bucket)
	}{{"put get head", putGet}, {"ranges", ranges}, {"create only", createOnly}, {"races", races}, {"list", list}, {"delete", remove}, {"missing", missing},
		{"checksum", checksum}, {"keys", keys}, {"large", large}, {"probe", probe}} {
		t.Run(c.name, func(t *testing.T) { c.f(t, b) })
	}
}

func put(t *testing.T, b objstore.Bucket, key string, data []byte, o objstore.PutOptions) {
	t.Helper()
	if _, err := b.Put(t.Context(), key, objstore.Bytes(data), o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Delete(t.Context(), key) })
}

func get(t *testing.T, b objstore.Bucket, key string, r objstore.Range) []byte {
	t.Helper()
	rc, _, err := b.Get(t.Context(), key, r)
	if err != nil {
		t.Fatalf("get %s %+v: %v", key, r, err)
	}
	defer rc.Close()
	data, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func putGet(t *testing.T, b objstore.Bucket) {
	data := []byte("the sea, the sea")
	crc := crc32.Checksum(data, castagnoli)
	put(t, b, "objtest/a.x", data, objstore.PutOptions{IfAbsent: true, CRC32C: &crc, WriterID: "w1"})
	if got := get(t, b, "objtest/a.x", objstore.Whole); !bytes.Equal(got, data) {
		t.Errorf("got %q", got)
	}
	i, err := b.Head(t.Context(), "objtest/a.x")
	if err != nil || i.Size != int64(len(data)) || i.ETag == "" || i.WriterID != "w1" || i.CRC32C == nil || *i.CRC32C != crc {
		t.Errorf("head: %+v %v", i, err)
	}
	put(t, b, "objtest/empty.x", nil, objstore.PutOptions{})
	if got := get(t, b, "objtest/empty.x", objstore.Whole); len(got) != 0 {
		t.Errorf("empty object: %q", got)
	}
}

func ranges(t *testing.T, b objstore.Bucket) {
	data := []byte("0123456789")
	put(t, b, "objtest/r.x", data, objstore.PutOptions{})
	for _, c := range []struct {
		r    objstore.Range
		want string
	}{{objstore.Range{Off: 0, Len: 3}, "012"}, {objstore.Range{Off: 4, Len: 3}, "456"}, {objstore.Range{Off: 8, Len: 100}, "89"}, {objstore.Range{Off: 5, Len: -1}, "56789"},
		{objstore.Range{Off: -4, Len: -1}, "6789"}, {objstore.Range{Off: 9, Len: 1}, "9"}} {
		if got := string(get(t, b, "objtest/r.x", c.r)); got != c.want {
			t.Errorf("%+v: %q, want %q", c.r, got, c.want)
		}
	}
	if _, _, err := b.Get(t.Context(), "objtest/r.x", objstore.Range{Off: 10, Len: 1}); !errors.Is(err, objstore.ErrRange) {
		t.Errorf("beyond the end: %v", err)
	}
}

func createOnly(t *testing.T, b objstore.Bucket) {
	put(t, b, "objtest/c.x", []byte("first"), objstore.PutOptions{IfAbsent: true, WriterID: "w1"})
	if _, err := b.Put(t.Context(), "objtest/c.x", objstore.Bytes([]byte("second")), objstore.PutOptions{IfAbsent: true, WriterID: "w2"}); !errors.Is(err, objstore.ErrPrecondition) {
		t.Errorf("another writer: %v", err)
	}
	if _, err := b.Put(t.Context(), "objtest/c.x", objstore.Bytes([]byte("first")), objstore.PutOptions{IfAbsent: true, WriterID: "w1"}); err != nil {
		t.Errorf("the same attempt again: %v", err)
	}
	if got := get(t, b, "objtest/c.x", objstore.Whole); string(got) != "first" {
		t.Errorf("the object is %q", got)
	}
	put(t, b, "objtest/c.x", []byte("third"), objstore.PutOptions{})
	if got := get(t, b, "objtest/c.x", objstore.Whole); string(got) != "third" {
		t.Errorf("after an unconditional put: %q", got)
	}
}

func races(t *testing.T, b objstore.Bucket) {
	for round := range 3 {
		key := fmt.Sprintf("objtest/race-%d.x", round)
		var wins atomic.Int32
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				_, err := b.Put(t.Context(), key, objstore.Bytes([]byte{byte(w)}), objstore.PutOptions{IfAbsent: true, WriterID: fmt.Sprint("w", w)})
				if err == nil {
					wins.Add(1)
				} else if !errors.Is(err, objstore.ErrPrecondition) && !errors.Is(err, objstore.ErrConflict) {
					t.Errorf("writer %d: %v", w, err)
				}
			})
		}
		wg.Wait()
		if wins.Load() != 1 {
			t.Errorf("%d writers created %s", wins.Load(), key)
		}
		if err := b.Delete(t.Context(), key); err != nil {
			t.Error(err)
		}
	}
}

func list(t *testing.T, b objstore.Bucket) {
	want := []string{"objtest/l/a.x", "objtest/l/b/1.x", "objtest/l/b/2.x", "objtest/l/c.x"}
	for _, k := range want {
		put(t, b, k, []byte(k), objstore.PutOptions{})
	}
	for _, c := range []struct {
		prefix, after string
		want          []string
	}{{"objtest/l/", "", want}, {"objtest/l/b/", "", want[1:3]}, {"objtest/l/", "objtest/l/b/1.x", want[2:]}, {"objtest/none/", "", nil}} {
		var got []string
		for i, err := range b.List(t.Context(), c.prefix, c.after) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, i.Key)
		}
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("list %q after %q: %v, want %v", c.prefix, c.after, got, c.want)
		}
	}
}

func remove(t *testing.T, b objstore.Bucket) {
	for _, k := range []string{"objtest/d1.x", "objtest/d2.x"} {
		put(t, b, k, []byte("x"), objstore.PutOptions{})
	}
	if err := b.Delete(t.Context(), "objtest/d1.x", "objtest/never.x", "objtest/d2.x"); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"objtest/d1.x", "objtest/d2.x"} {
		if _, err := b.Head(t.Context(), k); !errors.Is(err, objstore.ErrNotFound) {
			t.Errorf("%s after its deletion: %v", k, err)
		}
	}
	if err := b.Delete(t.Context(), "objtest/never.x"); err != nil {
		t.Errorf("deleting nothing: %v", err)
	}
}

func missing(t *testing.T, b objstore.Bucket) {
	if _, err := b.Head(t.Context(), "objtest/missing.x"); !errors.Is(err, objstore.ErrNotFound) {
		t.Errorf("head: %v", err)
	}
	if _, _, err := b.Get(t.Context(), "objtest/missing.x", objstore.Whole); !errors.Is(err, objstore.ErrNotFound) {
		t.Errorf("get: %v", err)
	}
}

func checksum(t *testing.T, b objstore.Bucket) {
	wrong := uint32(1)
	if _, err := b.Put(t.Context(), "objtest/crc.x", objstore.Bytes([]byte("body")), objstore.PutOptions{CRC32C: &wrong}); !errors.Is(err, objstore.ErrCorrupt) {
		t.Errorf("wrong checksum: %v", err)
	}
	if _, err := b.Head(t.Context(), "objtest/crc.x"); !errors.Is(err, objstore.ErrNotFound) {
		t.Errorf("an object with a wrong checksum was stored: %v", err)
	}
}

func keys(t *testing.T, b objstore.Bucket) {
	for _, k := range []string{"", "/a", "a//b", "a/../b", "A", "a b", "a/", string(bytes.Repeat([]byte{'a'}, 201))} {
		if _, err := b.Put(t.Context(), k, objstore.Bytes(nil), objstore.PutOptions{}); !errors.Is(err, objstore.ErrInvalidKey) {
			t.Errorf("key %.20q: %v", k, err)
		}
	}
}

// large is above the 16 MiB chunk at which some SDK defaults fail.
func large(t *testing.T, b objstore.Bucket) {
	data := bytes.Repeat([]byte("estran-segment--"), 20<<20/16)
	crc := crc32.Checksum(data, castagnoli)
	put(t, b, "objtest/large.x", data, objstore.PutOptions{IfAbsent: true, CRC32C: &crc, WriterID: "w"})
	got := make([]byte, 1<<20)
	if err := objstore.ReadFull(t.Context(), b, "objtest/large.x", objstore.Range{Off: 7 << 20, Len: 1 << 20}, got); err != nil || !bytes.Equal(got, data[7<<20:8<<20]) {
		t.Errorf("range of a large object: %v", err)
	}
}

func probe(t *testing.T, b objstore.Bucket) {
	if c, err := objstore.Probe(t.Context(), b); err != nil || !c.CreateOnly || !c.Ranges || !c.Listed {
		t.Errorf("probe: %+v %v", c, err)
	}
}
