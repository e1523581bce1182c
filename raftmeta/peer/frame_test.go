package peer

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
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
	c.bulk, c.meta = bulk, encodeAppend(a, crcs, []string{"2.bb", "3.cc"})
	return a, c
}

// reading puts together the messages of some bytes.
func reading(b []byte) *assembler {
	return newAssembler(&script{r: bytes.NewReader(b)}, 4096, time.Hour)
}

// wire is every kind of message, request and answer, as bytes.
func wire(t testing.TB) map[string][]byte {
	t.Helper()
	j := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	ask := func(k kind, meta, bulk []byte) []byte {
		c := &call{kind: k, group: 3, id: 77, meta: meta, size: len(bulk)}
		if len(bulk) > 0 {
			c.bulk = net.Buffers{bulk}
		}
		return frames(c)
	}
	answer := func(k kind, body []byte, err error) []byte {
		return appendAnswer(nil, &header{kind: k, group: 3, id: 77}, body, err)
	}
	ok := func(v any) []byte { return append([]byte{statusOK}, j(v)...) }
	h := raft.RPCHeader{ProtocolVersion: 3, ID: []byte("1.aa"), Addr: []byte("1.aa")}
	state := []byte("the state's bytes")
	install := &raft.InstallSnapshotRequest{RPCHeader: h, SnapshotVersion: 1, Term: 7, Leader: []byte("1.aa"), LastLogIndex: 40, LastLogTerm: 6, Configuration: []byte{1}, ConfigurationIndex: 2, Size: int64(len(state))}
	_, a := request()
	return map[string][]byte{
		"append":             frames(a),
		"append_answer":      answer(kindAppend, encodeAppendAnswer(&raft.AppendEntriesResponse{RPCHeader: h, Term: 7, LastLog: 6, Success: true}, time.UnixMilli(1234), -5), nil),
		"vote":               ask(kindVote, j(&raft.RequestVoteRequest{RPCHeader: h, Term: 7, LastLogIndex: 6, LastLogTerm: 5, LeadershipTransfer: true}), nil),
		"vote_answer":        answer(kindVote, ok(&raft.RequestVoteResponse{RPCHeader: h, Term: 7, Granted: true}), nil),
		"prevote":            ask(kindPreVote, j(&raft.RequestPreVoteRequest{RPCHeader: h, Term: 7, LastLogIndex: 6, LastLogTerm: 5}), nil),
		"prevote_answer":     answer(kindPreVote, ok(&raft.RequestPreVoteResponse{RPCHeader: h, Term: 7, Granted: true}), nil),
		"timeout_now":        ask(kindTimeoutNow, j(&raft.TimeoutNowRequest{RPCHeader: h}), nil),
		"timeout_now_answer": answer(kindTimeoutNow, ok(&raft.TimeoutNowResponse{RPCHeader: h}), nil),
		"install":            ask(kindInstall, j(piece{ID: 5, CRC: crcOf(state), Last: true, Request: install, Installed: 44}), state),
		"install_answer":     answer(kindInstall, ok(&raft.InstallSnapshotResponse{RPCHeader: h, Term: 7, Success: true}), nil),
		"term":               ask(kindTerm, nil, nil),
		"term_answer":        answer(kindTerm, encodeStanding(Standing{7, 6}), nil),
		"forward":            ask(kindForward, []byte(`{"kind":3}`), nil),
		"forward_answer":     answer(kindForward, append([]byte{statusOK}, `{"index":9}`...), nil),
		"follow":             ask(kindFollow, encodeFollow(Position{9, [chainBytes]byte{1, 2, 3}}, true), nil),
		"follow_answer":      answer(kindFollow, []byte{statusOK, followState}, nil),
		"part_state":         bytes.Join(encodeState(3, Position{9, [chainBytes]byte{1, 2, 3}}, 70, true, state), nil),
		"part_entry":         bytes.Join(encodeEntry(3, feedEntry(9, 12)), nil),
		"part_idle":          bytes.Join(encodeIdle(3, Position{12, [chainBytes]byte{4, 5, 6}}), nil),
		"reach":              ask(kindReach, nil, nil),
		"reach_answer":       answer(kindReach, encodeReach(Reach{true, 12, "1.aa"}), nil),
		"bytes":              ask(kindBytes, encodeBytesAsked(BytesAsked{12, 7, PlacePayload, 3, 5}), nil),
		"bytes_answer":       answer(kindBytes, encodeBytes(&EntryBytes{Applied: 13, Total: 8, Bytes: []byte("lo")}), nil),
		"refused":            answer(kindForward, nil, errors.New("no group 3 here")),
	}
}

// feedEntry is an entry of a feed, with a payload.
func feedEntry(prev, index uint64) *FeedEntry {
	payload := []byte("payload")
	return &FeedEntry{Prev: prev, Index: index, Term: 7, Chain: [chainBytes]byte{4, 5, 6}, Data: []byte("directory"), Payload: payload, PayloadCRC: crcOf(payload)}
}

// decodeAny reads a message as whoever gets it does.
func decodeAny(m *message) error {
	if m.flags&flagAnswer != 0 {
		body, err := m.answer()
		switch {
		case err != nil:
			return err
		case m.kind == kindAppend:
			_, _, err := decodeAppendAnswer(body, new(raft.AppendEntriesResponse))
			return err
		case m.kind == kindReach:
			_, err := decodeReach(body)
			return err
		case m.kind == kindBytes:
			_, err := decodeBytes(body)
			return err
		case m.kind == kindTerm:
			if _, ok := decodeStanding(body); !ok {
				return ErrFrame
			}
		}
		return nil
	}
	var err error
	switch m.kind {
	case kindAppend:
		_, _, _, err = decodeAppend(m.metaPart(), m.bulk())
	case kindInstall:
		_, err = decodePiece(m)
	case kindFollow:
		_, _, err = decodeFollow(m.body)
	case kindPart:
		_, err = decodePart(m)
	case kindBytes:
		_, err = decodeBytesAsked(m.body)
	case kindVote:
		err = json.Unmarshal(m.body, new(raft.RequestVoteRequest))
	}
	return err
}

// The bytes of every kind of frame are fixed: a node of this version must understand those of another.
func TestGoldenFrames(t *testing.T) {
	seen := map[[2]uint8]bool{}
	for name, b := range wire(t) {
		golden(t, name, b)
		m, err := reading(b).next()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		seen[[2]uint8{uint8(m.kind), m.flags}] = true
		if err := decodeAny(m); (err != nil) != (name == "refused") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for k := kindAppend; k <= kindLast; k++ {
		if !seen[[2]uint8{uint8(k), 0}] || !seen[[2]uint8{uint8(k), flagAnswer}] && k != kindPart {
			t.Errorf("%s is not there both ways", k)
		}
	}
	want, c := request()
	m, err := reading(frames(c)).next()
	if err != nil || m.kind != kindAppend || m.group != 2 || m.id != 9 {
		t.Fatalf("%+v %v", m, err)
	}
	got, _, contacts, err := decodeAppend(m.metaPart(), m.bulk())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"2.bb", "3.cc"}, contacts); d != "" {
		t.Error(d)
	}
}

// What a newer program sends is told from what is broken, and nothing is allocated for what is too large.
func TestHeadersAreStrict(t *testing.T) {
	for name, c := range map[string]struct {
		change func(b []byte)
		want   error
	}{
		"as it is":               {func([]byte) {}, nil},
		"newer version":          {func(b []byte) { b[2] = frameVersion + 1 }, ErrVersion},
		"version 0":              {func(b []byte) { b[2] = 0 }, ErrVersion},
		"unknown kind":           {func(b []byte) { b[3] = byte(kindLast) + 1 }, ErrVersion},
		"no kind":                {func(b []byte) { b[3] = 0 }, ErrVersion},
		"unknown flag":           {func(b []byte) { b[4] |= 4 }, ErrVersion},
		"highest flag":           {func(b []byte) { b[4] |= 128 }, ErrVersion},
		"reserved byte 5":        {func(b []byte) { b[5] = 1 }, ErrVersion},
		"reserved byte 7":        {func(b []byte) { b[7] = 1 }, ErrVersion},
		"part of an answer":      {func(b []byte) { b[4] = flagAnswer | flagMore }, ErrFrame},
		"no magic":               {func(b []byte) { b[0] = 'X' }, ErrFrame},
		"meta above the message": {func(b []byte) { binary.BigEndian.PutUint32(b[28:], 11) }, ErrFrame},
	} {
		b := make([]byte, frameHeader)
		(&header{kind: kindAppend, length: 10, total: 10, meta: 10}).encode(b)
		c.change(b)
		binary.BigEndian.PutUint32(b[36:], crcOf(b[:36]))
		if _, err := decodeHeader(b); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	for k := kindAppend; k <= kindLast; k++ {
		for flag, most := range map[uint8]uint32{0: k.most(false), flagAnswer: k.most(true)} {
			for over, want := range []error{nil, ErrFrame} {
				b := make([]byte, frameHeader)
				(&header{kind: k, flags: flag, total: most + uint32(over)}).encode(b)
				if _, err := decodeHeader(b); !errors.Is(err, want) || (err == nil) != (want == nil) {
					t.Errorf("%s, flags %d, %d bytes: %v, want %v", k, flag, most+uint32(over), err, want)
				}
			}
		}
		want, special := map[kind]uint32{kindPart: 0, kindBytes: 256 << 10}[k]
		if most := k.most(true); most != want && special || most != 64<<10 && !special {
			t.Errorf("%s: answers of up to %d bytes", k, most)
		}
	}
	if b := appendAnswer(nil, &header{kind: kindForward}, make([]byte, answerMax+1), nil); len(b) > 200 {
		t.Errorf("an answer that is too large is sent: %d bytes", len(b))
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
	a := reading(wire)
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

// Every byte of a message that is changed is noticed: in the header, in the meta part, in entries, in a snapshot's bytes.
func TestEveryFlippedBit(t *testing.T) {
	for name, good := range wire(t) {
		if name == "refused" {
			continue // it is an error as it is
		}
		for i := range good {
			b := bytes.Clone(good)
			b[i] ^= 1
			m, err := reading(b).next()
			if err == nil {
				err = decodeAny(m)
			}
			if err == nil {
				t.Errorf("%s: byte %d was changed and nobody noticed", name, i)
			}
		}
	}
}

// reseal renews the checksums of frames, so that what is behind them is read, and bounds what they say they have.
func reseal(b []byte) {
	be := binary.BigEndian
	for len(b) >= frameHeader {
		h, body := b[:frameHeader], b[frameHeader:]
		h[24], h[25], h[28], h[29] = 0, 0, 0, 0
		if meta := be.Uint32(h[28:]); uint64(meta) <= uint64(len(body)) {
			be.PutUint32(h[32:], crcOf(body[:meta]))
		}
		be.PutUint32(h[36:], crcOf(h[:36]))
		b = body[min(uint64(be.Uint32(h[8:])), uint64(len(body))):]
	}
}

// FuzzMessages reads any bytes as frames, as they are and with their checksums renewed. No message is above its limit, and a request that can be read has one encoding.
func FuzzMessages(f *testing.F) {
	for _, b := range wire(f) {
		f.Add(b)
	}
	f.Add([]byte("EP"))
	f.Fuzz(func(t *testing.T, b []byte) {
		readAll(t, b)
		b = bytes.Clone(b)
		reseal(b)
		readAll(t, b)
	})
}

func readAll(t *testing.T, b []byte) {
	a := reading(b)
	for {
		m, err := a.next()
		if err != nil {
			return
		}
		if len(m.body) > int(m.kind.most(m.flags&flagAnswer != 0)) {
			t.Errorf("a message of %d bytes", len(m.body))
		}
		_ = decodeAny(m)
		if m.kind == kindPart && m.flags == 0 {
			again(t, m)
		}
		if m.kind != kindAppend || m.flags != 0 {
			continue
		}
		if req, crcs, contacts, err := decodeAppend(m.metaPart(), m.bulk()); err == nil && !bytes.Equal(encodeAppend(req, crcs, contacts), m.metaPart()) {
			t.Error("the same request has other bytes")
		}
	}
}

// again compares a part that can be read with its one encoding.
func again(t *testing.T, m *message) {
	x, err := decodePart(m)
	if err != nil {
		return
	}
	var bufs net.Buffers
	switch x := x.(type) {
	case statePiece:
		bufs = encodeState(m.group, x.of, x.at, x.last, x.data)
	case FeedEntry:
		bufs = encodeEntry(m.group, &x)
	case Position:
		bufs = encodeIdle(m.group, x)
	}
	same, err := reading(bytes.Join(bufs, nil)).next()
	if err != nil || !bytes.Equal(same.body, m.body) {
		t.Errorf("the same part has other bytes: %v", err)
	}
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
