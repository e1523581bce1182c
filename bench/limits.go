package main

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// limits measures what this machine can do at most, so that a result is seen as a share of it: sequential writes with a sync after each into space that has been written before, as
// the log's are; loopback TCP; CRC32C and memory copies on one core; ranged reads from a file on the tmpfs that the store lies on. Each takes `during`.
func limits(ctx context.Context, logs, store string, during time.Duration) (out []line, err error) {
	add := func(name string, value float64, err error) error {
		var l line
		l.set("limit", name)
		l.set("value", value)
		out = append(out, l)
		return err
	}
	for _, kib := range []int{4, 64, 256, 1024, 4096} {
		rate, p50, err := syncedWrites(filepath.Join(logs, "limit"), kib<<10, during)
		if err := add(fmt.Sprintf("fdatasync_%dKiB_MB/s", kib), rate, err); err != nil {
			return out, err
		}
		_ = add(fmt.Sprintf("fdatasync_%dKiB_p50_ms", kib), p50, nil)
	}
	rate, err := loopbackRate(ctx, during)
	if err := add("tcp_MB/s", rate, err); err != nil {
		return out, err
	}
	rtt, err := loopbackRoundTrip(ctx, during)
	if err := add("tcp_round_trip_p50_ms", rtt, err); err != nil {
		return out, err
	}
	buf, to := make([]byte, 4<<20), make([]byte, 4<<20)
	for i := range buf {
		buf[i] = byte(rand.Uint32())
	}
	sum := uint32(0)
	_ = add("crc32c_MB/s", repeat(during, len(buf), func() { sum ^= crc32.Checksum(buf, castagnoli) }), nil)
	_ = add("memcpy_MB/s", repeat(during, len(buf), func() { copy(to, buf) }), nil)
	rate, err = rangedReads(filepath.Join(store, "limit"), during)
	return out, errors.Join(add("ranged_get_4MiB_MB/s", rate, err), ctx.Err())
}

func repeat(during time.Duration, bytes int, f func()) float64 {
	n, began := 0, time.Now()
	for time.Since(began) < during {
		f()
		n++
	}
	return float64(n) * float64(bytes) / 1e6 / time.Since(began).Seconds()
}

const limitFile = 64 << 20

func syncedWrites(path string, size int, during time.Duration) (rate, p50 float64, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, 0, err
	}
	defer os.Remove(path)
	defer f.Close()
	buf := make([]byte, size)
	for i := range buf {
		buf[i] = byte(rand.Uint32())
	}
	for at := int64(0); at < limitFile; at += int64(size) {
		if _, err := f.WriteAt(buf, at); err != nil {
			return 0, 0, err
		}
	}
	if err := f.Sync(); err != nil {
		return 0, 0, err
	}
	var lat []time.Duration
	began := time.Now()
	for at := int64(0); time.Since(began) < during; at = (at + int64(size)) % limitFile {
		sent := time.Now()
		if _, err := f.WriteAt(buf, at); err != nil {
			return 0, 0, err
		}
		if err := syscall.Fdatasync(int(f.Fd())); err != nil {
			return 0, 0, err
		}
		lat = append(lat, time.Since(sent))
	}
	took := time.Since(began).Seconds()
	slices.Sort(lat)
	return float64(len(lat)) * float64(size) / 1e6 / took, quantile(lat, .5), nil
}

// pair is a connection over loopback.
func pair(ctx context.Context) (a, b net.Conn, err error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if a, err = (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String()); err != nil {
		return nil, nil, err
	}
	b, err = l.Accept()
	return a, b, err
}

func loopbackRate(ctx context.Context, during time.Duration) (float64, error) {
	a, b, err := pair(ctx)
	if err != nil {
		return 0, err
	}
	defer b.Close()
	got := make(chan int64)
	go func() {
		var n int64
		buf := make([]byte, 1<<20)
		for {
			k, err := b.Read(buf)
			if n += int64(k); err != nil {
				got <- n
				return
			}
		}
	}()
	buf, began := make([]byte, 1<<20), time.Now()
	for err == nil && time.Since(began) < during {
		_, err = a.Write(buf)
	}
	err = errors.Join(err, a.Close())
	n := <-got
	return float64(n) / 1e6 / time.Since(began).Seconds(), err
}

func loopbackRoundTrip(ctx context.Context, during time.Duration) (float64, error) {
	a, b, err := pair(ctx)
	if err != nil {
		return 0, err
	}
	defer a.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer b.Close()
		_, _ = io.Copy(struct{ io.Writer }{b}, struct{ io.Reader }{b}) // until a ends; not by splice
	}()
	var lat []time.Duration
	buf := make([]byte, 1)
	for began := time.Now(); err == nil && time.Since(began) < during; {
		sent := time.Now()
		if _, err = a.Write(buf); err == nil {
			_, err = io.ReadFull(a, buf)
		}
		lat = append(lat, time.Since(sent))
	}
	err = errors.Join(err, a.Close())
	<-done
	slices.Sort(lat)
	return quantile(lat, .5), err
}

func rangedReads(path string, during time.Duration) (float64, error) {
	if err := os.WriteFile(path, make([]byte, limitFile), 0o600); err != nil {
		return 0, err
	}
	defer os.Remove(path)
	buf, at := make([]byte, 4<<20), int64(0)
	var failed error
	rate := repeat(during, len(buf), func() {
		f, err := os.Open(path) // as objstore/fs does for each
		if err == nil {
			_, err = f.ReadAt(buf, at)
			err = errors.Join(err, f.Close())
		}
		failed = errors.Join(failed, err)
		at = (at + int64(len(buf))) % limitFile
	})
	return rate, failed
}

// quantile is one of sorted times, in ms.
func quantile(sorted []time.Duration, p float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return float64(sorted[min(len(sorted)-1, int(p*float64(len(sorted))))].Nanoseconds()) / 1e6
}
