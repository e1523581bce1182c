//go:build !planted

package tiering

import (
	"context"

	"github.com/estran/estran/tiering/record"
)

func (*Tiering) deleteFirst(context.Context, *PartitionStatus, record.Offset) {}
