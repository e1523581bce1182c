package broker

import (
	"encoding/binary"
	"errors"
	"hash/maphash"
	"math"
	"math/bits"

	"github.com/estran/estran/tiering/record"
)

// errDecode: a request's bytes contradict its schema. The connection is closed.
var errDecode = errors.New("malformed request")

// reader decodes a request in place. The first fault sticks; what is read after it is zero. Byte slices alias the frame. flex selects the compact
// encodings of flexible versions (KIP-482).
type reader struct {
	b    []byte
	flex bool
	err  error
}

func (r *reader) take(n int) []byte {
	if r.err != nil || n < 0 || n > len(r.b) {
		r.err = errDecode
		return nil
	}
	out := r.b[:n:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) i8() int8 {
	if b := r.take(1); b != nil {
		return int8(b[0])
	}
	return 0
}

func (r *reader) i16() int16 {
	if b := r.take(2); b != nil {
		return int16(binary.BigEndian.Uint16(b))
	}
	return 0
}

func (r *reader) i32() int32 {
	if b := r.take(4); b != nil {
		return int32(binary.BigEndian.Uint32(b))
	}
	return 0
}

func (r *reader) i64() int64 {
	if b := r.take(8); b != nil {
		return int64(binary.BigEndian.Uint64(b))
	}
	return 0
}

func (r *reader) bool() bool { return r.i8() != 0 }

func (r *reader) uuid() (id record.TopicID) {
	copy(id[:], r.take(16))
	return id
}

// uvarint reads an unsigned varint of at most 32 bits.
func (r *reader) uvarint() uint32 {
	v, n := binary.Uvarint(r.b)
	if r.err != nil || n <= 0 || v > 1<<32-1 {
		r.err = errDecode
		return 0
	}
	r.b = r.b[n:]
	return uint32(v)
}

// length reads a length in the version's encoding; -1 is null.
func (r *reader) length(short bool) int {
	switch {
	case r.flex:
		return int(r.uvarint()) - 1
	case short:
		return int(r.i16())
	}
	return int(r.i32())
}

// str reads a string; null is an error.
func (r *reader) str() string {
	n := r.length(true)
	if n < 0 {
		r.err = errDecode
		return ""
	}
	return string(r.take(n))
}

// nstr reads a nullable string.
func (r *reader) nstr() *string {
	n := r.length(true)
	if n < 0 {
		if n != -1 {
			r.err = errDecode
		}
		return nil
	}
	s := string(r.take(n))
	return &s
}

// bytes reads nullable bytes, aliasing the frame.
func (r *reader) bytes() []byte {
	n := r.length(false)
	if n < 0 {
		if n != -1 {
			r.err = errDecode
		}
		return nil
	}
	return r.take(n)
}

// array reads an array's length; every element takes at least least bytes, so that a hostile count is refused before anything is allocated. -1 is null.
func (r *reader) array(least int) int {
	n := r.length(false)
	if r.err != nil || n < -1 || n > len(r.b)/max(least, 1) {
		r.err = errDecode
		return 0
	}
	return n
}

// i32s reads an array of int32; null is empty.
func (r *reader) i32s() []int32 {
	n := max(r.array(4), 0)
	out := make([]int32, n)
	for i := range out {
		out[i] = r.i32()
	}
	return out
}

// leastString is the length of an empty string.
func (r *reader) leastString() int {
	if r.flex {
		return 1
	}
	return 2
}

// strs reads an array of strings; null stays nil.
func (r *reader) strs() []string {
	n := r.array(r.leastString())
	if n < 0 {
		return nil
	}
	out := make([]string, n)
	for i := range out {
		out[i] = r.str()
	}
	return out
}

// names reads an array of strings, each once; null is empty.
func (r *reader) names() []string {
	n := max(r.array(r.leastString()), 0)
	out := make([]string, 0, r.room(n, r.leastString()))
	again := repeated(n, func(i int) string { return out[i] })
	for range n {
		if s := r.str(); !again(s) {
			out = append(out, s)
		}
	}
	return out
}

// room is how many of the n elements of an array can differ, if each takes least bytes and those of its name: where there are many, two at least.
func (r *reader) room(n, least int) int { return min(n, len(r.b)/(least+2)+1) }

// repeated reports whether it was given a key before. What a request names twice is answered once, as clients expect it who look for it by its name: else a frame of a few bytes a
// time would ask for the whole of a large answer each time. It is asked n times; nth is the key of the nth answer that was no, which the caller has kept: a map would be a multiple
// of the request.
func repeated[K comparable](n int, nth func(int) K) func(K) bool {
	seed, table, kept := maphash.MakeSeed(), make([]int32, 1<<bits.Len(uint(n+n/2))), int32(0)
	return func(k K) bool {
		at := int(maphash.Comparable(seed, k) % uint64(len(table)))
		for ; table[at] != 0; at = (at + 1) % len(table) {
			if nth(int(table[at]-1)) == k {
				return true
			}
		}
		kept++
		table[at] = kept
		return false
	}
}

// tags skips the tagged fields of a structure in flexible versions.
func (r *reader) tags() {
	if !r.flex {
		return
	}
	for n := r.uvarint(); n > 0 && r.err == nil; n-- {
		r.uvarint()
		r.take(int(r.uvarint()))
	}
}

// writer encodes an answer.
type writer struct {
	b    []byte
	flex bool
}

func (w *writer) i8(v int8)              { w.b = append(w.b, byte(v)) }
func (w *writer) i16(v int16)            { w.b = binary.BigEndian.AppendUint16(w.b, uint16(v)) }
func (w *writer) i32(v int32)            { w.b = binary.BigEndian.AppendUint32(w.b, uint32(v)) }
func (w *writer) i64(v int64)            { w.b = binary.BigEndian.AppendUint64(w.b, uint64(v)) }
func (w *writer) uuid(id record.TopicID) { w.b = append(w.b, id[:]...) }

func (w *writer) bool(v bool) {
	if v {
		w.i8(1)
	} else {
		w.i8(0)
	}
}

func (w *writer) uvarint(v uint32) { w.b = binary.AppendUvarint(w.b, uint64(v)) }

func (w *writer) str(s string) {
	if w.flex {
		w.uvarint(uint32(len(s)) + 1)
	} else {
		s = s[:min(len(s), math.MaxInt16)] // what is longer came in a flexible version, or quotes what came
		w.i16(int16(len(s)))
	}
	w.b = append(w.b, s...)
}

// nstr writes a nullable string; nil is null.
func (w *writer) nstr(s *string) {
	switch {
	case s != nil:
		w.str(*s)
	case w.flex:
		w.uvarint(0)
	default:
		w.i16(-1)
	}
}

// text writes a nullable string; "" is null.
func (w *writer) text(s string) {
	if s == "" {
		w.nstr(nil)
	} else {
		w.str(s)
	}
}

// bytes writes bytes; nil is empty, never null.
func (w *writer) bytes(b []byte) {
	w.array(len(b))
	w.b = append(w.b, b...)
}

// array writes an array's length; -1 is null.
func (w *writer) array(n int) {
	if w.flex {
		w.uvarint(uint32(n + 1))
	} else {
		w.i32(int32(n))
	}
}

func (w *writer) i32s(v []int32) {
	w.array(len(v))
	for _, x := range v {
		w.i32(x)
	}
}

// tags writes that a structure has no tagged fields.
func (w *writer) tags() {
	if w.flex {
		w.b = append(w.b, 0)
	}
}

// taggedField is a field that a client may not know.
type taggedField struct {
	tag  uint32
	body []byte
}

// tagged writes a structure's tagged fields, in the order of their tags.
func (w *writer) tagged(fields ...taggedField) {
	if !w.flex {
		return
	}
	w.uvarint(uint32(len(fields)))
	for _, f := range fields {
		w.uvarint(f.tag)
		w.uvarint(uint32(len(f.body)))
		w.b = append(w.b, f.body...)
	}
}
