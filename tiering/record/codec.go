package record

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// Codec is a batch's compression, as its attribute bits name it.
type Codec int8

// The codecs of Kafka.
const (
	CodecNone Codec = iota
	CodecGzip
	CodecSnappy
	CodecLZ4
	CodecZstd
)

// String returns the name as in compression.type.
func (c Codec) String() string {
	if names := [...]string{"none", "gzip", "snappy", "lz4", "zstd"}; c >= 0 && int(c) < len(names) {
		return names[c]
	}
	return fmt.Sprintf("codec(%d)", int8(c))
}

// ParseCodec is the inverse of String; "uncompressed" is none.
func ParseCodec(s string) (Codec, error) {
	for c := CodecNone; c <= CodecZstd; c++ {
		if s == c.String() {
			return c, nil
		}
	}
	if s == "uncompressed" {
		return CodecNone, nil
	}
	return 0, fmt.Errorf("%w: %q", ErrCodec, s)
}

// Decoders are expensive to make, so they are pooled per codec. A pooled decoder holds no reference to its last input.
var (
	gzipReaders sync.Pool
	lz4Readers  sync.Pool
	zstdReaders sync.Pool
)

// zstdWindowMax bounds the memory of one zstd decoder; Kafka's clients use windows up to 8 MiB.
const zstdWindowMax = 32 << 20

// decompressor streams the records of a batch. Close gives its decoder back.
type decompressor struct {
	io.Reader
	codec Codec
}

func newDecompressor(c Codec, src []byte) (*decompressor, error) {
	in := bytes.NewReader(src)
	switch c {
	case CodecNone:
		return &decompressor{in, c}, nil
	case CodecGzip:
		if z, ok := gzipReaders.Get().(*gzip.Reader); ok {
			if err := z.Reset(in); err != nil {
				gzipReaders.Put(z)
				return nil, fmt.Errorf("%w: gzip: %v", ErrInvalid, err)
			}
			return &decompressor{z, c}, nil
		}
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, fmt.Errorf("%w: gzip: %v", ErrInvalid, err)
		}
		return &decompressor{z, c}, nil
	case CodecSnappy:
		return &decompressor{&snappyReader{src: src}, c}, nil
	case CodecLZ4:
		z, ok := lz4Readers.Get().(*lz4.Reader)
		if !ok {
			z = lz4.NewReader(nil)
		}
		z.Reset(in)
		return &decompressor{z, c}, nil
	case CodecZstd:
		z, ok := zstdReaders.Get().(*zstd.Decoder)
		if !ok {
			var err error
			z, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindowMax))
			if err != nil {
				return nil, fmt.Errorf("making a zstd decoder: %w", err)
			}
		}
		if err := z.Reset(in); err != nil {
			return nil, fmt.Errorf("%w: zstd: %v", ErrInvalid, err)
		}
		return &decompressor{z, c}, nil
	}
	return nil, fmt.Errorf("%w: %d", ErrCodec, c)
}

func (d *decompressor) Close() {
	switch z := d.Reader.(type) {
	case *gzip.Reader:
		gzipReaders.Put(z)
	case *lz4.Reader:
		z.Reset(bytes.NewReader(nil))
		lz4Readers.Put(z)
	case *zstd.Decoder:
		if z.Reset(nil) == nil {
			zstdReaders.Put(z)
		}
	}
	d.Reader = nil
}

// xerialMagic begins the framing of snappy-java: magic, version, minimum version, then blocks with a length each.
var xerialMagic = []byte{0x82, 'S', 'N', 'A', 'P', 'P', 'Y', 0}

const xerialHeader = 16

// snappyReader decodes raw snappy blocks and snappy-java's framing, a block at a time.
type snappyReader struct {
	src    []byte
	framed bool
	begun  bool
	block  []byte
}

// snappyBlockMax bounds one block: producers' blocks are 32 KiB framed, and raw a whole batch.
const snappyBlockMax = 64 << 20

func (r *snappyReader) Read(p []byte) (int, error) {
	for len(r.block) == 0 {
		if err := r.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.block)
	r.block = r.block[n:]
	return n, nil
}

func (r *snappyReader) next() error {
	if !r.begun {
		r.begun = true
		if bytes.HasPrefix(r.src, xerialMagic) && len(r.src) >= xerialHeader {
			r.framed, r.src = true, r.src[xerialHeader:]
		}
	}
	if len(r.src) == 0 {
		return io.EOF
	}
	in := r.src
	if r.framed {
		if len(r.src) < 4 {
			return fmt.Errorf("%w: snappy frame of %d bytes", ErrInvalid, len(r.src))
		}
		n := binary.BigEndian.Uint32(r.src)
		if uint64(n) > uint64(len(r.src)-4) {
			return fmt.Errorf("%w: snappy block of %d bytes, %d are left", ErrInvalid, n, len(r.src)-4)
		}
		in, r.src = r.src[4:4+n], r.src[4+n:]
	} else {
		r.src = nil
	}
	n, err := s2.DecodedLen(in)
	if err != nil || n > snappyBlockMax || n > 22*len(in)+1024 { // three bytes copy 64 at most
		return fmt.Errorf("%w: snappy block of %d bytes says it holds %d: %v", ErrInvalid, len(in), n, err)
	}
	r.block, err = s2.Decode(nil, in)
	if err != nil {
		return fmt.Errorf("%w: snappy: %v", ErrInvalid, err)
	}
	return nil
}

// Compress returns src compressed with codec c.
func Compress(c Codec, src []byte) ([]byte, error) {
	var out bytes.Buffer
	var w io.WriteCloser
	switch c {
	case CodecNone:
		return src, nil
	case CodecGzip:
		w = gzip.NewWriter(&out)
	case CodecSnappy:
		return s2.EncodeSnappy(nil, src), nil
	case CodecLZ4:
		w = lz4.NewWriter(&out)
	case CodecZstd:
		z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
		if err != nil {
			return nil, fmt.Errorf("making a zstd encoder: %w", err)
		}
		return z.EncodeAll(src, nil), nil // takes no memory for a window that src does not fill
	default:
		return nil, fmt.Errorf("%w: %d", ErrCodec, c)
	}
	if _, err := w.Write(src); err != nil {
		return nil, fmt.Errorf("compressing with %s: %w", c, err)
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("compressing with %s: %w", c, err)
	}
	return out.Bytes(), nil
}
