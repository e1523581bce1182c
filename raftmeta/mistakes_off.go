//go:build !planted

package raftmeta

import "github.com/estran/estran/raftmeta/state"

func (g *group) mistakeBefore(*openEntry, []byte) ([]state.AppendResult, uint64) { return nil, 0 }

func (g *group) mistakeAnswer(*openEntry, []int32, []state.AppendResult, uint64) {}
