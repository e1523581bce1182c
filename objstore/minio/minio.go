// Package minio is a Bucket over minio-go, for every S3-compatible store that is not AWS.
package minio

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// Bucket implements objstore.Bucket.
type Bucket struct {
	core   *minio.Core
	bucket string
	region string
	secure bool
	http   *http.Transport
	date   atomic.Int64 // of the last answer, Unix seconds
}

var (
	_ objstore.Bucket  = (*Bucket)(nil)
	_ objstore.Creator = (*Bucket)(nil)
	_ objstore.Dater   = (*Bucket)(nil)
)

const writerMeta = "Estran-Writer"

// Open makes a client; it sends no request. Credentials come from the environment, as for AWS, or from the machine's role.
func Open(l objstore.Location, tr *http.Transport) (*Bucket, error) {
	u, err := url.Parse(l.Endpoint)
	if err != nil {
		return nil, fmt.Errorf("endpoint %q: %w", l.Endpoint, err)
	}
	region := l.Region
	if region == "" {
		region = "us-east-1"
	}
	b := &Bucket{bucket: l.Bucket, region: region, secure: u.Scheme == "https", http: tr}
	lookup := minio.BucketLookupAuto
	if l.PathStyle {
		lookup = minio.BucketLookupPath
	}
	creds := credentials.NewChainCredentials([]credentials.Provider{&credentials.EnvAWS{}, &credentials.FileAWSCredentials{}, &credentials.IAM{Client: &http.Client{Transport: tr, Timeout: 5 * time.Second}}})
	b.core, err = minio.NewCore(u.Host, &minio.Options{Creds: creds, Secure: b.secure, Region: region, BucketLookup: lookup, TrailingHeaders: true, MaxRetries: 1,
		Transport: dating{tr, &b.date}})
	return b, err
}

// dating remembers the store's time from its answers.
type dating struct {
	http.RoundTripper
	date *atomic.Int64
}

func (d dating) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := d.RoundTripper.RoundTrip(r)
	if err == nil {
		if t, perr := http.ParseTime(resp.Header.Get("Date")); perr == nil {
			d.date.Store(t.Unix())
		}
		if n, perr := strconv.Atoi(resp.Header.Get("Retry-After")); perr == nil {
			if after, ok := r.Context().Value(retryAfter{}).(*atomic.Int64); ok {
				after.Store(int64(n))
			}
		}
	}
	return resp, err
}

// retryAfter is the context key of the seconds that the store asks a call to wait; the SDK's errors do not have them.
type retryAfter struct{}

func listening(ctx context.Context) context.Context {
	return context.WithValue(ctx, retryAfter{}, new(atomic.Int64))
}

// StoreTime implements objstore.Dater: the time of the last answer, which may be old.
func (b *Bucket) StoreTime() (time.Time, bool) {
	s := b.date.Load()
	return time.Unix(s, 0), s != 0
}

// Put implements objstore.Bucket with one PutObject, whatever the size: one request, and no part is ever left behind.
func (b *Bucket) Put(ctx context.Context, key string, body objstore.Body, o objstore.PutOptions) (objstore.Info, error) {
	ctx = listening(ctx)
	opts := minio.PutObjectOptions{DisableMultipart: true, DisableContentSha256: !b.secure, UserMetadata: map[string]string{}, ContentType: "application/octet-stream"}
	if o.WriterID != "" {
		opts.UserMetadata[writerMeta] = o.WriterID
	}
	if o.CRC32C != nil {
		opts.UserMetadata["x-amz-checksum-crc32c"] = base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, *o.CRC32C))
	}
	if o.IfAbsent {
		opts.SetMatchETagExcept("*")
	}
	up, err := b.core.Client.PutObject(ctx, b.bucket, key, body.Reader(), body.Size, opts)
	if err == nil {
		return objstore.Info{Key: key, Size: body.Size, ETag: up.ETag, CRC32C: parseCRC(up.ChecksumCRC32C), Modified: up.LastModified, WriterID: o.WriterID}, nil
	}
	err = b.fault(ctx, "put", key, err)
	if errors.Is(err, objstore.ErrPrecondition) && o.IfAbsent { // an earlier try may have been applied and its answer lost
		if old, herr := b.Head(ctx, key); herr == nil && o.WriterID != "" && old.WriterID == o.WriterID && old.Size == body.Size {
			return old, nil
		}
	}
	return objstore.Info{}, err
}

// Get implements objstore.Bucket.
func (b *Bucket) Get(ctx context.Context, key string, r objstore.Range) (io.ReadCloser, objstore.Info, error) {
	ctx = listening(ctx)
	var opts minio.GetObjectOptions
	var err error
	switch {
	case r.Off < 0:
		err = opts.SetRange(0, r.Off)
	case r.Len > 0:
		err = opts.SetRange(r.Off, r.Off+r.Len-1)
	case r.Off > 0:
		err = opts.SetRange(r.Off, 0)
	}
	if err != nil {
		return nil, objstore.Info{}, &objstore.Error{Op: "get", Key: key, Kind: objstore.ErrRange, Err: err}
	}
	if r.Len == 0 {
		info, err := b.Head(ctx, key)
		return io.NopCloser(strings.NewReader("")), info, err
	}
	body, stat, hdr, err := b.core.GetObject(ctx, b.bucket, key, opts)
	if err != nil {
		return nil, objstore.Info{}, b.fault(ctx, "get", key, err)
	}
	info := infoOf(key, stat)
	if info.Size, err = r.SizeOf(info.Size, hdr.Get("Content-Range")); err != nil {
		return nil, objstore.Info{}, &objstore.Error{Op: "get", Key: key, Kind: objstore.ErrUnsupported, Err: errors.Join(err, body.Close())}
	}
	return body, info, nil
}

func infoOf(key string, s minio.ObjectInfo) objstore.Info {
	return objstore.Info{Key: key, Size: s.Size, ETag: s.ETag, CRC32C: parseCRC(s.ChecksumCRC32C), Modified: s.LastModified, WriterID: s.UserMetadata[writerMeta]}
}

func parseCRC(s string) *uint32 {
	v, err := base64.StdEncoding.DecodeString(s)
	if err != nil || len(v) != 4 {
		return nil
	}
	n := binary.BigEndian.Uint32(v)
	return &n
}

// Head implements objstore.Bucket.
func (b *Bucket) Head(ctx context.Context, key string) (objstore.Info, error) {
	ctx = listening(ctx)
	s, err := b.core.Client.StatObject(ctx, b.bucket, key, minio.StatObjectOptions{Checksum: true})
	if err != nil {
		return objstore.Info{}, b.fault(ctx, "head", key, err)
	}
	return infoOf(key, s), nil
}

// List implements objstore.Bucket.
func (b *Bucket) List(ctx context.Context, prefix, startAfter string) iter.Seq2[objstore.Info, error] {
	return func(yield func(objstore.Info, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		for o := range b.core.Client.ListObjects(ctx, b.bucket, minio.ListObjectsOptions{Prefix: prefix, StartAfter: startAfter, Recursive: true}) {
			if o.Err != nil {
				yield(objstore.Info{}, b.fault(ctx, "list", prefix, o.Err))
				return
			}
			if !yield(infoOf(o.Key, o), nil) {
				return
			}
		}
	}
}

const deleteBatch = 1000

// Delete implements objstore.Bucket.
func (b *Bucket) Delete(ctx context.Context, keys ...string) error {
	ctx = listening(ctx)
	failed := map[string]error{}
	for len(keys) > 0 {
		n := min(len(keys), deleteBatch)
		if n == 1 {
			if err := b.core.RemoveObject(ctx, b.bucket, keys[0], minio.RemoveObjectOptions{}); err != nil {
				if err := b.fault(ctx, "delete", keys[0], err); !errors.Is(err, objstore.ErrNotFound) {
					return err
				}
			}
			break
		}
		ch := make(chan minio.ObjectInfo, n)
		for _, k := range keys[:n] {
			ch <- minio.ObjectInfo{Key: k}
		}
		close(ch)
		for e := range b.core.RemoveObjects(ctx, b.bucket, ch, minio.RemoveObjectsOptions{}) {
			if e.ObjectName == "" { // of the request as a whole
				for _, k := range keys[:n] {
					failed[k] = b.fault(ctx, "delete", k, e.Err)
				}
				continue
			}
			failed[e.ObjectName] = b.fault(ctx, "delete", e.ObjectName, e.Err)
		}
		keys = keys[n:]
	}
	if len(failed) > 0 {
		return &objstore.DeleteError{Failed: failed}
	}
	return ctx.Err()
}

// CreateBucket implements objstore.Creator.
func (b *Bucket) CreateBucket(ctx context.Context) error {
	err := b.core.MakeBucket(ctx, b.bucket, minio.MakeBucketOptions{Region: b.region})
	if code := minio.ToErrorResponse(err).Code; err == nil || code == "BucketAlreadyOwnedByYou" {
		return nil
	}
	return b.fault(ctx, "create bucket", b.bucket, err)
}

// Close implements objstore.Bucket.
func (b *Bucket) Close() error {
	b.http.CloseIdleConnections()
	return nil
}

func (b *Bucket) fault(ctx context.Context, op, key string, err error) error {
	if cerr := ctx.Err(); cerr != nil {
		return fmt.Errorf("%s %s: %w", op, key, cerr)
	}
	r := minio.ToErrorResponse(err)
	var ne net.Error
	if r.Code == "" || errors.As(err, &ne) && r.StatusCode == 0 {
		return &objstore.Error{Op: op, Key: key, Kind: objstore.ErrUnavailable, Retryable: true, Err: err}
	}
	e := objstore.Classify(r.StatusCode, r.Code)
	e.Op, e.Key, e.Err = op, key, err
	if after, ok := ctx.Value(retryAfter{}).(*atomic.Int64); ok {
		e.RetryAfter = min(time.Duration(after.Load())*time.Second, time.Minute)
	}
	if errors.Is(e, objstore.ErrRegion) && r.Region != "" {
		e.Err = fmt.Errorf("the bucket is in %s: %w", r.Region, err)
	}
	return e
}
