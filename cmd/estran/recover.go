package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/open"
	"github.com/estran/estran/raftmeta"
)

// recoveryMark says in the bucket that the cluster goes on from one server's log in a new epoch. Nodes of an earlier epoch neither start nor delete anything once it is there.
type recoveryMark struct {
	Cluster string `json:"cluster"`
	Epoch   uint64 `json:"epoch"`
	Server  string `json:"server"`
}

func recoveryKey(epoch uint64) string { return fmt.Sprintf("v1/meta/recovery-%06d.json", epoch) }

var errFenced = errors.New("the cluster was recovered from another voter's log")

// checkFence fails with errFenced if there is an epoch above the one given, with another error if that cannot be said now. Epochs have no gaps.
func checkFence(ctx context.Context, b objstore.Bucket, epoch uint64) error {
	m, err := readMark(ctx, b, epoch+1)
	switch {
	case errors.Is(err, objstore.ErrNotFound):
		return nil
	case err != nil:
		return err
	}
	return fmt.Errorf("%w: that of server %s, epoch %d", errFenced, m.Server, m.Epoch)
}

func readMark(ctx context.Context, b objstore.Bucket, epoch uint64) (m recoveryMark, err error) {
	rc, _, err := b.Get(ctx, recoveryKey(epoch), objstore.Whole)
	if err != nil {
		return m, err
	}
	defer rc.Close()
	data, err := io.ReadAll(io.LimitReader(rc, 1<<16))
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(data, &m)
}

// writeFence takes the first epoch above `above` that is free, or that an earlier attempt of this very server took: what another survivor took it never shares.
func writeFence(ctx context.Context, b objstore.Bucket, cluster, server string, above uint64) (uint64, error) {
	for epoch := above + 1; ; epoch++ {
		data, err := json.Marshal(recoveryMark{cluster, epoch, server})
		if err != nil {
			return 0, err
		}
		_, err = b.Put(ctx, recoveryKey(epoch), objstore.Bytes(data), objstore.PutOptions{IfAbsent: true, WriterID: strings.ToLower(server)})
		if !errors.Is(err, objstore.ErrPrecondition) {
			return epoch, err
		}
	}
}

func fencedFault(cfg *config, err error) error {
	return &fault{Code: "E_NODE_FENCED", Err: err, What: fmt.Sprintf("node %d (node.id, from %s): %v", cfg.Node.ID, cfg.from("node.id"), err),
		Fix: fmt.Sprintf("keep %s aside; with an empty directory the node can join what the cluster is now: estran cluster members add %d", cfg.Node.DataDir, cfg.Node.ID)}
}

// watchFence stops the node when the cluster was recovered from another's log.
func (n *node) watchFence() {
	t := time.NewTicker(n.cfg.fenceEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-n.life.Done():
			return
		}
		c, stop := context.WithTimeout(n.life, n.cfg.fenceEvery)
		err := checkFence(c, n.bucket, n.host.RecoveryEpoch())
		stop()
		if errors.Is(err, errFenced) {
			n.stopNow(err)
			return
		}
	}
}

func recoverCommand(s streams) *cobra.Command {
	var file, backup string
	var yes bool
	c := &cobra.Command{Use: "recover", Short: "Make this node's log the cluster's, after a majority of the voters was lost for good", Args: usage(cobra.NoArgs),
		Long: `Make a cluster of one voter from the log of this node, offline. Only for when a majority of the voters is lost for good: what they had
acknowledged and this node had not received is lost. Choose the survivor whose log ends last. The command

  - refuses while anything answers where another voter should be, and while this node runs;
  - copies the data directory first;
  - writes to the object store that the cluster goes on from here, which stops what may be left of the other voters;
  - prints where each partition ends: records that were acknowledged at or above are gone.

Then start the node. Others join with empty directories: estran cluster members add. An interrupted recovery is repeated; the node does not start before.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(file, flagsGiven(cmd))
			if err != nil {
				return err
			}
			if !yes {
				return &fault{Code: "E_CONFIRM", Exit: exitUsage, What: fmt.Sprintf("recover would make node %d the only voter, from %s; records that only the other voters have would be lost", cfg.Node.ID, cfg.Node.DataDir),
					Fix: "if a majority of the voters is lost for good: estran recover --yes, with the same configuration"}
			}
			if backup == "" {
				backup = fmt.Sprintf("%s.before-recovery-%s", strings.TrimRight(cfg.Node.DataDir, "/"), time.Now().UTC().Format("20060102T150405Z"))
			}
			return runRecover(cmd.Context(), s, cfg, backup)
		}}
	c.Flags().StringVarP(&file, "config", "c", "", "configuration file (YAML)")
	c.Flags().StringVar(&backup, "backup", "", "directory to copy the data directory to, which must not exist; default: beside it")
	c.Flags().BoolVar(&yes, "yes", false, "do it")
	c.Flags().String("data-dir", defaultConfig().Node.DataDir, "directory of the log")
	c.Flags().String("storage", "", "object store, as for serve")
	return c
}

func runRecover(ctx context.Context, s streams, cfg *config, backup string) error {
	voters, err := cfg.voters()
	if err != nil {
		return err
	}
	b, err := open.Bucket(ctx, cfg.storageURL(), objstore.Policy{}, nil)
	if err != nil {
		return storeFault(cfg, err)
	}
	defer b.Close()
	parts, err := raftmeta.Recover(ctx, raftmeta.Recovery{DataDir: cfg.Node.DataDir, NodeID: cfg.Node.ID, Backup: backup, Voters: voters,
		Progress: func(what string) { fmt.Fprintln(s.err, what) },
		Fence: func(ctx context.Context, cluster, server string, above uint64) (uint64, error) {
			epoch, err := writeFence(ctx, objstore.Prefixed(b, clusterPrefix(cluster)), cluster, server, above)
			if err != nil {
				return 0, storeFault(cfg, err)
			}
			fmt.Fprintf(s.err, "the object store says that the cluster goes on from here: recovery epoch %d\n", epoch)
			return epoch, nil
		}})
	if errors.Is(err, raftmeta.ErrPeerAnswers) {
		return &fault{Code: "E_PEER_ANSWERS", Err: err, What: err.Error(), Fix: "start this node instead; if the majority is really lost, stop what listens there"}
	}
	if _, ok := errors.AsType[*fault](err); ok {
		return err
	}
	if err != nil {
		return dataDirFault(cfg, err)
	}
	w := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "TOPIC\tPARTITION\tSTART\tSEALED\tEND: ACKNOWLEDGED RECORDS FROM HERE ON MAY BE LOST")
	for _, p := range parts {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\n", p.Topic, p.Partition, p.Start, p.Sealed, p.End)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(s.out, "\nnode %d is the only voter now; the directory as it was: %s\n", cfg.Node.ID, backup)
	return nil
}
