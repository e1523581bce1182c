// Package s3 is a Bucket over aws-sdk-go-v2: AWS itself, with its whole credential chain, and other stores where it is asked for.
package s3

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	"github.com/estran/estran/objstore"
)

// Bucket implements objstore.Bucket.
type Bucket struct {
	c      *s3.Client
	bucket string
	region string
	date   atomic.Int64 // of the last answer, Unix seconds
}

var (
	_ objstore.Bucket  = (*Bucket)(nil)
	_ objstore.Creator = (*Bucket)(nil)
	_ objstore.Dater   = (*Bucket)(nil)
)

const writerMeta = "estran-writer"

// Open makes a client; it sends no request but those that credentials need. conns is the number of connections kept open.
func Open(ctx context.Context, l objstore.Location, conns int) (*Bucket, error) {
	b := &Bucket{bucket: l.Bucket}
	client := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) { t.MaxIdleConnsPerHost = conns })
	opts := []func(*config.LoadOptions) error{config.WithHTTPClient(client), config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} })}
	if l.Region != "" {
		opts = append(opts, config.WithRegion(l.Region))
	}
	cfg, err := config.LoadDefaultConfig(ctx, opts...)
	if err != nil {
		return nil, fmt.Errorf("AWS configuration: %w", err)
	}
	if cfg.Region == "" {
		cfg.Region = "us-east-1"
	}
	b.region = cfg.Region
	b.c = s3.NewFromConfig(cfg, func(o *s3.Options) {
		if l.Endpoint != "" {
			o.BaseEndpoint = aws.String(l.Endpoint)
		}
		o.UsePathStyle = l.PathStyle
		o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
		o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
		o.DisableLogOutputChecksumValidationSkipped = true
		o.HTTPClient = dating{o.HTTPClient, &b.date}
	})
	return b, nil
}

// dating remembers the store's time from its answers.
type dating struct {
	aws.HTTPClient
	date *atomic.Int64
}

func (d dating) Do(r *http.Request) (*http.Response, error) {
	resp, err := d.HTTPClient.Do(r)
	if err == nil {
		if t, perr := http.ParseTime(resp.Header.Get("Date")); perr == nil {
			d.date.Store(t.Unix())
		}
	}
	return resp, err
}

// StoreTime implements objstore.Dater: the time of the last answer, which may be old.
func (b *Bucket) StoreTime() (time.Time, bool) {
	s := b.date.Load()
	return time.Unix(s, 0), s != 0
}

// Put implements objstore.Bucket with one PutObject. The payload is not signed: its CRC32C protects it.
func (b *Bucket) Put(ctx context.Context, key string, body objstore.Body, o objstore.PutOptions) (objstore.Info, error) {
	in := &s3.PutObjectInput{Bucket: &b.bucket, Key: &key, Body: body.Reader(), ContentLength: &body.Size}
	if o.WriterID != "" {
		in.Metadata = map[string]string{writerMeta: o.WriterID}
	}
	if o.CRC32C != nil {
		in.ChecksumCRC32C = aws.String(base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, *o.CRC32C)))
	}
	if o.IfAbsent {
		in.IfNoneMatch = aws.String("*")
	}
	out, err := b.c.PutObject(ctx, in, s3.WithAPIOptions(v4.SwapComputePayloadSHA256ForUnsignedPayloadMiddleware))
	if err == nil {
		return objstore.Info{Key: key, Size: body.Size, ETag: aws.ToString(out.ETag), CRC32C: parseCRC(out.ChecksumCRC32C), WriterID: o.WriterID}, nil
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
	in := &s3.GetObjectInput{Bucket: &b.bucket, Key: &key}
	switch {
	case r.Len == 0:
		info, err := b.Head(ctx, key)
		return io.NopCloser(strings.NewReader("")), info, err
	case r.Off < 0:
		in.Range = aws.String(fmt.Sprintf("bytes=%d", r.Off))
	case r.Len > 0:
		in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", r.Off, r.Off+r.Len-1))
	case r.Off > 0:
		in.Range = aws.String(fmt.Sprintf("bytes=%d-", r.Off))
	}
	out, err := b.c.GetObject(ctx, in)
	if err != nil {
		return nil, objstore.Info{}, b.fault(ctx, "get", key, err)
	}
	info := objstore.Info{Key: key, Size: aws.ToInt64(out.ContentLength), ETag: aws.ToString(out.ETag), Modified: aws.ToTime(out.LastModified), WriterID: out.Metadata[writerMeta]}
	if info.Size, err = r.SizeOf(info.Size, aws.ToString(out.ContentRange)); err != nil {
		return nil, objstore.Info{}, &objstore.Error{Op: "get", Key: key, Kind: objstore.ErrUnsupported, Err: errors.Join(err, out.Body.Close())}
	}
	return out.Body, info, nil
}

func parseCRC(s *string) *uint32 {
	v, err := base64.StdEncoding.DecodeString(aws.ToString(s))
	if err != nil || len(v) != 4 {
		return nil
	}
	n := binary.BigEndian.Uint32(v)
	return &n
}

// Head implements objstore.Bucket.
func (b *Bucket) Head(ctx context.Context, key string) (objstore.Info, error) {
	out, err := b.c.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &b.bucket, Key: &key, ChecksumMode: types.ChecksumModeEnabled})
	if err != nil {
		return objstore.Info{}, b.fault(ctx, "head", key, err)
	}
	return objstore.Info{Key: key, Size: aws.ToInt64(out.ContentLength), ETag: aws.ToString(out.ETag), CRC32C: parseCRC(out.ChecksumCRC32C),
		Modified: aws.ToTime(out.LastModified), WriterID: out.Metadata[writerMeta]}, nil
}

// List implements objstore.Bucket.
func (b *Bucket) List(ctx context.Context, prefix, startAfter string) iter.Seq2[objstore.Info, error] {
	return func(yield func(objstore.Info, error) bool) {
		in := &s3.ListObjectsV2Input{Bucket: &b.bucket, Prefix: &prefix}
		if startAfter != "" {
			in.StartAfter = &startAfter
		}
		for p := s3.NewListObjectsV2Paginator(b.c, in); p.HasMorePages(); {
			page, err := p.NextPage(ctx)
			if err != nil {
				yield(objstore.Info{}, b.fault(ctx, "list", prefix, err))
				return
			}
			for _, o := range page.Contents {
				if !yield(objstore.Info{Key: aws.ToString(o.Key), Size: aws.ToInt64(o.Size), ETag: aws.ToString(o.ETag), Modified: aws.ToTime(o.LastModified)}, nil) {
					return
				}
			}
		}
	}
}

const deleteBatch = 1000

// Delete implements objstore.Bucket.
func (b *Bucket) Delete(ctx context.Context, keys ...string) error {
	if len(keys) == 1 {
		_, err := b.c.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &b.bucket, Key: &keys[0]})
		if err != nil {
			if err := b.fault(ctx, "delete", keys[0], err); !errors.Is(err, objstore.ErrNotFound) {
				return err
			}
		}
		return nil
	}
	failed := map[string]error{}
	for len(keys) > 0 {
		n := min(len(keys), deleteBatch)
		ids := make([]types.ObjectIdentifier, n)
		for i := range ids {
			ids[i].Key = &keys[i]
		}
		out, err := b.c.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: &b.bucket, Delete: &types.Delete{Objects: ids, Quiet: aws.Bool(true)}},
			func(o *s3.Options) { o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenSupported })
		if err != nil {
			return b.fault(ctx, "delete", keys[0], err)
		}
		for _, e := range out.Errors {
			if code := aws.ToString(e.Code); code != "NoSuchKey" {
				c := objstore.Classify(0, code)
				c.Op, c.Key, c.Err = "delete", aws.ToString(e.Key), errors.New(aws.ToString(e.Message))
				failed[c.Key] = c
			}
		}
		keys = keys[n:]
	}
	if len(failed) > 0 {
		return &objstore.DeleteError{Failed: failed}
	}
	return nil
}

// CreateBucket implements objstore.Creator.
func (b *Bucket) CreateBucket(ctx context.Context) error {
	in := &s3.CreateBucketInput{Bucket: &b.bucket}
	if b.region != "us-east-1" {
		in.CreateBucketConfiguration = &types.CreateBucketConfiguration{LocationConstraint: types.BucketLocationConstraint(b.region)}
	}
	_, err := b.c.CreateBucket(ctx, in)
	if _, ok := errors.AsType[*types.BucketAlreadyOwnedByYou](err); ok || err == nil {
		return nil
	}
	return b.fault(ctx, "create bucket", b.bucket, err)
}

// Close implements objstore.Bucket.
func (b *Bucket) Close() error { return nil }

func (b *Bucket) fault(ctx context.Context, op, key string, err error) error {
	if cerr := ctx.Err(); cerr != nil {
		return fmt.Errorf("%s %s: %w", op, key, cerr)
	}
	status, code := 0, ""
	var resp *http.Response
	if re, ok := errors.AsType[*awshttp.ResponseError](err); ok && re.Response != nil {
		status, resp = re.HTTPStatusCode(), re.Response.Response
	}
	if ae, ok := errors.AsType[smithy.APIError](err); ok && status != 0 {
		code = ae.ErrorCode()
	}
	e := objstore.Classify(status, code)
	e.Op, e.Key, e.Err = op, key, err
	if resp != nil {
		if r := resp.Header.Get("X-Amz-Bucket-Region"); r != "" && errors.Is(e, objstore.ErrRegion) {
			e.Err = fmt.Errorf("the bucket is in %s: %w", r, err)
		}
		if s, perr := strconv.Atoi(resp.Header.Get("Retry-After")); perr == nil {
			e.RetryAfter = min(time.Duration(s)*time.Second, time.Minute)
		}
	}
	return e
}
