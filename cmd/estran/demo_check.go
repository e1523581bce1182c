package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
)

const (
	demoSize   = 1000 // bytes of every record's value
	demoReport = "report it, with the files that are kept"
)

// demoCheck knows what must be consumed. The demo alone writes to its topic, and its producer gives nothing up: a partition's record number N lies at offset N, and what is not
// there is lost, repeated or altered.
type demoCheck struct {
	seed     uint64
	progress chan struct{} // holds a value when something was consumed

	mu            sync.Mutex
	parts         [demoPartitions]struct{ sent, acked, consumed int64 }
	again         int64 // records that the group was given more than once
	err           error // what the consumer heard last
	recent, whole latencies
}

func newDemoCheck(seed uint64) *demoCheck {
	return &demoCheck{seed: seed, progress: make(chan struct{}, 1)}
}

// value is the one value that a partition's record of this number has: to be read by people at its beginning, by chance behind it.
func (c *demoCheck) value(p int32, number int64) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], c.seed)
	binary.LittleEndian.PutUint64(key[8:], uint64(p))
	binary.LittleEndian.PutUint64(key[16:], uint64(number))
	var filler [demoSize / 2]byte
	_, _ = rand.NewChaCha8(key).Read(filler[:]) // never fails
	v := fmt.Appendf(make([]byte, 0, 2*demoSize), `{"partition":%d,"number":%d,"filler":"`, p, number)
	v = hex.AppendEncode(v, filler[:])
	return append(v[:demoSize-2], `"}`...)
}

// next is the value to send next to a partition.
func (c *demoCheck) next(p int32) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.parts[p].sent
	c.parts[p].sent++
	return c.value(p, n)
}

func (c *demoCheck) acknowledged(p int32, took time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.parts[p].acked++
	c.recent.add(took)
	c.whole.add(took)
}

func (c *demoCheck) trouble(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
}

// consumed checks a record that the group was given. A record at an offset that was seen before is no fault if it is the same: the group began again at an older commit.
func (c *demoCheck) consumed(p int32, offset int64, value []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	found := func(code, format string, args ...any) error {
		return &fault{Code: code, What: fmt.Sprintf("topic %s, partition %d, offset %d: ", demoTopic, p, offset) + fmt.Sprintf(format, args...), Fix: demoReport}
	}
	part := &c.parts[p]
	if !bytes.Equal(value, c.value(p, offset)) {
		var of int32
		var n int64
		_, err := fmt.Sscanf(string(value), `{"partition":%d,"number":%d,`, &of, &n)
		switch {
		case err != nil || of < 0 || of >= demoPartitions || !bytes.Equal(value, c.value(of, n)):
			return found("E_DEMO_ALTERED", "a record that the demo did not write, or an altered one: %.60q", value)
		case of != p:
			return found("E_DEMO_ALTERED", "record %d of partition %d is here", n, of)
		case n < offset:
			return found("E_DEMO_REPEATED", "record %d is here, which was there before", n)
		}
		return found("E_DEMO_LOST", "record %d is here where %d is due: %d are lost", n, offset, n-offset)
	}
	switch {
	case offset > part.consumed:
		return found("E_DEMO_LOST", "it came where offset %d is due: %d records are lost", part.consumed, offset-part.consumed)
	case offset < part.consumed:
		c.again++
		return nil
	}
	part.consumed++
	select {
	case c.progress <- struct{}{}:
	default:
	}
	return nil
}

// sums counts records.
func (c *demoCheck) sums() (sent, acked, consumed int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.parts {
		sent, acked, consumed = sent+p.sent, acked+p.acked, consumed+p.consumed
	}
	return sent, acked, consumed
}

func (c *demoCheck) done() bool {
	sent, acked, consumed := c.sums()
	return sent == acked && acked == consumed
}

// missing is the fault of a run whose records did not all come in time.
func (c *demoCheck) missing() error {
	sent, acked, _ := c.sums()
	c.mu.Lock()
	defer c.mu.Unlock()
	f := &fault{Code: "E_DEMO_UNACKED", What: fmt.Sprintf("%d of %d records were not acknowledged within %s", sent-acked, sent, demoPatience), Fix: demoReport}
	for p, part := range c.parts {
		if part.consumed < part.acked {
			f.Code, f.What = "E_DEMO_LOST", fmt.Sprintf("topic %s, partition %d: %d records were acknowledged, the last %d of them did not come within %s", demoTopic, p, part.acked,
				part.acked-part.consumed, demoPatience)
			break
		}
	}
	if c.err != nil {
		f.Notes = append(f.Notes, note{"seen", c.err.Error()})
	}
	return f
}

// latencies is a histogram whose buckets grow by a twentieth, so that it has a size.
type latencies struct {
	buckets [400]int64
	count   int64
}

func (l *latencies) add(d time.Duration) {
	i := int(math.Log(float64(max(d.Microseconds(), 1))) / math.Log(1.05))
	l.buckets[min(i, len(l.buckets)-1)]++
	l.count++
}

func (l *latencies) quantile(q float64) string {
	left := int64(math.Ceil(q * float64(l.count)))
	for i, n := range l.buckets {
		if left -= n; n > 0 && left <= 0 {
			us := math.Pow(1.05, float64(i)+0.5)
			return fmt.Sprintf("%.*fms", map[bool]int{true: 1}[us < 10_000], us/1000)
		}
	}
	return "-"
}

// quantiles are those since the last call.
func (c *demoCheck) quantiles() (p50, p99 string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() { c.recent = latencies{} }()
	return c.recent.quantile(0.5), c.recent.quantile(0.99)
}

// demoPrinter writes columns on a terminal and key=value elsewhere.
type demoPrinter struct {
	mu    sync.Mutex
	w     io.Writer
	tty   bool
	color bool
	rows  int

	at              time.Time // of the last row, with what was counted then
	acked, consumed int64
}

func newDemoPrinter(w io.Writer) *demoPrinter {
	tty := isTerminal(w)
	return &demoPrinter{w: w, tty: tty, color: tty && os.Getenv("NO_COLOR") == ""}
}

type demoField struct {
	key, value string
	width      int
}

func (p *demoPrinter) row(fields []demoField) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var head, row []string
	for _, f := range fields {
		head, row = append(head, fmt.Sprintf("%*s", f.width, f.key)), append(row, fmt.Sprintf("%*s", f.width, f.value))
		if !p.tty {
			row[len(row)-1] = f.key + "=" + f.value
		}
	}
	if p.tty && p.rows%20 == 0 {
		fmt.Fprintln(p.w, strings.TrimRight(strings.Join(head, "  "), " "))
	}
	p.rows++
	fmt.Fprintln(p.w, strings.TrimRight(strings.Join(row, " "+map[bool]string{true: " "}[p.tty]), " "))
}

// event tells what the demo does to its voters.
func (p *demoPrinter) event(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	text := fmt.Sprintf(format, args...)
	if p.color {
		text = "\x1b[33m" + text + "\x1b[0m"
	}
	fmt.Fprintln(p.w, text)
}

// line tells how the run goes.
func (d *demo) line(began time.Time) {
	_, acked, consumed := d.check.sums()
	p50, p99 := d.check.quantiles()
	objects, size := d.objects()
	led, p, now := d.leaders(), d.print, time.Now()
	if p.at.IsZero() {
		p.at = began
	}
	perSecond := func(n int64) string {
		return humanize.Bytes(uint64(float64(n*demoSize)/now.Sub(p.at).Seconds())) + "/s"
	}
	bare := func(s string) string { return strings.ReplaceAll(s, " ", "") }
	fields := []demoField{{"t", now.Sub(began).Round(time.Second).String(), 6}, {"produced", bare(perSecond(acked - p.acked)), 9}, {"consumed", bare(perSecond(consumed - p.consumed)), 9},
		{"lag", fmt.Sprint(max(acked-consumed, 0)), 6}, {"ack_p50", p50, 8}, {"ack_p99", p99, 8}, {"objects", fmt.Sprint(objects), 7}, {"stored", bare(humanize.Bytes(uint64(size))), 7}}
	for i := range d.nodes {
		fields = append(fields, demoField{fmt.Sprint("voter", i+1), leads(led, i+1), -20})
	}
	p.row(fields)
	p.at, p.acked, p.consumed = now, acked, consumed
}

// summary tells how the run went.
func (d *demo) summary(took time.Duration, err error) {
	sent, acked, consumed := d.check.sums()
	c := d.check
	c.mu.Lock()
	defer c.mu.Unlock()
	verdict := "every acknowledged record was consumed exactly once, in order and unchanged"
	if err != nil {
		verdict = "FAILED, see the error"
	}
	objects, size := d.objects()
	fmt.Fprintf(d.s.out, "\nsummary   %s\n  records   %s sent, %s acknowledged, %s consumed and checked in %s; %s were given to the group again\n  acks      p50 %s, p99 %s\n  voters    killed %d times\n  objects   %d, %s\n",
		verdict, humanize.Comma(sent), humanize.Comma(acked), humanize.Comma(consumed), took.Round(100*time.Millisecond), humanize.Comma(c.again), c.whole.quantile(0.5), c.whole.quantile(0.99),
		d.kills.Load(), objects, humanize.Bytes(uint64(size)))
}
