package peer

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
)

// frames cuts a call into frames, as they go over the wire.
func frames(c *call) []byte {
	var out []byte
	for c.sent < len(c.meta)+c.size || c.sent == 0 {
		heads, bufs, _ := c.chunk(make([]byte, 0, frameHeader), nil)
		_ = heads
		for _, b := range bufs {
			out = append(out, b...)
		}
		if len(c.meta)+c.size == 0 {
			break
		}
	}
	return out
}

func request() (*raft.AppendEntriesRequest, *call) {
	h := raft.RPCHeader{ProtocolVersion: 3, ID: []byte("1.aa"), Addr: []byte("1.aa")}
	a := &raft.AppendEntriesRequest{RPCHeader: h, Term: 7, PrevLogEntry: 4, PrevLogTerm: 6, LeaderCommitIndex: 3, Entries: []*raft.Log{
		{Index: 5, Term: 7, Type: raft.LogNoop, Data: []byte{}, AppendedAt: time.Unix(0, 12345)},
		{Index: 6, Term: 7, Type: raft.LogCommand, Data: []byte("directory"), Extensions: []byte("payload")}}}
	var crcs []entryCRC
	c := &call{kind: kindAppend, group: 2, id: 9}
	for _, e := range a.Entries {
		crcs = append(crcs, entryCRC{crcOf(e.Data), crcOf(e.Extensions), uint32(len(e.Extensions))})
		c.bulk = append(c.bulk, e.Data, e.Extensions)
		c.size += len(e.Data) + len(e.Extensions)
	}
	bulk := net.Buffers{}
	for _, b := range c.bulk {
		if len(b) > 0 {
			bulk = append(bulk, b)
		}
	}
	c.bulk, c.meta = bulk, encodeAppend(a, crcs)
	return a, c
}

// The bytes of a frame are fixed: a node of this version must understand those of another.
func TestGoldenFrame(t *testing.T) {
	want, c := request()
	b := frames(c)
	const path = "testdata/append.hex"
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, []byte(hex.Dump(b)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(golden), hex.Dump(b)); d != "" {
		t.Error(d)
	}
	m, err := newAssembler(bytes.NewReader(b)).next()
	if err != nil || m.kind != kindAppend || m.group != 2 || m.id != 9 {
		t.Fatalf("%+v %v", m, err)
	}
	got, _, err := decodeAppend(m.metaPart(), m.bulk())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// Messages of several groups may alternate; each is put together by itself.
func TestInterleavedMessages(t *testing.T) {
	big := func(group uint32, c byte) *call {
		b := bytes.Repeat([]byte{c}, 3*chunkMax+100)
		return &call{kind: kindAppend, group: group, id: uint64(group), meta: []byte{c}, bulk: net.Buffers{b[:1000], b[1000:]}, size: len(b)}
	}
	calls := []*call{big(1, 'a'), big(2, 'b')}
	var wire []byte
	for i := 0; calls[0].sent < calls[0].size || calls[1].sent < calls[1].size; i++ {
		_, bufs, _ := calls[i%2].chunk(make([]byte, 0, frameHeader), nil)
		for _, b := range bufs {
			wire = append(wire, b...)
		}
	}
	a := newAssembler(bytes.NewReader(wire))
	for _, c := range []byte{'a', 'b'} {
		m, err := a.next()
		if err != nil {
			t.Fatal(err)
		}
		if len(m.body) != 3*chunkMax+101 || bytes.Count(m.body, []byte{c}) != len(m.body) {
			t.Errorf("group %d: %d bytes, %d of them %c", m.group, len(m.body), bytes.Count(m.body, []byte{c}), c)
		}
	}
	if a.held != 0 {
		t.Errorf("%d bytes are held", a.held)
	}
}

// Every byte of a frame that is changed is noticed: in the header, in the meta part, in the entries.
func TestEveryFlippedBit(t *testing.T) {
	_, c := request()
	good := frames(c)
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 1
		m, err := newAssembler(bytes.NewReader(b)).next()
		if err == nil {
			_, _, err = decodeAppend(m.metaPart(), m.bulk())
		}
		if err == nil {
			t.Errorf("byte %d was changed and nobody noticed", i)
		}
	}
}

func FuzzMessages(f *testing.F) {
	_, c := request()
	f.Add(frames(c))
	f.Add([]byte("EP"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a := newAssembler(bytes.NewReader(b))
		for {
			m, err := a.next()
			if err != nil {
				return
			}
			if req, crcs, err := decodeAppend(m.metaPart(), m.bulk()); err == nil && !bytes.Equal(encodeAppend(req, crcs), m.metaPart()) {
				t.Error("the same request has other bytes")
			}
			var r raft.AppendEntriesResponse
			if body, err := m.answer(); err == nil {
				_ = decodeAppendAnswer(body, &r)
			}
		}
	})
}

func isReset(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && !ne.Timeout()
}

// A peer that has shown who it is and then sends what is no frame, or too much, loses its connection.
func TestHostilePeer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	p, err := New(Config{ServerID: "1.aa", ClusterID: "c", Listener: l, Resolve: func(string) (string, bool) { return "127.0.0.1:1", true }})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	q, err := New(Config{ServerID: "2.bb", ClusterID: "c", Resolve: func(string) (string, bool) { return addr, true }})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	frame := func(h header, body []byte) []byte {
		b := make([]byte, frameHeader)
		h.encode(b)
		return append(b, body...)
	}
	for name, b := range map[string][]byte{
		"garbage":             bytes.Repeat([]byte{0xff}, 100),
		"unknown kind":        frame(header{kind: 99}, nil),
		"huge":                frame(header{kind: kindAppend, length: 10, total: messageMax + 1}, nil),
		"huge meta":           frame(header{kind: kindAppend, length: 10, total: messageMax, meta: metaMax + 1}, nil),
		"chunk too long":      frame(header{kind: kindAppend, length: chunkMax + 1, total: messageMax}, nil),
		"answer to nothing":   frame(header{kind: kindAppend, flags: flagAnswer}, nil),
		"empty, more follows": frame(header{kind: kindAppend, flags: flagMore, total: 10}, nil),
		"another in between":  append(frame(header{kind: kindAppend, flags: flagMore, length: 1, total: 10}, []byte{1}), frame(header{kind: kindVote, id: 1, length: 1, total: 10}, []byte{1})...),
	} {
		c, err := q.dial("1.aa")
		if err != nil {
			t.Fatal(err)
		}
		if err := q.introduce(c, "1.aa", classBulk); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if n, err := io.Copy(io.Discard, c); err != nil && !isReset(err) || n > 0 {
			t.Errorf("%s: the connection stays open: %d bytes, %v", name, n, err)
		}
		_ = c.Close()
	}
}

// Without a secret only this machine may speak.
func TestOpenListenerIsRefused(t *testing.T) {
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := New(Config{ServerID: "1.aa", ClusterID: "c", Listener: l}); !errors.Is(err, ErrOpen) {
		t.Errorf("%v", err)
	}
}
