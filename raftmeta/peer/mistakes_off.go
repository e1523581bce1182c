//go:build !planted

package peer

import "github.com/hashicorp/raft"

func (*Transport) keepHandler(func(raft.RPC)) {}

func (*Transport) handBeat(*raft.AppendEntriesRequest) (any, bool, error) { return nil, false, nil }
