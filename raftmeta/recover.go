package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/hashicorp/raft"
)

// recoverTerms is how far a recovery raises every term: above any that the lost voters may have reached without this one.
const recoverTerms = 1000

// ErrPeerAnswers: a node that may belong to the cluster is there, so the majority need not be lost.
var ErrPeerAnswers = errors.New("raftmeta: a peer answers")

// Recovery makes the log of one survivor the cluster's, when the majority is lost for good.
type Recovery struct {
	DataDir string
	NodeID  int32
	// Backup is a directory that does not exist: the data directory is copied there before anything is changed.
	Backup string
	// Voters are asked whether they are there, as are the nodes that meta knows.
	Voters []Voter
	// Fence makes it known outside, before anything is changed, that the cluster goes on in a new epoch, above `above`; it returns that epoch, the same one to the same server.
	Fence func(ctx context.Context, clusterID, server string, above uint64) (epoch uint64, err error)
	// Progress is told what is done.
	Progress func(string)
}

// Recovered is where a partition ends in the survivor's log. Records that were acknowledged at or above End by the lost voters are gone.
type Recovered struct {
	Topic     string
	Partition int32
	Start     record.Offset
	Sealed    record.Offset // below this the records are in objects
	End       record.Offset
}

// Recover does it. It may be repeated after a crash at any point; until it has ended the node does not start.
func Recover(ctx context.Context, r Recovery) (out []Recovered, err error) {
	if _, err := os.Stat(filepath.Join(r.DataDir, identityFile)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrForeign, err)
	}
	id, lock, _, err := openDataDir(r.DataDir, r.NodeID, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if id.ClusterID == "" {
		return nil, fmt.Errorf("%w: it belongs to no cluster yet", ErrForeign)
	}
	if err := r.silent(ctx, id, r.Voters); err != nil {
		return nil, err
	}
	r.Progress("copying " + r.DataDir + " to " + r.Backup)
	if err := copyTree(ctx, r.DataDir, r.Backup); err != nil {
		return nil, fmt.Errorf("backing up: %w", err)
	}
	meta, err := openSurvivor(r.DataDir, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, meta.close()) }()
	m, err := meta.replayMeta(math.MaxUint64)
	if err != nil {
		return nil, err
	}
	c := m.View()
	if c.ID == "" {
		return nil, fmt.Errorf("%w: its meta log does not know the cluster", ErrForeign)
	}
	var known []Voter
	for _, n := range c.Registered() {
		known = append(known, Voter{n.ID, n.Peer})
	}
	if err := r.silent(ctx, id, known); err != nil {
		return nil, err
	}
	shards := make([]*survivor, c.Shards)
	for i := range shards {
		if shards[i], err = openSurvivor(r.DataDir, record.ShardID(i+1)); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, shards[i].close()) }()
		s, err := shards[i].replayShard(math.MaxUint64)
		if err != nil {
			return nil, err
		}
		out = append(out, ends(c, s)...)
	}
	slices.SortFunc(out, func(a, b Recovered) int {
		if c := strings.Compare(a.Topic, b.Topic); c != 0 {
			return c
		}
		return int(a.Partition - b.Partition)
	})
	epoch, err := r.Fence(ctx, id.ClusterID, id.serverID(), max(id.Epoch, c.RecoveryEpoch()))
	if err != nil {
		return nil, err
	}
	path := filepath.Join(r.DataDir, identityFile)
	id.Recovering = epoch
	if err := writeIdentity(path, id); err != nil {
		return nil, err
	}
	for _, s := range append([]*survivor{meta}, shards...) {
		r.Progress(fmt.Sprintf("making this node the only voter of group %d", s.id))
		if err := s.alone(id.serverID()); err != nil {
			return nil, err
		}
	}
	id.Epoch, id.Recovering, id.Recovered = epoch, 0, epoch
	return out, writeIdentity(path, id)
}

func ends(c *state.Cluster, s *state.Shard) (out []Recovered) {
	for p := range s.Partitions() {
		if t, ok := c.TopicByID(p.TP.Topic); ok {
			out = append(out, Recovered{t.Name, p.TP.Partition, p.LogStart, p.SealedEnd, p.HighWatermark})
		}
	}
	return out
}

// silent fails if anybody listens where another voter should be: whether it is one can only be said by starting this node.
func (r *Recovery) silent(ctx context.Context, id identity, voters []Voter) error {
	for _, v := range voters {
		if v.ID == id.NodeID || v.Addr == "" {
			continue
		}
		r.Progress(fmt.Sprintf("asking whether node %d answers at %s", v.ID, v.Addr))
		d := net.Dialer{Timeout: 3 * time.Second}
		c, err := d.DialContext(ctx, "tcp", v.Addr)
		if err == nil {
			_ = c.Close()
			return fmt.Errorf("%w: node %d at %s", ErrPeerAnswers, v.ID, v.Addr)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// survivor is a group's log that no raft has open.
type survivor struct {
	id     record.ShardID
	log    *raftlog.Log
	stable *raftlog.Stable
	snaps  *raftlog.Snapshots
}

func openSurvivor(dataDir string, id record.ShardID) (*survivor, error) {
	dir := filepath.Join(dataDir, "meta")
	if id != 0 {
		dir = filepath.Join(dataDir, fmt.Sprintf("shard-%d", id))
	}
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("%w: this node has never had group %d: %w", ErrForeign, id, err)
	}
	s := &survivor{id: id}
	fatal := func(error) {} // the write that failed says so itself
	var err error
	if s.log, err = raftlog.Open(raftlog.Config{Dir: dir, Group: uint32(id), FS: raftlog.OS{}, OnFatal: fatal}); err != nil {
		return nil, err
	}
	if s.stable, err = raftlog.OpenStable(raftlog.OS{}, dir, fatal); err != nil {
		return nil, errors.Join(err, s.close())
	}
	if s.snaps, err = raftlog.OpenSnapshots(s.log); err != nil {
		return nil, errors.Join(err, s.close())
	}
	last, err := s.log.LastIndex()
	if err == nil && (last == 0 || s.stable.Empty()) {
		err = fmt.Errorf("%w: group %d is empty here", ErrForeign, id)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *survivor) close() error {
	var errs []error
	if s.log != nil {
		errs = append(errs, s.log.Close())
	}
	if s.stable != nil {
		errs = append(errs, s.stable.Close())
	}
	return errors.Join(errs...)
}

// replay gives the newest snapshot, if there is one, and then every command behind it, up to index upTo.
func (s *survivor) replay(upTo uint64, restore func(io.Reader) error, apply func(*raft.Log) error) error {
	from, err := s.log.FirstIndex()
	if err != nil {
		return err
	}
	list, err := s.snaps.Store().List()
	if err != nil {
		return err
	}
	if len(list) > 0 {
		_, rc, err := s.snaps.Open(list[0].ID)
		if err != nil {
			return err
		}
		if err := errors.Join(restore(rc), rc.Close()); err != nil {
			return err
		}
		from = list[0].Index + 1
	}
	last, err := s.log.LastIndex()
	if err != nil {
		return err
	}
	var e raft.Log
	for i := from; i <= min(last, upTo); i++ {
		if err := s.log.GetLog(i, &e); err != nil {
			return err
		}
		if e.Type == raft.LogCommand {
			if err := apply(&e); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *survivor) replayMeta(upTo uint64) (m *state.Meta, err error) {
	m = state.NewMeta()
	err = s.replay(upTo, func(r io.Reader) (err error) { m, err = state.RestoreMeta(r); return err },
		func(e *raft.Log) error {
			m.Apply(state.RaftIndex(e.Index), state.Term(e.Term), e.Data)
			return state.CheckLevel(m.FeatureLevel(), state.LevelNewest)
		})
	return m, err
}

func (s *survivor) replayShard(upTo uint64) (m *state.Shard, err error) {
	m = state.NewShard(s.id)
	err = s.replay(upTo, func(r io.Reader) (err error) { m, err = state.RestoreShard(r); return err },
		func(e *raft.Log) error {
			m.Apply(state.RaftIndex(e.Index), state.Term(e.Term), e.Data)
			return state.CheckLevel(m.FeatureLevel(), state.LevelNewest)
		})
	return m, err
}

var keyCurrentTerm = []byte("CurrentTerm") // raft's

// alone appends a configuration with one voter. raft uses the last configuration of its log, committed or not; with it this server is a majority, and all that its log holds becomes
// committed. The log itself stays: it is where hot records are.
func (s *survivor) alone(server string) error {
	last, err := s.log.LastIndex()
	if err != nil {
		return err
	}
	var e raft.Log
	term := uint64(0)
	if err := s.log.GetLog(last, &e); err == nil {
		term = e.Term
	} else if base, t := s.log.Base(); base == last {
		term = t
	} else {
		return err
	}
	current, err := s.stable.GetUint64(keyCurrentTerm)
	if err != nil {
		return err
	}
	term = max(term, current) + recoverTerms
	if err := s.stable.SetUint64(keyCurrentTerm, term); err != nil {
		return err
	}
	conf := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(server), Address: raft.ServerAddress(server)}}}
	return s.log.StoreLogs([]*raft.Log{{Index: last + 1, Term: term, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(conf)}})
}

// copyTree copies a directory to one that does not exist, and returns when the copy is durable.
func copyTree(ctx context.Context, from, to string) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		rel, relErr := filepath.Rel(from, path)
		if err = errors.Join(err, relErr); err != nil || rel == "." || rel == "LOCK" {
			return err
		}
		if rel == "objects" && d.IsDir() { // the default store: it is not changed
			return fs.SkipDir
		}
		target := filepath.Join(to, rel)
		if d.IsDir() {
			return os.Mkdir(target, 0o700)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		return copyFile(path, target)
	})
}

func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	if err == nil {
		err = dst.Sync()
	}
	return errors.Join(err, dst.Close())
}
