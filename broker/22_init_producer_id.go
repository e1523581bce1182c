package broker

import (
	"errors"
	"time"
)

// InitProducerId (22), versions 0-4, for idempotent producers: always a new ID with epoch 0. Version 3 lets a producer name its old ID and epoch (KIP-360);
// without a transactional ID it gets a new one all the same, as in Kafka.
func handleInitProducerID(r *request) error {
	txn := r.nstr()
	r.i32() // transaction timeout
	if r.version >= 3 {
		r.i64()
		r.i16()
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	code, id, epoch := codeNone, int64(-1), int16(-1)
	if txn != nil {
		code = codeTransactionalIDAuth // transactions are not served by this version
	} else {
		ctx, cancel := r.timeout(10 * time.Second)
		pid, err := r.s.b.AllocateProducerID(ctx)
		cancel()
		if err != nil {
			code = codeCoordinatorNotAvailable
			if errors.Is(err, ctx.Err()) && ctx.Err() != nil {
				code = codeRequestTimedOut
			}
		} else {
			id, epoch = int64(pid), 0
		}
	}
	w := r.respond(32)
	w.i32(0)
	w.i16(code)
	w.i64(id)
	w.i16(epoch)
	w.tags()
	r.finish(w)
	return nil
}
