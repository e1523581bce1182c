package broker

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/estran/estran/tiering/record"
	"go.uber.org/goleak"
)

// schemas has the fields of every request in the lowest version that is served and in the highest, with values that are well-formed: what the cases of bad input are made from.
// i8 to i64 and uuid are fixed; str, nstr, nbytes (n: nullable) have a length; [ ] is an array of one structure, ( ) of one plain value, { } a structure, n before them nullable too.
var schemas = []struct {
	key, version int16
	fields       string
}{
	{keyProduce, 3, "nstr=~ i16=-1 i32=1000 [ str=t [ i32=0 nbytes=batch ] ]"},
	{keyProduce, 11, "nstr=~ i16=-1 i32=1000 [ str=t [ i32=0 nbytes=batch ] ]"},
	{keyFetch, 4, "i32=-1 i32=0 i32=0 i32=1000 i8=0 [ str=t [ i32=0 i64=0 i32=1000 ] ]"},
	{keyFetch, 16, "i32=0 i32=0 i32=1000 i8=0 i32=0 i32=-1 [ uuid [ i32=0 i32=-1 i64=0 i32=-1 i64=-1 i32=1000 ] ] [ uuid ( i32=0 ) ] str="},
	{keyListOffsets, 1, "i32=-1 [ str=t [ i32=0 i64=-1 ] ]"},
	{keyListOffsets, 10, "i32=-1 i8=0 [ str=t [ i32=0 i32=-1 i64=-1 ] ] i32=0"},
	{keyMetadata, 0, "n[ str=t ]"},
	{keyMetadata, 12, "n[ uuid nstr=t ] i8=1 i8=0"},
	{keyOffsetCommit, 1, "str=g i32=-1 str= [ str=t [ i32=0 i64=1 i64=0 nstr=m ] ]"},
	{keyOffsetCommit, 9, "str=g i32=-1 str= nstr=~ [ str=t [ i32=0 i64=1 i32=-1 nstr=m ] ]"},
	{keyOffsetFetch, 1, "str=g n[ str=t ( i32=0 ) ]"},
	{keyOffsetFetch, 9, "[ str=g nstr=~ i32=-1 n[ str=t ( i32=0 ) ] ] i8=0"},
	{keyFindCoordinator, 0, "str=g"},
	{keyFindCoordinator, 4, "i8=0 ( str=g )"},
	{keyJoinGroup, 0, "str=g i32=1 str= str=consumer [ str=range nbytes=x ]"},
	{keyJoinGroup, 9, "str=g i32=10000 i32=10000 str= nstr=~ str=consumer [ str=range nbytes=x ] nstr=why"},
	{keyHeartbeat, 0, "str=g i32=0 str=m"},
	{keyHeartbeat, 4, "str=g i32=0 str=m nstr=~"},
	{keyLeaveGroup, 0, "str=g str=m"},
	{keyLeaveGroup, 5, "str=g [ str=m nstr=~ nstr=~ ]"},
	{keySyncGroup, 0, "str=g i32=0 str=m [ str=m nbytes=a ]"},
	{keySyncGroup, 5, "str=g i32=0 str=m nstr=~ nstr=~ nstr=~ [ str=m nbytes=a ]"},
	{keyDescribeGroups, 0, "( str=g )"},
	{keyDescribeGroups, 6, "( str=g ) i8=0"},
	{keyListGroups, 0, ""},
	{keyListGroups, 5, "( str=Stable ) ( str=classic )"},
	{keyAPIVersions, 0, ""},
	{keyAPIVersions, 4, "str=test str=1"},
	{keyCreateTopics, 0, "[ str=new i32=-1 i16=-1 [ i32=0 ( i32=1 ) ] [ str=retention.ms nstr=1 ] ] i32=1000"},
	{keyCreateTopics, 7, "[ str=new i32=-1 i16=-1 [ i32=0 ( i32=1 ) ] [ str=retention.ms nstr=1 ] ] i32=1000 i8=0"},
	{keyDeleteTopics, 0, "( str=gone ) i32=1000"},
	{keyDeleteTopics, 6, "[ nstr=gone uuid ] i32=1000"},
	{keyDeleteRecords, 0, "[ str=t [ i32=0 i64=0 ] ] i32=1000"},
	{keyDeleteRecords, 2, "[ str=t [ i32=0 i64=0 ] ] i32=1000"},
	{keyInitProducerID, 0, "nstr=~ i32=1000"},
	{keyInitProducerID, 4, "nstr=~ i32=1000 i64=-1 i16=-1"},
	{keyOffsetForLeaderEpoch, 2, "[ str=t [ i32=0 i32=-1 i32=1 ] ]"},
	{keyOffsetForLeaderEpoch, 4, "i32=-1 [ str=t [ i32=0 i32=-1 i32=1 ] ]"},
	{keyDescribeConfigs, 0, "[ i8=2 str=t n( str=retention.ms ) ]"},
	{keyDescribeConfigs, 4, "[ i8=2 str=t n( str=retention.ms ) ] i8=0 i8=0"},
	{keyCreatePartitions, 0, "[ str=t i32=3 n[ ( i32=1 ) ] ] i32=1000 i8=0"},
	{keyCreatePartitions, 3, "[ str=t i32=3 n[ ( i32=1 ) ] ] i32=1000 i8=0"},
	{keyDeleteGroups, 0, "( str=nothing )"},
	{keyDeleteGroups, 2, "( str=nothing )"},
	{keyIncrementalAlter, 0, "[ i8=2 str=t [ str=retention.ms i8=0 nstr=1 ] ] i8=0"},
	{keyIncrementalAlter, 1, "[ i8=2 str=t [ str=retention.ms i8=0 nstr=1 ] ] i8=0"},
	{keyDescribeCluster, 0, "i8=0"},
	{keyDescribeCluster, 2, "i8=0 i8=1 i8=0"},
	{keyDescribeTopicParts, 0, "[ str=t ] i32=2000 i8=-1"},
	{keyDescribeTopicParts, 0, "[ str=t ] i32=1 n{ str=t i32=0 }"},
}

// field is where a field of a body stands.
type field struct {
	kind     string // as in the schemas, without a value; "tags"
	at, size int    // of a length, for those that have one
	count    int    // its number
}

// layout encodes a schema.
type layout struct {
	w      writer
	fields []field
	batch  []byte
}

// structure encodes tokens up to the one that closes, and returns what follows.
func (l *layout) structure(tokens []string, closing string) []string {
	for len(tokens) > 0 && tokens[0] != closing {
		token, value, _ := strings.Cut(tokens[0], "=")
		tokens = tokens[1:]
		at := len(l.w.b)
		n, _ := strconv.ParseInt(value, 10, 64)
		switch token {
		case "i8":
			l.w.i8(int8(n))
		case "i16":
			l.w.i16(int16(n))
		case "i32":
			l.w.i32(int32(n))
		case "i64":
			l.w.i64(n)
		case "uuid":
			l.w.uuid(memoryTopic)
		case "str", "nstr":
			if value == "~" {
				l.w.nstr(nil)
			} else {
				l.w.str(value)
			}
		case "nbytes":
			if value == "batch" {
				value = string(l.batch)
			}
			l.w.bytes([]byte(value))
		case "[", "n[":
			l.w.array(1)
			l.note(token, at)
			tokens = l.structure(tokens, "]")
			continue
		case "n{":
			l.w.i8(1)
			l.note(token, at)
			tokens = l.structure(tokens, "}")
			continue
		case "(", "n(":
			l.w.array(1)
			l.note(token, at)
			flex := l.w.flex // plain values have no tags
			tokens = l.structure(tokens, ")")
			l.w.flex = flex
			continue
		default:
			panic(token)
		}
		l.note(token, at)
	}
	if closing != ")" && l.w.flex {
		at := len(l.w.b)
		l.w.tags()
		l.note("tags", at)
	}
	if len(tokens) > 0 {
		tokens = tokens[1:]
	}
	return tokens
}

func (l *layout) note(kind string, at int) {
	l.fields = append(l.fields, field{kind, at, len(l.w.b) - at, len(l.fields)})
}

// The outcomes besides an error code.
const (
	closed   = -2 // the connection is closed, without an answer
	answered = -3 // with any codes
)

// badCase is bad input and its outcome.
type badCase struct {
	name    string
	api     *api
	version int16 // of the answer
	frame   []byte
	want    int
	decodes bool // what it allocates may include a decoder
}

// decoderBytes is what a decoder of LZ4 or zstd keeps between batches. There are as many as cores, so it is no request's.
const decoderBytes = 12 << 20

func head(key, version int16, flex bool) []byte {
	w := &writer{}
	w.i16(key)
	w.i16(version)
	w.i32(1)
	client := "bad"
	w.nstr(&client)
	w.flex = flex
	w.tags()
	return w.b
}

// malformed makes the cases of one schema: what no encoder of the version could have sent.
func malformed(a *api, version int16, fields string, batch []byte) (out []badCase) {
	flex := version >= a.flex
	h := head(a.key, version, flex)
	l := &layout{w: writer{flex: flex}, batch: batch}
	l.structure(strings.Fields(fields), "")
	body := l.w.b
	add := func(name string, want int, parts ...[]byte) {
		out = append(out, badCase{fmt.Sprintf("%s v%d: %s", a.name, version, name), a, version, frame(slices.Concat(parts...)), want, false})
	}
	add("as it should be", answered, h, body)
	add("bytes behind the end", answered, h, body, []byte("xyz"))
	below, above := closed, closed
	if a.key == keyAPIVersions {
		below, above = int(codeUnsupportedVersion), int(codeUnsupportedVersion)
	}
	for v, want := range map[int16]int{a.served() - 1: below, a.max + 1: above, -1 << 15: below, 1<<15 - 1: above} {
		add(fmt.Sprint("sent as version ", v), want, head(a.key, v, flex), body)
		out[len(out)-1].version = 0
	}
	add("client ID of length -2", closed, h[:8], []byte{0xff, 0xfe}, body)
	add("client ID longer than the frame", closed, h[:8], []byte{0x7f, 0xff}, body)
	add("header only, cut", closed, h[:9])
	if flex {
		add("unknown tag in the header", answered, h[:len(h)-1], []byte{1, 99, 2, 'a', 'b'}, body)
		add("2^32-1 tags in the header", closed, h[:len(h)-1], []byte{0xff, 0xff, 0xff, 0xff, 0x0f}, body)
		add("null client ID", answered, h[:8], []byte{0xff, 0xff, 0}, body)
	} else {
		add("null client ID", answered, h[:8], []byte{0xff, 0xff}, body)
	}
	for _, f := range l.fields {
		what := func(s string) string { return fmt.Sprintf("field %d (%s) %s", f.count, f.kind, s) }
		before, behind := body[:f.at], body[f.at+f.size:]
		add(what("and all behind it missing"), closed, h, before)
		if f.size > 1 {
			add(what("cut in the middle"), closed, h, before, body[f.at:f.at+f.size/2])
		}
		length := func(n int64) []byte {
			switch {
			case flex:
				return binary.AppendUvarint(nil, uint64(n+1))
			case strings.HasSuffix(f.kind, "str"):
				return binary.BigEndian.AppendUint16(nil, uint16(n))
			}
			return binary.BigEndian.AppendUint32(nil, uint32(n))
		}
		switch f.kind {
		case "str", "nstr", "nbytes":
			add(what("longer than the frame"), closed, h, before, length(1<<15-1), behind)
			if !flex {
				add(what("of length -2"), closed, h, before, length(-2), behind)
				add(what("of the least length"), closed, h, before, length(-1<<31|-1<<15), behind)
			}
			if f.kind == "str" {
				add(what("null"), closed, h, before, length(-1), behind)
			}
		case "[", "n[", "(", "n(":
			add(what("with more elements than bytes"), closed, h, before, length(int64(len(body)+1)), behind)
			add(what("with 2^31-2 elements"), closed, h, before, length(1<<31-2), behind)
			if !flex {
				add(what("of length -2"), closed, h, before, length(-2), behind)
			}
		case "tags":
			add(what("unknown"), answered, h, before, []byte{2, 98, 0, 99, 3, 'a', 'b', 'c'}, behind)
			add(what("2^32-1 of them"), closed, h, before, []byte{0xff, 0xff, 0xff, 0xff, 0x0f}, behind)
			add(what("longer than the frame"), closed, h, before, []byte{1, 99, 0xff, 0xff, 0xff, 0x0f}, behind)
			continue
		default:
			continue
		}
		if flex {
			add(what("with a length of 11 bytes"), closed, h, before, bytes.Repeat([]byte{0xff}, 10), []byte{1}, behind)
			add(what("with a length above 32 bits"), closed, h, before, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 1}, behind)
		}
	}
	return out
}

// bench runs cases on one server and measures them.
type bench struct {
	t       *testing.T
	s       *Server
	cases   int
	slowest time.Duration
	slow    string
	most    float64 // bytes allocated per byte of a frame, behind the first MiB
	hungry  string
}

// serve gives a connection to the server; end waits for its end.
func (b *bench) serve() (client net.Conn, end func()) {
	client, server := net.Pipe()
	done := make(chan struct{})
	go func() {
		newConn(b.s, server, "bad").serve()
		close(done)
	}()
	_ = client.SetDeadline(time.Now().Add(waitMost)) // of a test that hangs
	return client, func() { _ = client.Close(); <-done }
}

func answerOf(c net.Conn, frame []byte) ([]byte, error) {
	sent := make(chan struct{})
	go func() { _, _ = c.Write(frame); close(sent) }() // the server may close before it has read all
	defer func() { <-sent }()
	size := make([]byte, 4)
	if _, err := io.ReadFull(c, size); err != nil {
		_ = c.Close()
		return nil, err
	}
	b := make([]byte, 4+binary.BigEndian.Uint32(size))
	copy(b, size)
	_, err := io.ReadFull(c, b[4:])
	return b, err
}

// run checks a case: outcome, memory, and that the server answers the next request.
func (b *bench) run(x badCase) {
	b.t.Helper()
	b.cases++
	most := allowance(len(x.frame))
	kept := uint64(0)
	if x.decodes {
		kept = decoderBytes
	}
	var c net.Conn
	var got []byte
	var err error
	var took time.Duration
	end := func() {}
	used := allocates(most+kept, func() { end(); c, end = b.serve() }, func() {
		began := time.Now()
		got, err = answerOf(c, x.frame)
		took = time.Since(began)
	})
	used -= min(used, kept+uint64(len(got))) // the decoder's and the client's
	if took > b.slowest {
		b.slowest, b.slow = took, x.name
	}
	if over := (float64(used) - 1<<20) / float64(len(x.frame)); over > b.most {
		b.most, b.hungry = over, x.name
	}
	if used > most {
		b.t.Errorf("%s: %d bytes were allocated for a frame of %d", x.name, used, len(x.frame))
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		b.t.Errorf("%s: neither an answer nor the end", x.name)
	case (err != nil) != (x.want == closed):
		b.t.Errorf("%s: outcome %x, %v", x.name, got[:min(len(got), 100)], err)
	case err == nil && x.want == int(codeUnsupportedVersion) && x.api.key == keyAPIVersions:
		if len(got) < 10 || got[9] != byte(codeUnsupportedVersion) {
			b.t.Errorf("%s: %x", x.name, got)
		}
	case err == nil:
		codes := codesOf(b.t, x, got)
		if x.want != answered && (len(codes) != 1 || codes[0] != int16(x.want)) {
			b.t.Errorf("%s: codes %d, want %d", x.name, codes, x.want)
		}
	}
	if err != nil {
		end()
		c, end = b.serve()
	}
	ping := frame(append(head(keyAPIVersions, 4, true), 2, 'a', 2, '1', 0))
	if got, err := answerOf(c, ping); err != nil || len(got) < 100 {
		b.t.Errorf("%s: the next request: %x, %v", x.name, got, err)
	}
	end() // an answer may be there before its frame has been given back
	if !b.s.frames.TryAcquire(b.s.cfg.FrameBudget) {
		b.t.Fatalf("%s: its frame was not given back", x.name)
	}
	b.s.frames.Release(b.s.cfg.FrameBudget)
}

func newBench(t *testing.T) *bench {
	s := memoryServer(t)
	s.cfg.RequestMaxBytes = 16 << 20
	s.groups.shards[1] = &shardGroups{c: s.groups, id: 1, groups: map[string]*liveGroup{}}
	t.Cleanup(s.groups.shards[1].unload)
	return &bench{t: t, s: s}
}

func (b *bench) report() {
	b.t.Logf("%d cases; the slowest took %s (%s); the most memory behind the first MiB was %.1f times the frame (%s)", b.cases, b.slowest.Round(time.Microsecond), b.slow, b.most, b.hungry)
}

// Requests that no client could have encoded: the connection is closed, and what must be skipped is skipped.
func TestMalformedRequests(t *testing.T) {
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, leaks) })
	b := newBench(t)
	batch := batchBytes(t, record.CodecNone, "a")
	seen := map[int16]int{}
	for _, x := range schemas {
		a := b.s.apis[x.key]
		if want := [2]int16{a.served(), a.max}[seen[x.key]]; want != x.version {
			t.Errorf("%s: version %d is in the table, %d is due", a.name, x.version, want)
		}
		seen[x.key]++
		for _, c := range malformed(a, x.version, x.fields, batch) {
			b.run(c)
		}
	}
	for key, a := range b.s.apis {
		if seen[key] != 2 {
			t.Errorf("%s is not in the table", a.name)
		}
	}
	b.report()
}

// What is no frame, or a frame of something that is not served, ends the connection before anything is read into memory.
func TestBadFrames(t *testing.T) {
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, leaks) })
	b := newBench(t)
	sized := func(size int32, body ...byte) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(size)), body...)
	}
	metadata, produce := head(keyMetadata, 9, true), head(keyProduce, 9, true)
	rows := map[string][]byte{"an HTTP request": []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "a TLS hello": append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, make([]byte, 50)...), "an SSH banner": []byte("SSH-2.0-OpenSSH_9\r\n"),
		"a PROXY header": []byte("PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n"), "Postgres": {0, 0, 0, 8, 4, 210, 22, 47, 0, 0, 0, 0}, "zeros": make([]byte, 64), "ones": bytes.Repeat([]byte{255}, 64)}
	for _, size := range []int32{0, 1, 4, 7, -1, -8, -1 << 31} {
		rows[fmt.Sprint("size ", size)] = sized(size, metadata...)
	}
	for _, size := range []int32{16<<20 + 1, 100 << 20, 1<<31 - 1} {
		rows[fmt.Sprint("produce of ", size)] = sized(size, produce...)
	}
	for _, size := range []int32{smallFrame + 1, 16 << 20} {
		rows[fmt.Sprint("metadata of ", size)] = sized(size, metadata...)
	}
	for _, key := range []int16{-1, -1 << 15, 93, 1000, 1<<15 - 1} {
		rows[fmt.Sprint("key ", key)] = frame(head(key, 0, false))
	}
	for key := range int16(93) {
		if b.s.apis[key] == nil {
			rows[fmt.Sprint("key ", key, ", which Kafka has")] = frame(head(key, 0, false))
		}
	}
	for name, bytes := range rows {
		b.run(badCase{name, nil, 0, bytes, closed, false})
	}
	b.report()
}
