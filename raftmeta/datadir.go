package raftmeta

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Errors of opening a data directory.
var (
	// ErrLocked: another process has the directory open.
	ErrLocked = errors.New("data directory is in use by another process")
	// ErrRecovering: a recovery was begun in the directory and did not end.
	ErrRecovering = errors.New("a recovery of this data directory did not end")
	// ErrBehind: other nodes remember what the directory does not hold.
	ErrBehind = errors.New("data directory has lost writes")
	// ErrForeign: the directory holds something else, or another node.
	ErrForeign = errors.New("data directory is not this node's")
)

const (
	identityFile    = "node.json"
	identityVersion = 1
)

// identity is who the data directory belongs to. The incarnation is drawn once; the rest is added as the node finds its cluster and opens its groups.
type identity struct {
	Version     int
	ClusterID   string // "" until the cluster is known
	NodeID      int32
	Incarnation string
	// Epoch counts recoveries from a lost majority: nodes of another epoch do not speak to one another. Recovering is the epoch of a recovery that has not ended here, Recovered of
	// the last one that has.
	Epoch, Recovering, Recovered uint64 `json:",omitempty"`
	// Founders are the server IDs of the cluster's first voters: only they write a group's first configuration.
	Founders []string `json:",omitempty"`
	// Peers are where other nodes were last.
	Peers map[int32]string `json:",omitempty"`
	// Groups have been opened here: one of these that is empty has lost its votes.
	Groups []uint32 `json:",omitempty"`
	// Level is the feature level that the node has last seen in force.
	Level uint32 `json:",omitempty"`
}

func (i identity) serverID() string { return fmt.Sprintf("%d.%s", i.NodeID, i.Incarnation) }

// cluster is what peers compare: the cluster's ID and its recovery epoch; "" while there is none.
func (i identity) cluster() string {
	if i.Epoch == 0 {
		return i.ClusterID
	}
	return fmt.Sprintf("%s+%d", i.ClusterID, i.Epoch)
}

// parseCluster is the reverse of cluster.
func parseCluster(s string) (id string, epoch uint64, err error) {
	id, e, ok := strings.Cut(s, "+") // no ID has one
	if ok {
		epoch, err = strconv.ParseUint(e, 10, 64)
	}
	return id, epoch, err
}

// openDataDir locks the directory and reads or makes its identity; fresh tells which.
func openDataDir(dir string, nodeID int32, alone bool) (id identity, lock *os.File, fresh bool, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return id, nil, false, err
	}
	lock, err = os.OpenFile(filepath.Join(dir, "LOCK"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return id, nil, false, err
	}
	if err := lockFile(lock); err != nil {
		return id, nil, false, errors.Join(fmt.Errorf("%s: %w", dir, ErrLocked), lock.Close())
	}
	id, fresh, err = readIdentity(dir, nodeID, alone)
	if err != nil {
		return id, nil, false, errors.Join(err, lock.Close())
	}
	return id, lock, fresh, nil
}

func readIdentity(dir string, nodeID int32, alone bool) (id identity, fresh bool, err error) {
	path := filepath.Join(dir, identityFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return id, false, err
		}
		for _, e := range entries {
			if n := e.Name(); n != "LOCK" && n != identityFile+".tmp" && n != "objects" && n != "lost+found" {
				return id, false, fmt.Errorf("%s holds %q but no %s: %w", dir, n, identityFile, ErrForeign)
			}
		}
		id = identity{Version: identityVersion, NodeID: nodeID, Incarnation: hex.EncodeToString(random(8))}
		if alone {
			id.ClusterID, id.Founders = base64.RawURLEncoding.EncodeToString(random(16)), []string{id.serverID()}
		}
		return id, true, writeIdentity(path, id)
	}
	if err != nil {
		return id, false, err
	}
	if err := json.Unmarshal(b, &id); err != nil {
		return id, false, fmt.Errorf("%s: %w", path, err)
	}
	if id.Version != identityVersion {
		return id, false, fmt.Errorf("%s is of version %d, this program knows %d: %w", path, id.Version, identityVersion, ErrForeign)
	}
	if id.NodeID != nodeID {
		return id, false, fmt.Errorf("%s belongs to node %d, this is node %d: %w", dir, id.NodeID, nodeID, ErrForeign)
	}
	if len(id.Founders) == 0 && id.ClusterID != "" { // written before founders were
		id.Founders = []string{id.serverID()}
	}
	return id, false, nil
}

// ClusterOf is the cluster and recovery epoch that a data directory belongs to, "" if none. It changes nothing and reports no errors: Open does.
func ClusterOf(dir string) (clusterID string, epoch uint64) {
	b, err := os.ReadFile(filepath.Join(dir, identityFile))
	var id identity
	if err != nil || json.Unmarshal(b, &id) != nil {
		return "", 0
	}
	return id.ClusterID, id.Epoch
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

func writeIdentity(path string, id identity) error {
	b, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
