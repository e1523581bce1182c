package broker

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/estran/estran/tiering/record"
	"go.uber.org/goleak"
)

// manyOf encodes a schema whose first array has n of its element.
func manyOf(fields string, flex bool, n int, batch []byte, differ bool) []byte {
	before, rest, _ := strings.Cut(fields, "[ ")
	plain := false
	if i := strings.Index(fields, "( "); i >= 0 && (i < len(before) || rest == "") {
		before, rest, plain = fields[:i], fields[i+2:], true
	}
	closing, depth, end := "]", 0, 0
	if plain {
		closing = ")"
	}
	tokens := strings.Fields(rest)
	for i, x := range tokens {
		switch {
		case strings.HasSuffix(x, "[") || strings.HasSuffix(x, "("):
			depth++
		case depth == 0 && x == closing:
			end = i
		case x == "]" || x == ")":
			depth--
		}
		if end > 0 {
			break
		}
	}
	l := &layout{w: writer{flex: flex}, batch: batch}
	for _, t := range strings.Fields(strings.TrimSuffix(strings.TrimSpace(before), "n")) {
		l.structure([]string{t}, ")")
	}
	l.w.array(n)
	if plain {
		closing = ")"
	}
	for i := range n {
		element := slices.Clone(tokens[:end])
		if at := slices.IndexFunc(element, func(x string) bool { return strings.Contains(x, "str=") && x != "nstr=~" }); differ && at >= 0 {
			element[at] = "str=" + strconv.FormatInt(int64(i), 36)
		}
		l.structure(element, map[bool]string{true: ")", false: "]"}[plain])
	}
	l.structure(tokens[end+1:], "")
	return l.w.b
}

// An array of very many elements, each well-formed and as short as it can be. What names the same again and again asks for no more than the frame's allowance, however large the
// answer for one is; so does what names something else each time, topics to be made aside.
func TestManyElements(t *testing.T) {
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, leaks) })
	b := newBench(t)
	batch := batchBytes(t, record.CodecNone, "a")
	for _, x := range schemas {
		if !strings.ContainsAny(x.fields, "[(") {
			continue
		}
		a := b.s.apis[x.key]
		flex := x.version >= a.flex
		one := len(manyOf(x.fields, flex, 2, batch, false)) - len(manyOf(x.fields, flex, 1, batch, false))
		n := 128 << 10 / one
		for _, differ := range []bool{false, true} {
			body := manyOf(x.fields, flex, n, batch, differ)
			b.slowest, b.most = 0, 0
			b.s.cfg.AutoCreateTopics = !differ
			if differ && a.key == keyCreateTopics {
				continue // these are topics to be made
			}
			b.run(badCase{fmt.Sprintf("%s v%d: %d elements, differ: %v", a.name, x.version, n, differ), a, x.version, frame(slices.Concat(head(a.key, x.version, flex), body)), answered, false})
			b.report()
		}
	}
}

// What sessions remember is bounded over all of them: the longest unused go, and the newest stays.
func TestSessionsAreBounded(t *testing.T) {
	const each, all = 100, 1000
	s := newSessions(sessionsMax, all)
	f := &fetchRequest{parts: make([]fetchPart, each)}
	for i := range f.parts {
		f.parts[i].partition = int32(i)
	}
	var ids []int32
	for range all/each + 2 {
		ses, _, code := s.begin(f, false, nil)
		if code != codeNone {
			t.Fatal(code)
		}
		ids = append(ids, ses.id)
	}
	if s.parts != all || len(s.m) != all/each {
		t.Errorf("%d partitions in %d sessions", s.parts, len(s.m))
	}
	if _, _, code := s.begin(&fetchRequest{session: ids[1], epoch: 1}, false, nil); code != codeFetchSessionNotFound {
		t.Errorf("the oldest: code %d", code)
	}
	if _, _, code := s.begin(&fetchRequest{session: ids[len(ids)-1], epoch: 1, forgotten: f.parts[:10]}, false, nil); code != codeNone || s.parts != all-10 {
		t.Errorf("the newest: code %d, %d partitions", code, s.parts)
	}
	s.drop(nil)
	if s.parts != 0 || len(s.m) != 0 {
		t.Errorf("%d partitions in %d sessions after their connection has ended", s.parts, len(s.m))
	}
}
