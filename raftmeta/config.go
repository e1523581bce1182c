// Package raftmeta hosts the Raft groups of a node: meta and the shards. It proposes, applies and snapshots; it owns the batcher that turns
// produce requests into entries and the views through which the broker and tiering see the state. Only it and raftlog know hashicorp/raft.
//
// The invariant: a success is reported only by Apply of a committed entry.
package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
)

// Config describes a node.
type Config struct {
	NodeID  int32
	DataDir string
	// Host and Port are what clients are told to connect to; Rack is their client.rack.
	Host string
	Port int32
	Rack string
	// Shards is the number of shards of a new cluster; later meta knows.
	Shards uint32
	// HotMaxBytes bounds log bytes that may not be freed yet, of all groups, as written.
	HotMaxBytes int64
	// LocalRetentionBytes of what may be freed are kept as a cache, of all groups.
	LocalRetentionBytes int64
	// OffsetsRetention: offsets of a group that has been empty for longer are dropped; 0 = never.
	OffsetsRetention time.Duration
	// Voters are the nodes of the quorum, this one among them; none or one = this node alone. A new cluster is made of exactly these.
	Voters []Voter
	// Secret or TLS authenticates voters to one another. Without either the peer listener must be on loopback.
	Secret []byte
	TLS    *peer.TLS
	// PeerAdvertise is where other nodes reach this one, if Voters does not say; "" = where PeerListener listens.
	PeerAdvertise string
	// PeerListener takes connections of other nodes; nil = none. Close closes it.
	PeerListener net.Listener

	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// OnLead runs while this node leads a shard, from the application of its LeaderStart until ctx ends; it must return then.
	OnLead func(ctx context.Context, shard record.ShardID)
	// OnFatal is told when the node must stop: a failed write, a disk that hangs.
	OnFatal func(error)
	// OnBackup keeps the state of a group that this node leads outside the cluster; it is called every BackupEvery (5 min) with something new. nil = nobody does.
	OnBackup    func(ctx context.Context, b Backup) error
	BackupEvery time.Duration
	// StoreTime returns the object store's time; ok is false if it does not tell.
	StoreTime func() (t time.Time, ok bool)

	// FeatureLevel is the newest feature level that this node takes part in; 0 = all that this program knows. For tests, of an older program.
	FeatureLevel uint32

	// For tests: the file system, the size of log files and of the memory tail, the clock, and how other nodes are reached; nil = TCP.
	FS        raftlog.FS
	FileBytes int64
	TailBytes int64
	Now       func() time.Time
	Dial      func(ctx context.Context, addr string) (net.Conn, error)
	// Slower makes heartbeats, and all that is done again and again or waits for these, take so many times as long; 0 = 1. It is for a simulation of days, whose processor pays for each.
	Slower int
}

// Voter is a node of the quorum and where its peers reach it.
type Voter struct {
	ID   int32
	Addr string
}

const (
	// raftTimeout is the election timeout and a leader's lease (peer's contact). A follower answers nothing while it writes: it lies above the stalls of a busy disk.
	raftTimeout    = 500 * time.Millisecond
	commitTimeout  = 50 * time.Millisecond
	proposeTimeout = 30 * time.Second
	proposeLook    = 500 * time.Millisecond // how often it is asked what has become of a proposal
	// entryTarget is how large an entry grows while the one before it is being committed; entryBacklog if batches wait. EntryMax bounds a batch.
	entryTarget  = 1 << 20
	entryBacklog = 4 << 20
	// EntryMax is the largest batch that can be appended, in bytes.
	EntryMax = 8 << 20
	// controlReserve is what groups' commands may use beyond the budget.
	groupReserve = 64 << 20
)

// slow is d, or for a simulation longer.
func (c *Config) slow(d time.Duration) time.Duration { return d * time.Duration(c.Slower) }

func (c *Config) validate() error {
	var errs []error
	if c.NodeID < 1 {
		errs = append(errs, fmt.Errorf("raftmeta: node ID %d", c.NodeID))
	}
	if c.Shards < 1 {
		errs = append(errs, fmt.Errorf("raftmeta: %d shards", c.Shards))
	}
	seen := map[int32]bool{}
	for _, v := range c.Voters {
		if v.ID < 1 || seen[v.ID] {
			errs = append(errs, fmt.Errorf("raftmeta: voter ID %d is not positive or there twice", v.ID))
		}
		seen[v.ID] = true
	}
	if len(c.Voters) > 0 && !seen[c.NodeID] {
		errs = append(errs, fmt.Errorf("raftmeta: node %d is not among the voters", c.NodeID))
	}
	if c.HotMaxBytes < 1<<20 {
		errs = append(errs, fmt.Errorf("raftmeta: hot budget of %d bytes", c.HotMaxBytes))
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Registerer == nil {
		c.Registerer = prometheus.NewRegistry()
	}
	if c.OnLead == nil {
		c.OnLead = func(context.Context, record.ShardID) {}
	}
	if c.OnFatal == nil {
		c.OnFatal = func(error) {}
	}
	if c.BackupEvery == 0 {
		c.BackupEvery = backupEvery
	}
	if c.StoreTime == nil {
		c.StoreTime = func() (time.Time, bool) { return time.Time{}, false }
	}
	if c.FS == nil {
		c.FS = raftlog.OS{}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	c.Slower = max(c.Slower, 1)
	if c.FeatureLevel == 0 {
		c.FeatureLevel = state.LevelNewest
	}
	return errors.Join(errs...)
}
