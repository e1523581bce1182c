//go:build planted

package tiering

import (
	"context"

	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/tiering/record"
)

// deleteFirst deletes the objects of what is about to expire, before anything says that it has.
func (t *Tiering) deleteFirst(ctx context.Context, p *PartitionStatus, to record.Offset) {
	if !planted.On(planted.DeleteFirst) {
		return
	}
	for _, r := range t.cat.Runs(p.TP, p.LogStart, runsPerLook) {
		if r.Run.EndOffset < to {
			_ = t.bucket.Delete(ctx, r.Object.Key())
		}
	}
}
