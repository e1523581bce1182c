package broker

import (
	"testing"

	"github.com/estran/estran/tiering/record"
)

// BenchmarkProduce decodes, checks and answers a request of one batch; the backend keeps nothing.
func BenchmarkProduce(b *testing.B) {
	s := memoryServer(b)
	a := s.apis[keyProduce]
	req := produceReq("t", -1, batchBytes(b, record.CodecNone, "a"))
	req.SetVersion(a.max)
	body := req.AppendTo(nil)
	c := newConn(s, nil, "bench")
	b.ReportAllocs()
	for b.Loop() {
		r := &request{s: s, c: c, api: a, version: a.max, slot: &answer{api: a}, reader: reader{b: body, flex: true}}
		if err := a.handle(r); err != nil || !r.slot.ready {
			b.Fatal(err)
		}
	}
}
