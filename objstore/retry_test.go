package objstore_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/mem"
)

// quick has short pauses; its limits are none that a busy machine reaches.
var quick = objstore.Policy{Tries: 4, First: time.Microsecond, Last: time.Millisecond, Stall: time.Minute, GetHeader: time.Minute, PutBase: time.Minute}

func faulty(rules ...objstore.Rule) (*objstore.Fault, objstore.Bucket) {
	f := objstore.NewFault(mem.New(), 1)
	f.Set(rules...)
	return f, objstore.Retry(f, quick, nil)
}

func kind(k error, retry bool) error { return &objstore.Error{Op: "x", Kind: k, Retryable: retry} }

func TestRetries(t *testing.T) {
	for _, c := range []struct {
		name  string
		rule  objstore.Rule
		tries int
		want  error
	}{
		{"passes after two", objstore.Rule{Op: "put", P: 1, Times: 2, Err: kind(objstore.ErrThrottled, true)}, 3, nil},
		{"gives up", objstore.Rule{Op: "put", P: 1, Err: kind(objstore.ErrUnavailable, true)}, 4, objstore.ErrUnavailable},
		{"is not repeated", objstore.Rule{Op: "put", P: 1, Err: kind(objstore.ErrAccess, false)}, 1, objstore.ErrAccess},
		{"reply lost", objstore.Rule{Op: "put", P: 1, Times: 1, Err: kind(objstore.ErrUnavailable, true), After: true}, 2, nil},
	} {
		f, b := faulty(c.rule)
		_, err := b.Put(t.Context(), "k.x", objstore.Bytes([]byte("v")), objstore.PutOptions{IfAbsent: true, WriterID: "w"})
		if !errors.Is(err, c.want) || (c.want == nil) != (err == nil) {
			t.Errorf("%s: %v", c.name, err)
		}
		if n := len(f.Trace()); n != c.tries {
			t.Errorf("%s: %d tries, want %d", c.name, n, c.tries)
		}
	}
}

// All requests share a budget: a store that is down is not asked five times for everything.
func TestRetryBudget(t *testing.T) {
	f, b := faulty(objstore.Rule{Op: "head", P: 1, Err: kind(objstore.ErrUnavailable, true)})
	for range 100 {
		_, _ = b.Head(t.Context(), "k.x")
	}
	if n := len(f.Trace()); n > 100+25 {
		t.Errorf("%d requests for 100 calls", n)
	}
}

func TestTruncatedBodyIsResumed(t *testing.T) {
	f, b := faulty()
	data := bytes.Repeat([]byte("0123456789"), 1000)
	if _, err := b.Put(t.Context(), "k.x", objstore.Bytes(data), objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	f.Set(objstore.Rule{Op: "get", P: 1, Times: 2, Truncate: 3000})
	for _, r := range []objstore.Range{objstore.Whole, {Off: 100, Len: 9000}, {Off: -9500, Len: -1}} {
		f.Set(objstore.Rule{Op: "get", P: 1, Times: 2, Truncate: 3000})
		off, n, _ := r.Resolve(int64(len(data)))
		got := make([]byte, n)
		if err := objstore.ReadFull(t.Context(), b, "k.x", r, got); err != nil || !bytes.Equal(got, data[off:off+n]) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	f.Set(objstore.Rule{Op: "get", P: 1, Truncate: 1})
	err := objstore.ReadFull(t.Context(), b, "k.x", objstore.Whole, make([]byte, len(data)))
	if !errors.Is(err, objstore.ErrTruncated) {
		t.Errorf("always truncated: %v", err)
	}
}

// A body in which no byte moves is given up and resumed.
func TestStalledBody(t *testing.T) {
	inner := mem.New()
	s := &staller{Bucket: inner, stalls: 1}
	policy := quick
	policy.Stall = 50 * time.Millisecond
	b := objstore.Retry(s, policy, nil)
	if _, err := b.Put(t.Context(), "k.x", objstore.Bytes([]byte("value")), objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if err := objstore.ReadFull(t.Context(), b, "k.x", objstore.Whole, got); err != nil || string(got) != "value" {
		t.Errorf("%q %v", got, err)
	}
}

type staller struct {
	objstore.Bucket
	stalls int
}

func (s *staller) Get(ctx context.Context, key string, r objstore.Range) (io.ReadCloser, objstore.Info, error) {
	rc, i, err := s.Bucket.Get(ctx, key, r)
	if err == nil && s.stalls > 0 {
		s.stalls--
		return io.NopCloser(until{ctx}), i, nil
	}
	return rc, i, err
}

type until struct{ ctx context.Context }

func (u until) Read([]byte) (int, error) { <-u.ctx.Done(); return 0, u.ctx.Err() }

func TestURLs(t *testing.T) {
	for _, c := range []struct {
		url  string
		want objstore.Location
		err  string
	}{
		{"file:///a/b", objstore.Location{Scheme: "file", Dir: "/a/b"}, ""},
		{"file://./x", objstore.Location{Scheme: "file", Dir: "./x"}, ""},
		{"mem://", objstore.Location{Scheme: "mem"}, ""},
		{"s3://bkt/p/q?region=eu-1", objstore.Location{Scheme: "s3", Bucket: "bkt", Prefix: "p/q", Region: "eu-1", Provider: "aws"}, ""},
		{"s3://bkt?endpoint=http://s3:9000&path_style=true", objstore.Location{Scheme: "s3", Bucket: "bkt", Endpoint: "http://s3:9000", PathStyle: true, Provider: "s3compatible"}, ""},
		{"s3://bkt?provider=x", objstore.Location{}, "provider"}, {"s3://", objstore.Location{}, "no bucket"}, {"s3://b1", objstore.Location{}, "3 to 63"}, {"s3://My_Bucket", objstore.Location{}, "3 to 63"}, {"gs://b", objstore.Location{}, "s3://"},
		{"s3://k:s@b", objstore.Location{}, "credentials"}, {"s3://bkt/UPPER", objstore.Location{}, "invalid key"}, {"s3://bkt?endpoint=s3:9000", objstore.Location{}, "endpoint"},
		{"file://", objstore.Location{}, "no directory"}, {"s3://bkt?path_style=yes", objstore.Location{}, "true or false"},
	} {
		got, err := objstore.ParseURL(c.url)
		if c.err == "" && (err != nil || got != c.want) || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: %+v %v", c.url, got, err)
		}
	}
	if got := objstore.Redact("s3://key:secret@b/p"); strings.Contains(got, "secret") {
		t.Error(got)
	}
}

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		status int
		code   string
		want   error
		retry  bool
	}{{404, "NoSuchKey", objstore.ErrNotFound, false}, {404, "NoSuchBucket", objstore.ErrBucketNotFound, false}, {503, "SlowDown", objstore.ErrThrottled, true}, {429, "", objstore.ErrThrottled, true},
		{500, "InternalError", objstore.ErrUnavailable, true}, {412, "PreconditionFailed", objstore.ErrPrecondition, false}, {409, "ConditionalRequestConflict", objstore.ErrConflict, true},
		{403, "AccessDenied", objstore.ErrAccess, false}, {400, "ExpiredToken", objstore.ErrExpiredCredentials, false}, {403, "InvalidAccessKeyId", objstore.ErrExpiredCredentials, false},
		{301, "PermanentRedirect", objstore.ErrRegion, false}, {416, "InvalidRange", objstore.ErrRange, false}, {400, "BadDigest", objstore.ErrCorrupt, true}, {501, "NotImplemented", objstore.ErrUnsupported, false},
		{0, "", objstore.ErrUnavailable, true}, {200, "", objstore.ErrUnavailable, true}, {400, "Whatever", objstore.ErrUnsupported, false}} {
		if e := objstore.Classify(c.status, c.code); !errors.Is(e, c.want) || e.Retryable != c.retry {
			t.Errorf("%d %s: %v retry %v", c.status, c.code, e.Kind, e.Retryable)
		}
	}
}

// A store that ignores conditions is refused by the probe.
func TestProbeRefusesAStoreWithoutConditions(t *testing.T) {
	_, err := objstore.Probe(t.Context(), careless{mem.New()})
	if !errors.Is(err, objstore.ErrUnsupported) {
		t.Errorf("%v", err)
	}
}

type careless struct{ objstore.Bucket }

func (c careless) Put(ctx context.Context, key string, b objstore.Body, o objstore.PutOptions) (objstore.Info, error) {
	o.IfAbsent = false
	return c.Bucket.Put(ctx, key, b, o)
}
