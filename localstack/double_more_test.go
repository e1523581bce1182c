package localstack

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/estran/estran/objstore"
)

var errUnreadable = errors.New("unreadable")

// broken is a body that cannot be read from some position on.
type broken struct {
	objstore.Body
	at int64
}

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > b.at {
		return 0, errUnreadable
	}
	return b.Body.R.ReadAt(p, off)
}

// A body that cannot be read is not the store's fault: its error comes back as it is, nothing is repeated, and nothing is stored.
func TestDoubleUnreadableBody(t *testing.T) {
	for _, size := range []int{1000, 5 << 20} {
		for _, sdk := range sdks {
			t.Run(fmt.Sprint(sdk, "/", size), func(t *testing.T) {
				d, b := double(t, sdk)
				data := bytes.Repeat([]byte("x"), size)
				crc := crc32.Checksum(data, castagnoli)
				_, err := b.Put(t.Context(), "k.x", objstore.Body{R: broken{objstore.Bytes(data), int64(size) / 2}, Size: int64(size)},
					objstore.PutOptions{IfAbsent: true, CRC32C: &crc, WriterID: "w"})
				if !errors.Is(err, errUnreadable) {
					t.Errorf("%v", err)
				}
				if calls := d.Calls(); len(calls) > 1 {
					t.Errorf("requests %v", calls)
				}
				if _, ok := d.Object("k.x"); ok {
					t.Error("half of a body was stored")
				}
			})
		}
	}
}

// A bit that is flipped on the way to the store: the store refuses the body by its checksum, and it is sent again.
func TestDoubleUploadIsDamaged(t *testing.T) {
	data := bytes.Repeat([]byte("segment"), 10_000)
	crc := crc32.Checksum(data, castagnoli)
	for _, c := range []struct {
		times, puts int
		want        error
	}{{1, 2, nil}, {0, doubleTries, objstore.ErrCorrupt}} {
		for _, sdk := range sdks {
			t.Run(fmt.Sprint(sdk, "/", c.times), func(t *testing.T) {
				d, b := double(t, sdk)
				d.Script(Step{Op: "put", Flip: 5000, Times: c.times})
				_, err := b.Put(t.Context(), "k.x", objstore.Bytes(data), objstore.PutOptions{IfAbsent: true, CRC32C: &crc, WriterID: "w"})
				if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
					t.Errorf("%v, want %v", err, c.want)
				}
				if calls := d.Calls(); len(calls) != c.puts {
					t.Errorf("requests %v, want %d", calls, c.puts)
				}
				if got, ok := d.Object("k.x"); ok != (c.want == nil) || ok && !bytes.Equal(got, data) {
					t.Errorf("the store has %d bytes (%v)", len(got), ok)
				}
			})
		}
	}
}

// No SDK sees a bit that is flipped in what a GET brings: what is read must be checked by whoever reads it. It comes as it came, in one request.
func TestDoubleFlippedBitIsNotSeen(t *testing.T) {
	data := bytes.Repeat([]byte("segment"), 1000)
	crc := crc32.Checksum(data, castagnoli)
	for _, sdk := range sdks {
		for _, rg := range []objstore.Range{objstore.Whole, {Off: 100, Len: 5000}} {
			t.Run(fmt.Sprint(sdk, "/", rg.Off), func(t *testing.T) {
				d, b := double(t, sdk)
				if _, err := b.Put(t.Context(), "k.x", objstore.Bytes(data), objstore.PutOptions{CRC32C: &crc}); err != nil {
					t.Fatal(err)
				}
				d.Calls()
				d.Script(Step{Op: "get", Flip: 11})
				off, n, _ := rg.Resolve(int64(len(data)))
				want := bytes.Clone(data[off : off+n])
				want[10] ^= 1
				got := make([]byte, n)
				if err := objstore.ReadFull(t.Context(), b, "k.x", rg, got); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%v", err)
				}
				if calls := d.Calls(); len(calls) != 1 {
					t.Errorf("requests %v", calls)
				}
			})
		}
	}
}

// A store, or a proxy before it, that answers with the whole object where a part was asked for is found out: bytes of another place are never taken for those.
func TestDoubleIgnoresRange(t *testing.T) {
	data := make([]byte, 10_000)
	for i := range data {
		data[i] = byte(i >> 4)
	}
	for _, sdk := range sdks {
		for _, c := range []struct {
			rg objstore.Range
			ok bool // the bytes are the right ones all the same
		}{{objstore.Range{Off: 100, Len: 50}, false}, {objstore.Range{Off: 9000, Len: -1}, false}, {objstore.Range{Off: -10, Len: -1}, false}, {objstore.Range{Off: 0, Len: 50}, true}} {
			t.Run(fmt.Sprint(sdk, "/", c.rg), func(t *testing.T) {
				d, b := double(t, sdk)
				if _, err := b.Put(t.Context(), "k.x", objstore.Bytes(data), objstore.PutOptions{}); err != nil {
					t.Fatal(err)
				}
				d.Script(Step{Op: "get", Whole: true})
				off, n, _ := c.rg.Resolve(int64(len(data)))
				got := make([]byte, n)
				err := objstore.ReadFull(t.Context(), b, "k.x", c.rg, got)
				if err == nil && !bytes.Equal(got, data[off:off+n]) {
					t.Error("bytes of another place")
				}
				if (err == nil) != c.ok || err != nil && !errors.Is(err, objstore.ErrUnsupported) {
					t.Errorf("%v", err)
				}
			})
		}
	}
}

// A body that is resumed goes on where it was, also where the part that was asked for had no end or was counted from it.
func TestDoubleResumedRanges(t *testing.T) {
	data := make([]byte, 100_000)
	for i := range data {
		data[i] = byte(i * i >> 8)
	}
	for _, sdk := range sdks {
		for _, rg := range []objstore.Range{{Off: 5, Len: -1}, {Off: -60_000, Len: -1}, {Off: 99_000, Len: 5000}, {Off: 0, Len: 1}} {
			t.Run(fmt.Sprint(sdk, "/", rg), func(t *testing.T) {
				d, b := double(t, sdk)
				if _, err := b.Put(t.Context(), "k.x", objstore.Bytes(data), objstore.PutOptions{}); err != nil {
					t.Fatal(err)
				}
				d.Script(Step{Op: "get", Cut: 700, Times: 2})
				rc, _, err := b.Get(t.Context(), "k.x", rg)
				if err != nil {
					t.Fatal(err)
				}
				defer rc.Close()
				off, n, _ := rg.Resolve(int64(len(data)))
				if got, err := io.ReadAll(rc); err != nil || !bytes.Equal(got, data[off:off+n]) {
					t.Errorf("%d bytes, want %d: %v", len(got), n, err)
				}
			})
		}
	}
}

// lent is a body that must not be read any more when it has been given back.
type lent struct {
	objstore.Body
	mu      sync.Mutex
	reading bool
	back    *testing.T
}

func (l *lent) ReadAt(p []byte, off int64) (int, error) {
	l.mu.Lock()
	l.reading = true
	if l.back != nil {
		l.back.Error("the body is read after Put has returned")
	}
	l.mu.Unlock()
	n, err := l.Body.R.ReadAt(p, off)
	l.mu.Lock()
	l.reading = false
	l.mu.Unlock()
	return n, err
}

// A store that refuses before it has read the body, as those do that are busy: the answer is understood or the connection breaks, and either is repeated.
func TestDoubleAnswersEarly(t *testing.T) {
	data := bytes.Repeat([]byte("segment!"), 1<<20)
	crc := crc32.Checksum(data, castagnoli)
	for _, sdk := range sdks {
		t.Run(sdk, func(t *testing.T) {
			d, b := double(t, sdk)
			put := func() error {
				body := &lent{Body: objstore.Bytes(data)}
				_, err := b.Put(t.Context(), "k.x", objstore.Body{R: body, Size: int64(len(data))}, objstore.PutOptions{IfAbsent: true, CRC32C: &crc, WriterID: "w"})
				if body.mu.Lock(); body.reading {
					t.Error("the body is being read when Put has returned")
				}
				body.back = t
				body.mu.Unlock()
				return err
			}
			d.Script(Step{Op: "put", Status: 503, Code: "SlowDown", Early: true})
			if err := put(); !errors.Is(err, objstore.ErrThrottled) && !errors.Is(err, objstore.ErrUnavailable) {
				t.Errorf("for ever: %v", err)
			}
			if calls := d.Calls(); len(calls) != doubleTries {
				t.Errorf("for ever: requests %v", calls)
			}
			d.Script(Step{Op: "put", Status: 503, Code: "SlowDown", Early: true, Times: 2})
			if err := put(); err != nil {
				t.Error(err)
			}
			if calls := ops(d.Calls()); !slices.Equal(calls, []string{"put", "put", "put"}) {
				t.Errorf("requests %v", calls)
			}
			if got, ok := d.Object("k.x"); !ok || !bytes.Equal(got, data) {
				t.Errorf("the store has %d bytes", len(got))
			}
		})
	}
}

// A status of 200 is no success if the body says that it is an error, or if it breaks off.
func TestDoubleErrorIn200(t *testing.T) {
	for _, sdk := range sdks {
		for _, c := range []struct {
			name, body string
			times      int
			posts      int
			left       bool
		}{
			{"error once", `<?xml version="1.0"?><Error><Code>InternalError</Code><Message>scripted</Message></Error>`, 1, 2, false},
			{"error for ever", `<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>scripted</Message></Error>`, 0, doubleTries, true},
			{"cut once", `<?xml version="1.0"?><DeleteRes`, 1, 2, false},
		} {
			t.Run(sdk+"/delete/"+c.name, func(t *testing.T) {
				d, b := double(t, sdk)
				for _, k := range []string{"a.x", "b.x"} {
					if _, err := b.Put(t.Context(), k, objstore.Bytes([]byte("v")), objstore.PutOptions{}); err != nil {
						t.Fatal(err)
					}
				}
				d.Calls()
				d.Script(Step{Op: "delete", Status: 200, Body: c.body, Times: c.times})
				err := b.Delete(t.Context(), "a.x", "b.x")
				if (err != nil) != c.left {
					t.Errorf("%v", err)
				}
				if calls := d.Calls(); len(calls) != c.posts {
					t.Errorf("requests %v, want %d", calls, c.posts)
				}
				for _, k := range []string{"a.x", "b.x"} {
					if _, ok := d.Object(k); ok != c.left {
						t.Errorf("%s is there: %v", k, ok)
					}
				}
			})
		}
		t.Run(sdk+"/list", func(t *testing.T) {
			d, b := double(t, sdk)
			if _, err := b.Put(t.Context(), "a.x", objstore.Bytes([]byte("v")), objstore.PutOptions{}); err != nil {
				t.Fatal(err)
			}
			d.Script(Step{Op: "list", Status: 200, Body: `<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a.x</Ke`, Times: 1})
			for _, err := range b.List(t.Context(), "", "") {
				if err == nil {
					t.Error("half of a list was taken for a list")
				}
				return
			}
			t.Error("half of a list was taken for an empty one")
		})
	}
}

// A request on a connection that the store has closed meanwhile, as after its restart, is sent again on another: net/http does so by itself for what may be repeated. It is bounded by
// the connections that were open, and each of ours counts once.
func TestDoubleResetForEver(t *testing.T) {
	for _, sdk := range sdks {
		for _, op := range []string{"get", "head", "delete", "put"} {
			t.Run(sdk+"/"+op, func(t *testing.T) {
				d, b := double(t, sdk)
				if _, err := b.Put(t.Context(), "k.x", objstore.Bytes([]byte("v")), objstore.PutOptions{}); err != nil {
					t.Fatal(err)
				}
				d.Calls()
				d.Script(Step{Reset: true})
				var err error
				switch op {
				case "get":
					_, _, err = b.Get(t.Context(), "k.x", objstore.Whole)
				case "head":
					_, err = b.Head(t.Context(), "k.x")
				case "delete":
					err = b.Delete(t.Context(), "k.x")
				case "put":
					_, err = b.Put(t.Context(), "k.x", objstore.Bytes([]byte("w")), objstore.PutOptions{})
				}
				if !errors.Is(err, objstore.ErrUnavailable) {
					t.Errorf("%v", err)
				}
				if n := len(d.Calls()); n < doubleTries || n > doubleTries+1 { // one connection was open
					t.Errorf("%d requests, want %d", n, doubleTries)
				}
			})
		}
	}
}

// A request is not answered before its delay is over.
func TestDoubleDelay(t *testing.T) {
	d, b := double(t, sdks[0])
	asked, over := make(chan string), make(chan struct{})
	d.Delay = func(op string) time.Duration {
		asked <- op
		<-over
		return 0
	}
	answered := make(chan error, 1)
	go func() {
		_, err := b.Put(t.Context(), "k.x", objstore.Bytes([]byte("x")), objstore.PutOptions{WriterID: "w"})
		answered <- err
	}()
	if op := <-asked; op != "put" {
		t.Errorf("%s is delayed, not put", op)
	}
	if _, ok := d.Object("k.x"); ok || len(answered) > 0 {
		t.Error("what is delayed was done")
	}
	close(over)
	if err := <-answered; err != nil {
		t.Error(err)
	}
}
