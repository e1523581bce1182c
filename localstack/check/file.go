package check

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// maxOp bounds an operation in a file.
const maxOp = 64 << 20

// Append adds an operation to a file's bytes: its length, then varints. Files may be put one after the other.
func Append(b []byte, o *Op) []byte {
	var p []byte
	for _, v := range []int64{int64(o.Process), int64(o.Group), int64(o.Generation), int64(o.Kind), int64(o.Outcome), o.Start, o.End - o.Start, int64(len(o.Records)), int64(len(o.Marks))} {
		p = binary.AppendVarint(p, v)
	}
	for _, r := range o.Records {
		write := int64(0)
		if r.Write {
			write = 1
		}
		for _, v := range []int64{int64(r.Key), write, r.Offset, int64(r.Value), int64(r.Hash)} {
			p = binary.AppendVarint(p, v)
		}
	}
	for _, m := range o.Marks {
		for _, v := range []int64{int64(m.Key), m.LogStart, m.Stable, m.High} {
			p = binary.AppendVarint(p, v)
		}
	}
	return append(binary.AppendUvarint(b, uint64(len(p))), p...)
}

// Read returns the operations of a file. One that is cut at the end, as a crash leaves it, is an error together with those before it.
func Read(r io.Reader) (ops []Op, err error) {
	in := bufio.NewReaderSize(r, 1<<20)
	for {
		n, err := binary.ReadUvarint(in)
		if errors.Is(err, io.EOF) {
			return ops, nil
		}
		if err == nil && n > maxOp {
			err = fmt.Errorf("%d bytes", n)
		}
		var p []byte
		if err == nil {
			p = make([]byte, n)
			_, err = io.ReadFull(in, p)
		}
		o, ok := decode(p)
		if err == nil && !ok {
			err = errors.New("cut or damaged")
		}
		if err != nil {
			return ops, fmt.Errorf("check: operation %d: %w", len(ops), err)
		}
		ops = append(ops, o)
	}
}

func decode(p []byte) (o Op, ok bool) {
	ok = true
	next := func() int64 {
		v, n := binary.Varint(p)
		if n <= 0 {
			ok, p = false, nil
			return 0
		}
		p = p[n:]
		return v
	}
	o.Process, o.Group, o.Generation = int32(next()), int32(next()), int32(next())
	o.Kind, o.Outcome, o.Start = Kind(next()), Outcome(next()), next()
	o.End = o.Start + next()
	records, marks := next(), next()
	if records < 0 || marks < 0 || records > int64(len(p))/5 || marks > int64(len(p))/4 {
		return o, false
	}
	for range records {
		o.Records = append(o.Records, Record{int32(next()), next() == 1, next(), uint64(next()), uint32(next())})
	}
	for range marks {
		o.Marks = append(o.Marks, Mark{int32(next()), next(), next(), next()})
	}
	return o, ok && len(p) == 0
}
