package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// usage is what a cluster has used so far, summed over its nodes, and this process, in which the clients run.
type usage struct {
	cpu     float64 // seconds of the nodes
	client  float64 // seconds of this process
	written float64 // bytes that the nodes had the kernel write to a disk
	flushes float64 // of the disk that the logs lie on, by whomever
	lo      float64 // bytes over loopback, by whomever
	metrics map[string]float64
}

// What is asked of Estran's own metrics: sums over all series of a name that contain a text.
var asked = []struct{ key, name, label string }{
	{"fdatasyncs", "estran_wal_fsync_duration_seconds_count", ""},
	{"puts", "estran_tier_uploads_total", `outcome="committed"`},
	{"put_bytes", "estran_object_bytes_total", `direction="out"`},
	{"gets", "estran_object_requests_total", `class="get"`},
	{"cold_bytes", "estran_fetch_bytes_total", `tier="object"`},
}

// ticks is USER_HZ, which is 100 on every Linux.
const ticks = 100

func (c *cluster) usage(ctx context.Context, disk string) (u usage, err error) {
	u.metrics = map[string]float64{}
	for _, s := range c.servers {
		cpu, written, err := processUsage(s.pid())
		if err != nil {
			return u, err
		}
		u.cpu, u.written = u.cpu+cpu, u.written+written
		if v, ok := s.(voter); ok {
			err := samples(ctx, v.HTTP, func(name, labels string, value float64) {
				for _, a := range asked {
					if name == a.name && strings.Contains(labels, a.label) {
						u.metrics[a.key] += value
					}
				}
			})
			if err != nil {
				return u, err
			}
		}
	}
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return u, err
	}
	u.client = time.Duration(r.Utime.Nano() + r.Stime.Nano()).Seconds()
	u.flushes = diskFlushes(disk)
	u.lo, err = loopbackBytes()
	return u, err
}

// processUsage is a process's CPU time in seconds and the bytes it has had written.
func processUsage(pid int) (cpu, written float64, err error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	for _, i := range []int{11, 12} { // utime and stime; the command's name may have blanks
		v, err := strconv.ParseFloat(f[i], 64)
		if err != nil {
			return 0, 0, fmt.Errorf("the CPU time of process %d: %w", pid, err)
		}
		cpu += v / ticks
	}
	io, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return 0, 0, err
	}
	return cpu, keyed(string(io), "write_bytes:"), nil
}

// keyed is the number behind a key at the begin of a line.
func keyed(text, key string) float64 {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			if f := strings.Fields(rest); len(f) > 0 {
				v, _ := strconv.ParseFloat(f[0], 64) // the kernel writes numbers there
				return v
			}
		}
	}
	return 0
}

// memory is the resident memory of all nodes, now and at most, in MiB.
func (c *cluster) memory() (now, peak float64, err error) {
	for _, s := range c.servers {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.pid()))
		if err != nil {
			return 0, 0, err
		}
		now, peak = now+keyed(string(b), "VmRSS:")/1024, peak+keyed(string(b), "VmHWM:")/1024
	}
	return now, peak, nil
}

// diskStat is the file with the counters of the disk that a directory lies on; "" where that is no disk of its own.
func diskStat(dir string) string {
	var st syscall.Stat_t
	if syscall.Stat(dir, &st) != nil {
		return ""
	}
	dev := uint64(st.Dev)
	path := fmt.Sprintf("/sys/dev/block/%d:%d/stat", dev>>8&0xfff, dev&0xff|dev>>12&0xfff00)
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	return path
}

func diskFlushes(stat string) float64 {
	b, err := os.ReadFile(stat)
	f := strings.Fields(string(b))
	if err != nil || len(f) < 16 {
		return 0
	}
	v, _ := strconv.ParseFloat(f[15], 64) // the kernel writes numbers there
	return v
}

func loopbackBytes() (float64, error) {
	b, err := os.ReadFile("/proc/net/dev")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "lo:"); ok {
			return strconv.ParseFloat(strings.Fields(rest)[0], 64)
		}
	}
	return 0, errors.New("there is no loopback in /proc/net/dev")
}

// samples hands each sample of a node's metrics to f.
func samples(ctx context.Context, addr string, f func(name, labels string, value float64)) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return parseSamples(resp.Body, f)
}

func parseSamples(in io.Reader, f func(name, labels string, value float64)) error {
	sc := bufio.NewScanner(in)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := sc.Text()
		at := strings.LastIndexByte(line, ' ')
		if at < 0 || line[0] == '#' {
			continue
		}
		v, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			return fmt.Errorf("metrics: %s: %w", line, err)
		}
		name, labels, _ := strings.Cut(line[:at], "{")
		f(name, labels, v)
	}
	return sc.Err()
}

// unsealed is the most bytes of a shard that are not sealed.
func (c *cluster) unsealed(ctx context.Context) (most float64, err error) {
	for _, s := range c.servers {
		if v, ok := s.(voter); ok {
			err := samples(ctx, v.HTTP, func(name, _ string, value float64) {
				if name == "estran_unuploaded_bytes" {
					most = max(most, value)
				}
			})
			if err != nil {
				return most, err
			}
		}
	}
	return most, nil
}

// watch looks at what is not sealed until it is ended, which returns the most that was seen.
func (c *cluster) watch(ctx context.Context) (end func() float64) {
	if c.voters == nil {
		return func() float64 { return 0 }
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	var most float64
	look := func() {
		if n, err := c.unsealed(context.WithoutCancel(ctx)); err == nil { // a node that answers nothing fails elsewhere
			most = max(most, n)
		}
	}
	go func() {
		defer close(done)
		t := time.NewTicker(300 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
				look()
			}
		}
	}()
	return func() float64 {
		cancel()
		<-done
		look()
		return most
	}
}

// sealBytes is tiering.seal_bytes' default, which the bench leaves as it is.
const sealBytes = 64 << 20

// borrowed: what a run owes to the store it has not paid.
func borrowed(unsealed float64) bool { return unsealed > 4*sealBytes }

// measure runs f, which returns the bytes that it has moved, and puts into the line what that has cost, under keys that begin with prefix.
func (r *run) measure(ctx context.Context, prefix string, f func() (int64, error)) error {
	set := func(key string, v float64) { r.l.set(prefix+key, v) }
	before, err := r.c.usage(ctx, r.b.disk)
	if err != nil {
		return err
	}
	end := r.c.watch(ctx)
	began := time.Now()
	n, err := f()
	took := time.Since(began).Seconds()
	unsealed := end()
	if err != nil {
		return err
	}
	after, err := r.c.usage(ctx, r.b.disk)
	if err != nil {
		return err
	}
	rss, peak, err := r.c.memory()
	if err != nil {
		return err
	}
	bytes, gib := float64(n), float64(n)/(1<<30)
	set("MB", bytes/1e6)
	set("MB/s", bytes/1e6/took)
	set("cpu_s/GiB", (after.cpu-before.cpu)/gib)
	set("client_s/GiB", (after.client-before.client)/gib)
	set("rss_MiB", rss)
	set("peak_MiB", peak)
	set("disk_B/B", (after.written-before.written)/bytes)
	if r.b.disk != "" {
		set("flushes/GiB", (after.flushes-before.flushes)/gib)
	}
	set("lo_B/B", (after.lo-before.lo)/bytes)
	if r.c.system != estran {
		return nil
	}
	m := func(key string) float64 { return after.metrics[key] - before.metrics[key] }
	set("fdatasyncs/GiB", m("fdatasyncs")/gib)
	set("gets", m("gets"))
	set("from_objects_MB", m("cold_bytes")/1e6)
	set("puts", m("puts"))
	if p := m("puts"); p > 0 {
		set("put_MiB", m("put_bytes")/p/(1<<20))
	}
	set("unsealed_MiB", unsealed/(1<<20))
	if borrowed(unsealed) {
		r.l.set("counts", "borrowed")
	}
	return nil
}

// waitSealed waits until everything is sealed.
func (c *cluster) waitSealed(ctx context.Context) error {
	last := 0.0
	err := until(ctx, "sealing", func() bool {
		n, err := c.unsealed(ctx)
		if err == nil { // a node may answer late
			last = n
		}
		return err == nil && n == 0
	})
	if err != nil {
		return fmt.Errorf("%w: %.0f bytes of a shard are left", err, last)
	}
	return nil
}
