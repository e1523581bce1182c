package raftlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if spec := os.Getenv(writerEnv); spec != "" {
		fmt.Fprintln(os.Stderr, writer(spec))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// command makes an entry whose bytes follow from index, term and size.
func command(index, term uint64, dir, payload int) *raft.Log {
	rng := rand.New(rand.NewPCG(index, term))
	ext := make([]byte, payload)
	for i := range ext {
		ext[i] = byte(rng.Uint32())
	}
	place := PlaceInline
	if payload == 0 {
		place = PlaceNone
	}
	data := AppendEntryHeader(nil, EntryHeader{Term: term, Version: 1, Place: place, PayloadLen: uint32(payload), PayloadCRC: crcOf(ext)})
	for range dir {
		data = append(data, byte(rng.Uint32()))
	}
	if payload == 0 {
		ext = nil
	}
	return &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: data, Extensions: ext, AppendedAt: time.Unix(0, int64(index))}
}

func open(t testing.TB, fs FS, change func(*Config)) *Log {
	t.Helper()
	cfg := Config{Dir: "/log", Group: 7, FS: fs, FileBytes: 256 << 10, TailBytes: 64 << 10}
	if change != nil {
		change(&cfg)
	}
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func same(t testing.TB, l *Log, want *raft.Log) {
	t.Helper()
	var got raft.Log
	if err := l.GetLog(want.Index, &got); err != nil {
		t.Fatalf("GetLog %d: %v", want.Index, err)
	}
	if got.Term != want.Term || got.Type != want.Type || !bytes.Equal(got.Data, want.Data) || got.Extensions != nil || !got.AppendedAt.Equal(want.AppendedAt) {
		t.Fatalf("entry %d: got %+v", want.Index, got)
	}
	e, err := l.Entry(want.Index, want.Term)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Release()
	p := make([]byte, e.PayloadLen)
	if err := e.ReadPayload(p, 0); err != nil || !bytes.Equal(p, want.Extensions) {
		t.Fatalf("payload of %d: %v", want.Index, err)
	}
}

func store(t testing.TB, l *Log, es ...*raft.Log) {
	t.Helper()
	if err := l.StoreLogs(es); err != nil {
		t.Fatal(err)
	}
}

func TestStoreReadReopen(t *testing.T) {
	fs := newMemFS()
	l := open(t, fs, nil)
	if first, _ := l.FirstIndex(); first != 0 {
		t.Errorf("first of an empty log: %d", first)
	}
	var all []*raft.Log
	for i := uint64(1); i <= 300; {
		var batch []*raft.Log
		for range 1 + i%5 {
			batch = append(batch, command(i, 1+i/100, int(i%97), int(i*37%5000)))
			i++
		}
		store(t, l, batch...)
		all = append(all, batch...)
	}
	conf := &raft.Log{Index: uint64(len(all) + 1), Term: 9, Type: raft.LogConfiguration, Data: []byte("conf"), Extensions: []byte("ext")}
	store(t, l, conf)
	for range 3 {
		for _, e := range all {
			same(t, l, e)
		}
		var got raft.Log
		if err := l.GetLog(conf.Index, &got); err != nil || string(got.Data) != "conf" || string(got.Extensions) != "ext" {
			t.Fatalf("configuration: %+v %v", got, err)
		}
		if last, _ := l.LastIndex(); last != conf.Index {
			t.Fatalf("last %d", last)
		}
		if err := l.GetLog(conf.Index+1, &got); err != raft.ErrLogNotFound {
			t.Fatalf("above the end: %v", err)
		}
		if _, err := l.Entry(5, 77); !errors.Is(err, ErrGone) {
			t.Fatalf("other term: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l = open(t, fs, nil)
	}
}

func TestRefusals(t *testing.T) {
	l := open(t, newMemFS(), nil)
	store(t, l, command(1, 3, 1, 10), command(2, 3, 1, 10))
	wrong := command(3, 3, 1, 10)
	wrong.Term = 4
	if err := l.StoreLog(wrong); !errors.Is(err, ErrTermMismatch) {
		t.Errorf("term: %v", err)
	}
	short := command(3, 3, 1, 10)
	short.Extensions = short.Extensions[:9]
	for name, e := range map[string]*raft.Log{"gap": command(4, 3, 1, 1), "payload length": short, "stub": {Index: 3, Term: 3, Type: stubType},
		"no header": {Index: 3, Term: 3, Type: raft.LogCommand, Data: []byte("x")}} {
		if err := l.StoreLog(e); err == nil {
			t.Errorf("%s was stored", name)
		}
	}
	if l.Poisoned() != nil {
		t.Errorf("a refusal poisoned the store: %v", l.Poisoned())
	}
	store(t, l, command(3, 3, 1, 10))
}

func TestTruncation(t *testing.T) {
	fs := newMemFS()
	l := open(t, fs, nil)
	for i := uint64(1); i <= 20; i++ {
		store(t, l, command(i, 1, 5, 3000))
	}
	if err := l.DeleteRange(11, 20); err != nil {
		t.Fatal(err)
	}
	if last, _ := l.LastIndex(); last != 10 {
		t.Fatalf("last %d", last)
	}
	for i := uint64(11); i <= 14; i++ {
		store(t, l, command(i, 2, 5, 100))
	}
	store(t, l, command(13, 3, 1, 1)) // replaces 13 and 14 without a DeleteRange
	check := func(l *Log) {
		for i := uint64(1); i <= 10; i++ {
			same(t, l, command(i, 1, 5, 3000))
		}
		same(t, l, command(11, 2, 5, 100))
		same(t, l, command(12, 2, 5, 100))
		same(t, l, command(13, 3, 1, 1))
		if last, _ := l.LastIndex(); last != 13 {
			t.Fatalf("last %d", last)
		}
	}
	check(l)
	l.Close()
	check(open(t, fs, nil))
}

// raft calls DeleteRange(first, last) for an idle group: below a snapshot that is a hint and loses nothing.
func TestDeleteRangeBelowASnapshotIsAHint(t *testing.T) {
	l := open(t, newMemFS(), nil)
	for i := uint64(1); i <= 10; i++ {
		store(t, l, command(i, 1, 5, 100))
	}
	l.SetSnapshot(10)
	if err := l.DeleteRange(1, 10); err != nil {
		t.Fatal(err)
	}
	for i := uint64(1); i <= 10; i++ {
		same(t, l, command(i, 1, 5, 100))
	}
}

func TestFreeing(t *testing.T) {
	fs := newMemFS()
	keep := int64(0)
	l := open(t, fs, func(c *Config) { c.LocalRetention = keep })
	for i := uint64(1); i <= 200; i++ {
		store(t, l, command(i, 1, 5, 20_000))
	}
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	if b, _ := l.Base(); b != 0 {
		t.Fatalf("freed to %d without permission", b)
	}
	e, err := l.Entry(2, 1)
	if err != nil || e.InMemory() {
		t.Fatalf("entry 2: %v", err)
	}
	l.Permit(150)
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	base, term := l.Base()
	if base < 100 || base > 150 || term != 1 {
		t.Fatalf("base %d", base)
	}
	// A reader that has the file keeps it: its bytes stay those of the entry, whatever is written now.
	for i := uint64(201); i <= 260; i++ {
		store(t, l, command(i, 1, 5, 20_000))
	}
	p := make([]byte, e.PayloadLen)
	if err := e.ReadPayload(p, 0); err != nil || !bytes.Equal(p, command(2, 1, 5, 20_000).Extensions) {
		t.Fatalf("held entry: %v", err)
	}
	e.Release()
	var stub raft.Log
	if err := l.GetLog(base, &stub); err != nil || stub.Index != base || stub.Term != 1 || stub.Type != stubType {
		t.Fatalf("stub: %+v %v", stub, err)
	}
	if err := l.GetLog(base-1, &stub); err != raft.ErrLogNotFound {
		t.Fatalf("below the base: %v", err)
	}
	if _, err := l.Entry(base, 1); !errors.Is(err, ErrGone) {
		t.Fatalf("base entry: %v", err)
	}
	all, unfree := l.Bytes()
	if all < unfree || unfree < 110*20_000 || unfree > 112*24_576 {
		t.Errorf("bytes %d, not free %d", all, unfree)
	}
	l.Close()
	l = open(t, fs, nil)
	if b, _ := l.Base(); b != base {
		t.Fatalf("base after reopening %d, was %d", b, base)
	}
	for i := base + 1; i <= 260; i++ {
		same(t, l, command(i, 1, 5, 20_000))
	}
}

func TestLocalRetentionIsKept(t *testing.T) {
	l := open(t, newMemFS(), func(c *Config) { c.LocalRetention = 2 << 20 })
	for i := uint64(1); i <= 200; i++ {
		store(t, l, command(i, 1, 5, 20_000))
	}
	l.Permit(200)
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	if all, unfree := l.Bytes(); all > 2<<20 || all < 2<<20-(256<<10) || unfree != 0 {
		t.Errorf("kept %d bytes, %d not free", all, unfree)
	}
}

func TestHoldForPeer(t *testing.T) {
	l := open(t, newMemFS(), nil)
	for i := uint64(1); i <= 100; i++ {
		store(t, l, command(i, 1, 5, 20_000))
	}
	l.HoldAt("peer", 40, time.Now().Add(time.Hour))
	l.Permit(100)
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	if b, _ := l.Base(); b > 40 || b < 20 {
		t.Errorf("base %d with a peer at 40", b)
	}
	l.ReleaseHold("peer")
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	if b, _ := l.Base(); b < 80 {
		t.Errorf("base %d after the peer has gone", b)
	}
}

func TestLargeBatchGetsAFileOfItsOwn(t *testing.T) {
	fs := newMemFS()
	l := open(t, fs, nil)
	big := command(2, 1, 5, 3<<20)
	store(t, l, command(1, 1, 5, 10))
	store(t, l, big)
	store(t, l, command(3, 1, 5, 10))
	same(t, l, big)
	l.Close()
	l = open(t, fs, nil)
	same(t, l, big)
	same(t, l, command(3, 1, 5, 10))
}

func TestPoison(t *testing.T) {
	for _, op := range []string{"write", "sync"} {
		fs := newMemFS()
		told := make(chan error, 2)
		l := open(t, fs, func(c *Config) { c.OnFatal = func(err error) { told <- err } })
		store(t, l, command(1, 1, 1, 10))
		failing := op + " " + filepath.Base(l.cur.name) // not the filler's
		fs.mu.Lock()
		fs.trace = func(s string) {
			if strings.HasPrefix(s, failing) && fs.failAt == 0 {
				fs.failAt, fs.failErr = fs.ops, syscall.EIO
			}
		}
		fs.mu.Unlock()
		if err := l.StoreLog(command(2, 1, 1, 10)); !errors.Is(err, ErrPoisoned) || !errors.Is(err, syscall.EIO) {
			t.Fatalf("%s: %v", op, err)
		}
		if err := <-told; !errors.Is(err, ErrPoisoned) {
			t.Errorf("%s: told %v", op, err)
		}
		if err := l.StoreLog(command(2, 1, 1, 10)); !errors.Is(err, ErrPoisoned) {
			t.Errorf("%s: a later write: %v", op, err)
		}
		same(t, l, command(1, 1, 1, 10))
	}
}

func TestDiskFull(t *testing.T) {
	fs := newMemFS()
	l := open(t, fs, func(c *Config) { c.LocalRetention = 0 })
	store(t, l, command(1, 1, 1, 10))
	fs.mu.Lock()
	fs.space = 10_000
	fs.mu.Unlock()
	stored := make(chan error, 1)
	go func() {
		for i := uint64(2); i <= 600; i++ {
			if err := l.StoreLog(command(i, 1, 5, 20_000)); err != nil {
				stored <- err
				return
			}
		}
		stored <- nil
	}()
	for !l.NoSpace() {
		time.Sleep(time.Millisecond) // polling a state that has no event
	}
	same(t, l, command(1, 1, 1, 10))
	if l.Poisoned() != nil {
		t.Fatalf("a full disk poisoned the store: %v", l.Poisoned())
	}
	fs.addSpace(64 << 20)
	if err := <-stored; err != nil {
		t.Fatal(err)
	}
	same(t, l, command(600, 1, 5, 20_000))
	if l.NoSpace() {
		t.Error("still no space")
	}
}

func TestUnknownVersionIsNotCorruption(t *testing.T) {
	fs := newMemFS()
	l := open(t, fs, nil)
	store(t, l, command(1, 1, 1, 10))
	l.Close()
	for name, ino := range fs.files {
		if strings.HasSuffix(name, ".log") {
			ino.data[11] = 2
			copy(ino.data[32:], []byte{0, 0, 0, 0})
			h := crcOf(ino.data[:32])
			ino.data[32], ino.data[33], ino.data[34], ino.data[35] = byte(h>>24), byte(h>>16), byte(h>>8), byte(h)
		}
	}
	if _, err := Open(Config{Dir: "/log", Group: 7, FS: fs}); !errors.Is(err, ErrVersion) || errors.Is(err, ErrCorrupt) {
		t.Errorf("got %v", err)
	}
	if _, err := Open(Config{Dir: "/log", Group: 8, FS: fs}); err == nil {
		t.Error("another group's directory was opened")
	}
}

// image is a log of three acknowledged batches in one file; it returns the file's bytes and where each batch begins.
func image(t *testing.T) (fs *memFS, file string, starts []int64) {
	fs = newMemFS()
	l := open(t, fs, func(c *Config) { c.FileBytes = 64 << 10 })
	for b := range 3 {
		i := uint64(b*2 + 1)
		starts = append(starts, max(l.pos, blockBytes))
		store(t, l, command(i, 1, 30, 3000), command(i+1, 1, 30, 200+b))
	}
	starts = append(starts, l.pos)
	file = l.cur.name
	snap := fs.crash(rand.New(rand.NewPCG(1, 1)))
	l.Close()
	return snap, file, starts
}

func (m *memFS) clone() *memFS {
	n := newMemFS()
	for k, v := range m.files {
		c := &memInode{data: bytes.Clone(v.data), durable: bytes.Clone(v.data), dirty: map[int64]bool{}}
		n.files[k], n.durable[k] = c, c
	}
	return n
}

// Every byte of the last two batches is garbled, and the file zeroed from every byte on: the last batch may be cut, never half taken; damage
// in the batch before it is corruption while a later one stands behind it.
func TestRecoveryOfEveryDamage(t *testing.T) {
	src, file, starts := image(t)
	step := int64(1)
	if testing.Short() {
		step = 13
	}
	for at := starts[1]; at < starts[3]; at += step {
		for _, zeroTail := range []bool{false, true} {
			if zeroTail && at%3 != 0 { // where a tail of zeros begins matters less than which byte is wrong
				continue
			}
			fs := src.clone()
			data := fs.files[file].data
			before := data[at]
			if zeroTail {
				clear(data[at:])
			} else {
				data[at] ^= 0xff
			}
			changed := zeroTail || data[at] != before
			l, err := Open(Config{Dir: "/log", Group: 7, FS: fs, FileBytes: 64 << 10})
			inPadding := isPadding(src.files[file].data, starts, at)
			switch {
			case !zeroTail && changed && at < starts[2] && !inPadding:
				if !errors.Is(err, ErrCorrupt) {
					t.Fatalf("byte %d of an inner batch garbled: %v", at, err)
				}
				continue
			case err != nil:
				t.Fatalf("byte %d (zeroed behind: %v): %v", at, zeroTail, err)
			}
			want := uint64(6)
			if zeroTail && at < starts[2] && !zeroed(src.files[file].data, at, starts[2]) {
				want = 2
			} else if !inPadding || zeroTail && !zeroed(src.files[file].data, at, starts[3]) {
				want = 4
			}
			if zeroTail && at < starts[2] && zeroed(src.files[file].data, at, starts[2]) {
				want = 4
			}
			last, _ := l.LastIndex()
			if last != want {
				t.Fatalf("byte %d (zeroed behind: %v): last %d, want %d", at, zeroTail, last, want)
			}
			for i := uint64(1); i <= last; i++ {
				size := 3000
				if i%2 == 0 {
					size = 200 + int(i/2) - 1
				}
				same(t, l, command(i, 1, 30, size))
			}
			store(t, l, command(last+1, 2, 3, 50)) // the log goes on, and reads back after another open
			l.Close()
			// Not by open: its cleanups would keep every one of these logs in memory until the end.
			if l, err = Open(Config{Dir: "/log", Group: 7, FS: fs, FileBytes: 64 << 10}); err != nil {
				t.Fatal(err)
			}
			same(t, l, command(last+1, 2, 3, 50))
			l.Close()
		}
	}
}

// A log file whose header is damaged is not taken for one that was being made, which is removed; nor does a copy of a file replace another.
func TestDamagedHeaderAndCopies(t *testing.T) {
	src, file, _ := image(t)
	refused := func(what string, change func(*memFS)) {
		t.Helper()
		fs := src.clone()
		change(fs)
		before := len(fs.files)
		if _, err := Open(Config{Dir: "/log", Group: 7, FS: fs, FileBytes: 64 << 10}); !errors.Is(err, ErrCorrupt) || len(fs.files) != before {
			t.Errorf("%s: %v, %d of %d files are left", what, err, len(fs.files), before)
		}
	}
	refused("header", func(fs *memFS) { fs.files[file].data[20] ^= 1 })
	refused("magic", func(fs *memFS) { fs.files[file].data[0] ^= 1 })
	refused("copy", func(fs *memFS) { fs.files["/log/00000000000000aa.log"] = fs.files[file] })
	refused("size", func(fs *memFS) { copy(fs.files[file].data, encodeFileHeader(7, 1, 100)) })
}

// A crash leaves a recycled file under its old name, and under the new one a file that was being made: the first gets the name.
func TestCrashBeforeARename(t *testing.T) {
	fs, _, _ := image(t)
	spare := &memInode{data: make([]byte, 64<<10)}
	copy(spare.data, encodeFileHeader(7, 9, 64<<10))
	fs.files["/log/0000000000000005.log"] = spare
	fs.files["/log/0000000000000009.log"] = &memInode{data: make([]byte, 8<<10)}
	l := open(t, fs, nil)
	for i := uint64(1); i <= 6; i++ {
		if err := l.GetLog(i, new(raft.Log)); err != nil {
			t.Errorf("entry %d: %v", i, err)
		}
	}
	l.Close()
	if fs.files["/log/0000000000000005.log"] != nil || fs.files["/log/0000000000000009.log"] != spare {
		t.Error("the recycled file has not got its name")
	}
}

// A crash may keep a file's trailer and lose its index: the batches are found without it, as long as no later file holds records.
func TestTornIndex(t *testing.T) {
	fs, file, _ := image(t)
	tear := func() {
		data := fs.files[file].data
		data[binary.BigEndian.Uint64(data[len(data)-blockBytes+16:])] ^= 1
	}
	open(t, fs, nil).Close() // writes the index
	tear()
	l := open(t, fs, nil)
	for i := uint64(1); i <= 6; i++ {
		if err := l.GetLog(i, new(raft.Log)); err != nil {
			t.Errorf("entry %d: %v", i, err)
		}
	}
	store(t, l, command(7, 1, 1, 10))
	l.Close()
	tear()
	if _, err := Open(Config{Dir: "/log", Group: 7, FS: fs, FileBytes: 64 << 10}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a torn index before a file with records: %v", err)
	}
}

// isPadding reports whether byte at belongs to the zero padding behind a batch's records.
func isPadding(data []byte, starts []int64, at int64) bool {
	for i := 0; i+1 < len(starts); i++ {
		if at < starts[i] || at >= starts[i+1] {
			continue
		}
		p := starts[i]
		for {
			h, ok := decodeRecord(data[p:])
			if !ok {
				return at >= p
			}
			p += h.size()
			if h.flags&flagLast != 0 {
				return at >= p
			}
		}
	}
	return false
}

func zeroed(data []byte, from, to int64) bool {
	for _, b := range data[from:to] {
		if b != 0 {
			return false
		}
	}
	return true
}

// The process loses its power at every single operation that changes something, twice in a row: what was acknowledged is there, as it was.
func TestCrashAtEveryOperation(t *testing.T) {
	for seed := uint64(0); seed < 3; seed++ {
		total := crashRun(t, seed, 0)
		step := 1
		if testing.Short() {
			step = 7
		}
		for at := 1; at <= total; at += step {
			crashRun(t, seed, at)
		}
	}
}

// crashRun writes, truncates and frees until operation at, crashes, checks, goes on, crashes again and checks.
func crashRun(t *testing.T, seed uint64, at int) (ops int) {
	rng := rand.New(rand.NewPCG(seed, uint64(at)))
	fs := newMemFS()
	fs.failAt = at
	acked := map[uint64]*raft.Log{}
	last := uint64(0)
	for life := range 2 {
		var l *Log
		var err error
		if l, err = Open(Config{Dir: "/log", Group: 7, FS: fs, FileBytes: 128 << 10, TailBytes: 32 << 10}); err == nil {
			last = crashLife(l, rand.New(rand.NewPCG(seed, 99+uint64(life))), acked, last, uint64(life)+1)
			_ = l.Close()
		} else if !errors.Is(err, errCrashed) {
			t.Fatalf("seed %d, operation %d: open: %v", seed, at, err)
		}
		ops = fs.ops
		fs = fs.crash(rng)
		re, err := Open(Config{Dir: "/log", Group: 7, FS: fs, FileBytes: 128 << 10})
		if err != nil {
			t.Fatalf("seed %d, operation %d, life %d: %v", seed, at, life, err)
		}
		base, _ := re.Base()
		for i, e := range acked {
			if i > base {
				same(t, re, e)
			}
		}
		if got, _ := re.LastIndex(); got < last {
			t.Fatalf("seed %d, operation %d: the log ends at %d, %d was acknowledged", seed, at, got, last)
		} else {
			last = got
		}
		_ = re.Close()
		fs = fs.crash(rng)
		if life == 0 && at > 0 {
			fs.failAt = 1 + rng.IntN(at)
		}
	}
	return ops
}

func crashLife(l *Log, rng *rand.Rand, acked map[uint64]*raft.Log, last, term uint64) uint64 {
	if got, _ := l.LastIndex(); got > last {
		last = got
	}
	for range 25 {
		if rng.IntN(8) == 0 && last > 3 {
			l.Permit(last - 2)
			if _, err := l.free(); err != nil {
				return last
			}
			continue
		}
		var batch []*raft.Log
		for range 1 + rng.IntN(3) {
			batch = append(batch, command(last+1+uint64(len(batch)), term, rng.IntN(50), rng.IntN(12_000)))
		}
		if l.StoreLogs(batch) != nil {
			return last
		}
		for _, e := range batch {
			acked[e.Index] = e
		}
		last += uint64(len(batch))
	}
	return last
}

func TestStable(t *testing.T) {
	fs := newMemFS()
	s, err := OpenStable(fs, "/log", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetUint64([]byte(keyCurrentTerm)); err == nil || err.Error() != "not found" {
		t.Errorf("empty: %v", err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(s.SetUint64([]byte(keyCurrentTerm), 4))
	must(s.SetUint64([]byte(keyLastVoteTerm), 4))
	must(s.Set([]byte(keyLastVoteCand), []byte("1.abc")))
	must(s.SetUint64([]byte(keyCurrentTerm), 5))
	must(s.SetUint64([]byte(keyLastVoteTerm), 5)) // a crash before the candidate follows: the old vote stands, whole
	s, err = OpenStable(fs.crash(rand.New(rand.NewPCG(1, 1))), "/log", nil)
	must(err)
	term, _ := s.GetUint64([]byte(keyCurrentTerm))
	vote, _ := s.GetUint64([]byte(keyLastVoteTerm))
	cand, _ := s.Get([]byte(keyLastVoteCand))
	if term != 5 || vote != 4 || string(cand) != "1.abc" {
		t.Errorf("term %d, vote %d for %s", term, vote, cand)
	}
	if s.Set([]byte("other"), nil) == nil || s.SetUint64([]byte("other"), 1) == nil {
		t.Error("an unknown key was accepted")
	}
}

func writeSnapshot(t *testing.T, st raft.SnapshotStore, index, term uint64, state string) error {
	t.Helper()
	k, err := st.Create(1, index, term, raft.Configuration{}, 1, nil)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(k, state); err != nil {
		t.Fatal(err)
	}
	return k.Close()
}

// twoHundred is a log of so many entries, and its snapshots, of which there are none.
func twoHundred(t *testing.T) (*memFS, *Log, *Snapshots) {
	t.Helper()
	fs := newMemFS()
	l := open(t, fs, nil)
	for i := uint64(1); i <= 200; i++ {
		store(t, l, command(i, 1, 5, 20_000))
	}
	s, err := OpenSnapshots(l)
	if err != nil {
		t.Fatal(err)
	}
	return fs, l, s
}

func TestSnapshots(t *testing.T) {
	fs, l, s := twoHundred(t)
	st := s.Store()
	if list, _ := st.List(); len(list) != 0 {
		t.Fatal("not empty")
	}
	for i, idx := range []uint64{50, 100, 150} {
		if err := writeSnapshot(t, st, idx, 1, strings.Repeat(fmt.Sprint(i), 10_000)); err != nil {
			t.Fatal(err)
		}
	}
	if list, _ := st.List(); len(list) != 0 {
		t.Errorf("peers are shown %d snapshots that are not installable", len(list))
	}
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	if b, _ := l.Base(); b != 0 {
		t.Errorf("base %d without an installable snapshot", b)
	}
	if err := s.Applied(180, 60); err != nil { // hot from 60 on: 50 is installable
		t.Fatal(err)
	}
	if list, _ := st.List(); len(list) != 1 || list[0].Index != 50 {
		t.Errorf("list: %v", list)
	}
	if err := writeSnapshot(t, st, 120, 1, "x"); !errors.Is(err, ErrStale) {
		t.Errorf("an older local snapshot: %v", err)
	}
	if err := s.Applied(200, 151); err != nil {
		t.Fatal(err)
	}
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	base, _ := l.Base()
	if base == 0 || base > 150 {
		t.Errorf("base %d", base)
	}
	meta, r, err := s.Open(mustList(t, s)[0].ID)
	if err != nil || meta.Index != 150 {
		t.Fatal(meta, err)
	}
	state, _ := io.ReadAll(r)
	r.Close()
	if string(state) != strings.Repeat("2", 10_000) {
		t.Error("state differs")
	}
	l.Close()
	l = open(t, fs, nil)
	if s, err = OpenSnapshots(l); err != nil {
		t.Fatal(err)
	}
	if list, _ := s.Store().List(); len(list) != 1 || list[0].Index != 150 {
		t.Errorf("after reopening: %v", list)
	}
	fs.mu.Lock() // the filler is at work
	for name, ino := range fs.files {
		if strings.HasSuffix(name, ".snap") {
			ino.data[len(ino.data)/2] ^= 1
		}
	}
	fs.mu.Unlock()
	if _, _, err := s.Open(mustList(t, s)[0].ID); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a flipped bit: %v", err)
	}
	l.Close()
	l = open(t, fs, nil)
	if _, err := OpenSnapshots(l); !errors.Is(err, ErrCorrupt) {
		t.Errorf("the only snapshot is damaged: %v", err)
	}
	l.Close()
	for name := range fs.files {
		if strings.HasSuffix(name, ".snap") {
			delete(fs.files, name)
		}
	}
	l = open(t, fs, nil)
	if _, err := OpenSnapshots(l); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a log that begins behind %d without snapshot: %v", base, err)
	}
}

// A damaged snapshot is dropped while another reaches down to where the log begins: it would become installable later, and the log be freed on its word.
func TestDamagedSnapshotIsDropped(t *testing.T) {
	fs, l, s := twoHundred(t)
	for _, idx := range []uint64{50, 150} {
		if err := writeSnapshot(t, s.Store(), idx, 1, "state"); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Applied(180, 60); err != nil { // hot from 60 on: 50 is installable
		t.Fatal(err)
	}
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	newest := filepath.Join("/log/snapshots", mustList(t, s)[0].ID)
	l.Close()
	fs.files[newest].data[len(fs.files[newest].data)-20] ^= 1 // the state's last byte lies before 16 bytes of trailer
	l = open(t, fs, nil)
	s, err := OpenSnapshots(l)
	if err != nil {
		t.Fatal(err)
	}
	if list := mustList(t, s); len(list) != 1 || list[0].Index != 50 {
		t.Errorf("%d snapshots, the newest at %d", len(list), list[0].Index)
	}
	if err := s.Applied(200, 200); err != nil {
		t.Fatal(err)
	}
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	if b, _ := l.Base(); b > 50 {
		t.Errorf("the log begins behind %d, the only snapshot is of 50", b)
	}
}

func mustList(t *testing.T, s *Snapshots) []*raft.SnapshotMeta {
	t.Helper()
	list, err := s.All().List()
	if err != nil || len(list) == 0 {
		t.Fatal(list, err)
	}
	return list
}

func TestInstallSetsTheBase(t *testing.T) {
	for _, crash := range []bool{false, true} {
		fs := newMemFS()
		l := open(t, fs, nil)
		for i := uint64(1); i <= 20; i++ {
			store(t, l, command(i, 1, 5, 100))
		}
		s, err := OpenSnapshots(l)
		if err != nil {
			t.Fatal(err)
		}
		s.ExpectInstall(30, 2, 35, func() uint64 { return 20 })
		if crash { // between the snapshot's flag and the base
			fs.mu.Lock()
			fs.trace = func(op string) {
				if strings.HasPrefix(op, "write base") {
					fs.failAt = fs.ops
				}
			}
			fs.mu.Unlock()
		}
		err = writeSnapshot(t, s.Store(), 30, 2, "state")
		if crash != (err != nil) {
			t.Fatalf("crash %v: %v", crash, err)
		}
		l.Close()
		fs = fs.crash(rand.New(rand.NewPCG(5, 5)))
		l = open(t, fs, nil)
		if s, err = OpenSnapshots(l); err != nil {
			t.Fatal(err)
		}
		if b, term := l.Base(); b != 30 || term != 2 {
			t.Errorf("crash %v: base %d of term %d", crash, b, term)
		}
		if last, _ := l.LastIndex(); last != 30 {
			t.Errorf("crash %v: last %d", crash, last)
		}
		store(t, l, command(31, 2, 1, 1))
		s.ExpectInstall(30, 2, 35, func() uint64 { return 40 })
		if err := writeSnapshot(t, s.Store(), 30, 2, "state"); !errors.Is(err, ErrStale) || !s.InstallRefused() {
			t.Errorf("a stale install: %v", err)
		}
	}
}

func TestOnRealFiles(t *testing.T) {
	dir := t.TempDir()
	openReal := func() *Log {
		l, err := Open(Config{Dir: dir, Group: 1, FileBytes: 4 << 20, TailBytes: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := openReal()
	for i := uint64(1); i <= 60; i++ {
		store(t, l, command(i, 1, 100, 200_000))
	}
	l.Permit(40)
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	base, _ := l.Base()
	for range 2 {
		for i := base + 1; i <= 60; i++ {
			same(t, l, command(i, 1, 100, 200_000))
		}
		l.Close()
		l = openReal()
	}
	l.Close()
	if _, err := os.Stat(dir + "/reserve"); err != nil {
		t.Error(err)
	}
}

func BenchmarkStoreLogs(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			l, err := Open(Config{Dir: b.TempDir(), Group: 1})
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			e := command(1, 1, 200, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			i := uint64(0)
			for b.Loop() {
				i++
				c := *e
				c.Index = i
				if err := l.StoreLog(&c); err != nil {
					b.Fatal(err)
				}
				if i%512 == 0 {
					l.Permit(i)
				}
			}
		})
	}
}

// What is freed at once is written again file by file, up to half of what is kept as a cache: no file is made anew meanwhile, and no more are kept.
func TestFreedFilesAreKept(t *testing.T) {
	fs := newMemFS()
	made := map[string]int{}
	fs.trace = func(op string) { made[strings.Fields(op)[0]]++ } // under fs.mu
	count := func(op string) int {
		fs.mu.Lock()
		defer fs.mu.Unlock()
		return made[op]
	}
	l := open(t, fs, func(c *Config) { c.LocalRetention = 1 << 20 })
	for i := uint64(1); i <= 150; i++ {
		store(t, l, command(i, 1, 5, 20_000))
	}
	l.Permit(150)
	if _, err := l.free(); err != nil {
		t.Fatal(err)
	}
	idle := func() int {
		l.fill.mu.Lock()
		defer l.fill.mu.Unlock()
		if l.fill.next == nil {
			return -1
		}
		return len(l.fill.free)
	}
	for end := time.Now().Add(3 * time.Minute); idle() != 3; time.Sleep(time.Millisecond) { // one, and 512 KiB
		if time.Now().After(end) {
			t.Fatalf("%d freed files are kept", idle())
		}
	}
	creates, renames := count("create"), count("rename")
	for i := uint64(151); i <= 180; i++ { // three files
		store(t, l, command(i, 1, 5, 20_000))
	}
	for end := time.Now().Add(3 * time.Minute); count("rename") < renames+2; time.Sleep(time.Millisecond) { // the filler is behind
		if time.Now().After(end) {
			t.Fatalf("%d files are used again", count("rename")-renames)
		}
	}
	if c := count("create"); c != creates {
		t.Errorf("%d files made", c-creates)
	}
}

// Incident 8: entries are read, by index and by name, while others are stored, replaced and freed: what is read is always the entry that was asked for, whole, or nothing.
func TestReadersBesideTheWriter(t *testing.T) {
	l := open(t, newMemFS(), nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var read atomic.Int64
	for seed := range uint64(3) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, 8))
			for {
				select {
				case <-stop:
					return
				default:
				}
				base, _ := l.Base()
				last, _ := l.LastIndex()
				if last == base {
					continue
				}
				i := base + 1 + rng.Uint64N(last-base)
				var got raft.Log
				if err := l.GetLog(i, &got); errors.Is(err, raft.ErrLogNotFound) || got.Type == stubType {
					continue
				} else if err != nil {
					t.Errorf("entry %d: %v", i, err)
					return
				}
				want := command(i, got.Term, 20, int(i%7)*3000)
				if got.Index != i || !bytes.Equal(got.Data, want.Data) {
					t.Errorf("entry %d of term %d is another", i, got.Term)
					return
				}
				p, err := l.Payload(i, got.Term)
				if errors.Is(err, ErrGone) {
					continue
				}
				if err != nil || !bytes.Equal(p, want.Extensions) {
					t.Errorf("payload of entry %d of term %d: %v", i, got.Term, err)
					return
				}
				read.Add(1)
			}
		})
	}
	rng := rand.New(rand.NewPCG(9, 9))
	term := uint64(1)
	for last := uint64(0); last < 800 || read.Load() < 100; {
		if last > 10 && rng.IntN(50) == 0 { // a later leader replaces the tail
			term++
			base, _ := l.Base()
			last = max(base, last-rng.Uint64N(8))
			if err := l.DeleteRange(last+1, math.MaxUint64); err != nil {
				t.Fatal(err)
			}
		}
		if rng.IntN(100) == 0 && last > 40 {
			l.SetSnapshot(last - 20)
			l.Permit(last - 20)
		}
		last++
		store(t, l, command(last, term, 20, int(last%7)*3000))
	}
	close(stop)
	wg.Wait()
}

// What is lent may be overwritten as soon as it was given back: the log holds a copy of the Data, and the payload on disk.
func TestLentEntries(t *testing.T) {
	l := open(t, newMemFS(), nil)
	defer l.Close()
	store(t, l, command(1, 1, 5, 100))
	lent := []*raft.Log{command(2, 1, 5, 20_000), {Index: 3, Term: 1, Type: raft.LogConfiguration, Data: []byte("members")}, command(4, 1, 5, 0)}
	back := l.Lend(lent)
	if err := l.StoreLogs(lent); err != nil {
		t.Fatal(err)
	}
	back()
	want := []*raft.Log{command(1, 1, 5, 100), command(2, 1, 5, 20_000), {Index: 3, Term: 1, Type: raft.LogConfiguration, Data: []byte("members")}, command(4, 1, 5, 0)}
	for _, e := range lent {
		clear(e.Data)
		clear(e.Extensions)
	}
	for _, e := range want {
		same(t, l, e)
	}
	if e, err := l.Entry(2, 1); err != nil || e.InMemory() {
		t.Errorf("a lent payload is kept in memory: %v", err)
	} else {
		e.Release()
	}
	kept := command(5, 1, 5, 20_000) // the same structures, lent no more
	l.Lend([]*raft.Log{kept})()
	store(t, l, kept)
	if e, err := l.Entry(5, 1); err != nil || !e.InMemory() {
		t.Errorf("what was not lent is not in memory: %v", err)
	}
	if len(l.lent) != 0 {
		t.Errorf("%d entries are lent for ever", len(l.lent))
	}
}
