package localstack

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/xml"
	"fmt"
	"hash/crc32"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Double is an S3 store in this process that misbehaves as its script says: the answers that a real store gives once a year, on request. It speaks what Estran uses:
// path-style PUT, GET, HEAD, DELETE, multi-object delete, ListObjectsV2, create-only writes and CRC32C.
type Double struct {
	Endpoint string
	// Delay says how long a request waits, once it has been read, until it is answered; nil = not at all. It is set before the first request.
	Delay func(op string) time.Duration

	srv   *http.Server
	wg    sync.WaitGroup // the listener and every connection
	mu    sync.Mutex
	m     map[string]doubleObject
	steps []*Step
	calls []string
	etag  int
	hits  int // steps taken
	gone  []Gone
}

// Gone is an object that was deleted, and how old it was then.
type Gone struct {
	Key string
	Age time.Duration
}

type doubleObject struct {
	data     []byte
	etag     string
	crc      string // base64, as it was announced
	writer   string
	modified time.Time
}

// Step is one kind of misbehaviour. The first step that matches a request is taken.
type Step struct {
	Op    string // put, get, head, delete, list; "" = any
	Key   string // a part of the key
	Times int    // so often; 0 = always

	// Status and Code answer instead of the store; RetryAfter is sent along, in seconds.
	Status, RetryAfter int
	Code               string
	// Body is sent with Status instead of an error document; Early: before the request's body is read.
	Body  string
	Early bool
	// Effect: what was asked for is done all the same.
	Effect bool
	// Reset breaks the connection instead of answering; with Effect the answer is lost.
	Reset bool
	// Cut ends the body of a GET after so many bytes, though its Content-Length promises more.
	Cut int
	// Flip changes a bit of the body's byte number Flip-1: of a PUT on its way in, of a GET on its way out.
	Flip int
	// Stall stops the body of a GET after so many bytes, until the client gives up.
	Stall int
	// Silent does not answer at all, until the client gives up.
	Silent bool
	// Whole answers a GET with the whole object, whatever part was asked for.
	Whole bool
	// ETag is told instead of the object's.
	ETag string
	// Date moves the Date header.
	Date time.Duration

	done int
}

// NewDouble starts a store that is empty. It panics if loopback has no port left.
func NewDouble() *Double {
	d := &Double{m: map[string]doubleObject{}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	d.Endpoint = "http://" + l.Addr().String()
	d.srv = &http.Server{Handler: d, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0), ConnState: func(_ net.Conn, s http.ConnState) {
		switch s {
		case http.StateNew: // Serve still runs, and is counted
			d.wg.Add(1)
		case http.StateClosed:
			d.wg.Done()
		}
	}}
	d.wg.Go(func() { _ = d.srv.Serve(l) })
	return d
}

// Close stops it, whatever is under way.
func (d *Double) Close() {
	_ = d.srv.Close()
	d.wg.Wait()
}

// nobody takes an answer that is lost.
type nobody struct{ header http.Header }

func (n nobody) Header() http.Header         { return n.header }
func (n nobody) Write(b []byte) (int, error) { return len(b), nil }
func (n nobody) WriteHeader(int)             {}

// URL is the storage URL of a bucket in this store.
func (d *Double) URL(bucket string) string { return (&Store{Endpoint: d.Endpoint}).URL(bucket) }

// Env are the variables that a client of the store needs. Signatures are not checked.
func (d *Double) Env() []string {
	return (&Store{AccessKey: accessKey, SecretKey: secretKey}).Env()
}

// Script replaces the steps.
func (d *Double) Script(steps ...Step) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.steps = nil
	for i := range steps {
		d.steps = append(d.steps, &steps[i])
	}
}

// Calls returns the requests so far, "op key" each, and forgets them.
func (d *Double) Calls() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.calls
	d.calls = nil
	return c
}

// Hits counts the requests that the script has met so far.
func (d *Double) Hits() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hits
}

// Object returns an object's bytes.
func (d *Double) Object(key string) ([]byte, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	o, ok := d.m[key]
	return o.data, ok
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ServeHTTP implements http.Handler.
func (d *Double) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	op := opOf(r, key)
	s := d.take(op, key)
	w.Header().Set("Date", time.Now().Add(s.Date).UTC().Format(http.TimeFormat))
	if s.Early {
		w.Header().Set("Connection", "close")
		fail(w, s.Status, s.Code, "scripted")
		return
	}
	body, err := readBody(r)
	if op == "put" && s.Flip > 0 && s.Flip <= len(body) {
		body[s.Flip-1] ^= 1
	}
	if err != nil {
		fail(w, http.StatusBadRequest, "IncompleteBody", err.Error())
		return
	}
	if d.Delay != nil {
		select {
		case <-time.After(d.Delay(op)):
		case <-r.Context().Done():
		}
	}
	if s.Silent {
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
	if s.Status != 0 || s.Reset {
		if s.Effect {
			d.serve(nobody{http.Header{}}, r, op, key, body, s)
		}
		if s.Reset {
			panic(http.ErrAbortHandler)
		}
		if s.RetryAfter > 0 {
			w.Header().Set("Retry-After", strconv.Itoa(s.RetryAfter))
		}
		if s.Code == "" && s.Status == http.StatusOK {
			w.Header().Set("Content-Type", "application/xml")
			_, _ = io.WriteString(w, s.Body)
			return
		}
		fail(w, s.Status, s.Code, "scripted")
		return
	}
	d.serve(w, r, op, key, body, s)
}

func opOf(r *http.Request, key string) string {
	q := r.URL.Query()
	switch {
	case r.Method == http.MethodPost && q.Has("delete"):
		return "delete"
	case r.Method == http.MethodGet && key == "":
		return "list"
	}
	return strings.ToLower(r.Method)
}

func (d *Double) take(op, key string) Step {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, strings.TrimSpace(op+" "+key))
	for _, s := range d.steps {
		if (s.Op == "" || s.Op == op) && strings.Contains(key, s.Key) && (s.Times == 0 || s.done < s.Times) {
			s.done++
			d.hits++
			return *s
		}
	}
	return Step{}
}

// readBody takes the body whole, out of the chunks that a signed stream has.
func readBody(r *http.Request) ([]byte, error) {
	if !strings.HasPrefix(r.Header.Get("X-Amz-Content-Sha256"), "STREAMING-") {
		return io.ReadAll(r.Body)
	}
	var out []byte
	in := bufio.NewReader(r.Body)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return nil, err
		}
		hex, _, _ := strings.Cut(strings.TrimSpace(line), ";")
		n, err := strconv.ParseUint(hex, 16, 31)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			_, err := io.Copy(io.Discard, in) // trailers
			return out, err
		}
		at := len(out)
		out = append(out, make([]byte, n)...)
		if _, err := io.ReadFull(in, out[at:]); err != nil {
			return nil, err
		}
		if _, err := in.Discard(2); err != nil {
			return nil, err
		}
	}
}

func fail(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, "<Error><Code>%s</Code><Message>%s</Message></Error>", code, message) // a client that has gone needs no answer
}

func (d *Double) serve(w http.ResponseWriter, r *http.Request, op, key string, body []byte, s Step) {
	switch {
	case op == "put" && key == "", op == "head" && key == "":
		w.WriteHeader(http.StatusOK) // every bucket exists
	case op == "put":
		d.put(w, r, key, body, s)
	case op == "get", op == "head":
		d.get(w, r, op, key, s)
	case op == "delete" && key != "":
		d.remove(key)
		w.WriteHeader(http.StatusNoContent)
	case op == "delete":
		d.deleteMany(w, body)
	case op == "list" && r.URL.Query().Has("location"):
		_, _ = io.WriteString(w, `<LocationConstraint xmlns="http://s3.amazonaws.com/doc/2006-03-01/"/>`)
	case op == "list":
		d.list(w, r)
	default:
		fail(w, http.StatusNotImplemented, "NotImplemented", r.Method)
	}
}

func (d *Double) put(w http.ResponseWriter, r *http.Request, key string, body []byte, s Step) {
	sum := base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.Checksum(body, castagnoli)))
	want := r.Header.Get("X-Amz-Checksum-Crc32c")
	if want != "" && want != sum {
		fail(w, http.StatusBadRequest, "BadDigest", "the body has CRC32C "+sum)
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.m[key]; ok && r.Header.Get("If-None-Match") == "*" {
		fail(w, http.StatusPreconditionFailed, "PreconditionFailed", "it exists")
		return
	}
	d.etag++
	o := doubleObject{data: body, etag: fmt.Sprintf("%q", strconv.Itoa(d.etag)), crc: want, writer: r.Header.Get("X-Amz-Meta-Estran-Writer"), modified: time.Now()}
	d.m[key] = o
	tag := o.etag
	if s.ETag != "" {
		tag = s.ETag
	}
	w.Header().Set("ETag", tag)
	if want != "" {
		w.Header().Set("X-Amz-Checksum-Crc32c", want)
	}
	w.WriteHeader(http.StatusOK)
}

func (d *Double) get(w http.ResponseWriter, r *http.Request, op, key string, s Step) {
	d.mu.Lock()
	o, ok := d.m[key]
	d.mu.Unlock()
	if !ok {
		fail(w, http.StatusNotFound, "NoSuchKey", "no such key")
		return
	}
	h := w.Header()
	h.Set("ETag", o.etag)
	if s.ETag != "" {
		h.Set("ETag", s.ETag)
	}
	h.Set("Last-Modified", o.modified.UTC().Format(http.TimeFormat))
	if o.writer != "" {
		h.Set("X-Amz-Meta-Estran-Writer", o.writer)
	}
	if o.crc != "" && r.Header.Get("X-Amz-Checksum-Mode") != "" {
		h.Set("X-Amz-Checksum-Crc32c", o.crc)
	}
	data, status := o.data, http.StatusOK
	if spec := r.Header.Get("Range"); spec != "" && !s.Whole {
		from, to, ok := rangeOf(spec, len(data))
		if !ok {
			fail(w, http.StatusRequestedRangeNotSatisfiable, "InvalidRange", spec)
			return
		}
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(data)))
		data, status = data[from:to], http.StatusPartialContent
	}
	h.Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(status)
	if op == "head" {
		return
	}
	if s.Flip > 0 && s.Flip <= len(data) {
		data = bytes.Clone(data)
		data[s.Flip-1] ^= 1
	}
	if n := s.Cut + s.Stall; n > 0 && n < len(data) {
		_, _ = w.Write(data[:n]) // what follows breaks the connection
		_ = http.NewResponseController(w).Flush()
		if s.Stall > 0 {
			<-r.Context().Done()
		}
		panic(http.ErrAbortHandler)
	}
	_, _ = w.Write(data) // a client that has gone needs no answer
}

// rangeOf reads bytes=a-b, bytes=a- and bytes=-n.
func rangeOf(spec string, size int) (from, to int, ok bool) {
	a, b, _ := strings.Cut(strings.TrimPrefix(spec, "bytes="), "-")
	first, err1 := strconv.Atoi(a)
	last, err2 := strconv.Atoi(b)
	switch {
	case a == "" && err2 == nil:
		return max(0, size-last), size, size > 0
	case err1 != nil || b != "" && err2 != nil || first >= size:
		return 0, 0, false
	case b == "":
		return first, size, true
	}
	return first, min(last+1, size), true
}

func (d *Double) remove(key string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if o, ok := d.m[key]; ok {
		d.gone = append(d.gone, Gone{key, time.Since(o.modified)})
		delete(d.m, key)
	}
}

// Gone returns the objects that were deleted.
func (d *Double) Gone() []Gone {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.gone)
}

// Keys returns the keys of all objects.
func (d *Double) Keys() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.m))
}

func (d *Double) deleteMany(w http.ResponseWriter, body []byte) {
	var in struct {
		Object []struct{ Key string }
	}
	if err := xml.Unmarshal(body, &in); err != nil {
		fail(w, http.StatusBadRequest, "MalformedXML", err.Error())
		return
	}
	var out strings.Builder
	out.WriteString("<DeleteResult>")
	for _, o := range in.Object {
		if s := d.deny(o.Key); s != nil {
			fmt.Fprintf(&out, "<Error><Key>%s</Key><Code>%s</Code><Message>scripted</Message></Error>", o.Key, s.Code)
			continue
		}
		d.remove(o.Key)
	}
	out.WriteString("</DeleteResult>")
	_, _ = io.WriteString(w, out.String())
}

// deny finds the step for one key of a multi-object delete: Op "delete each".
func (d *Double) deny(key string) *Step {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.steps {
		if s.Op == "delete each" && strings.Contains(key, s.Key) && (s.Times == 0 || s.done < s.Times) {
			s.done++
			d.hits++
			return s
		}
	}
	return nil
}

func (d *Double) list(w http.ResponseWriter, r *http.Request) {
	const page = 1000
	q := r.URL.Query()
	after := max(q.Get("start-after"), q.Get("continuation-token"))
	d.mu.Lock()
	keys := slices.Sorted(maps.Keys(d.m))
	d.mu.Unlock()
	var out strings.Builder
	n, last := 0, ""
	for _, k := range keys {
		if !strings.HasPrefix(k, q.Get("prefix")) || k <= after {
			continue
		}
		if n++; n > page {
			break
		}
		d.mu.Lock()
		o := d.m[k]
		d.mu.Unlock()
		last = k
		fmt.Fprintf(&out, "<Contents><Key>%s</Key><Size>%d</Size><ETag>%s</ETag><LastModified>%s</LastModified></Contents>", k, len(o.data), o.etag, o.modified.UTC().Format(time.RFC3339))
	}
	more := ""
	if n > page {
		more = "<NextContinuationToken>" + last + "</NextContinuationToken>"
	}
	_, _ = fmt.Fprintf(w, "<ListBucketResult><IsTruncated>%t</IsTruncated>%s%s</ListBucketResult>", n > page, more, out.String())
}
