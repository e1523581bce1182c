package raftmeta

import (
	"errors"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// ReplayMeta gives meta's state as the directory of a node that does not run holds it: the newest snapshot and the entries behind it, up to index upTo. The log may hold entries that
// were never committed: what is committed is for the caller to know. A newest snapshot above upTo is given as it is; Applied says what was got.
func ReplayMeta(dataDir string, upTo uint64) (m *state.Meta, err error) {
	s, err := openSurvivor(dataDir, 0)
	if err != nil {
		return nil, err
	}
	m, err = s.replayMeta(upTo)
	return m, errors.Join(err, s.close())
}

// ReplayShard is ReplayMeta of a shard.
func ReplayShard(dataDir string, id record.ShardID, upTo uint64) (m *state.Shard, err error) {
	s, err := openSurvivor(dataDir, id)
	if err != nil {
		return nil, err
	}
	m, err = s.replayShard(upTo)
	return m, errors.Join(err, s.close())
}
