package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/raftlog"
)

// storageURL is where objects go: by default a directory below the data directory.
func (c *config) storageURL() string {
	if c.Storage.URL != "" {
		return c.Storage.URL
	}
	return "file://" + filepath.ToSlash(filepath.Join(c.Node.DataDir, "objects"))
}

// storeFault explains what is wrong with the object store: one verdict and what to do.
func storeFault(cfg *config, err error) error {
	url := objstore.Redact(cfg.storageURL())
	f := &fault{Code: "E_STORE", Err: err, What: fmt.Sprintf("object store %s (from %s): %v", url, cfg.from("storage.url"), err), Fix: "estran doctor"}
	say := func(code, verdict, fix string) error {
		f.Code, f.Fix = code, fix
		f.What = fmt.Sprintf("object store %s (from %s): %s", url, cfg.from("storage.url"), verdict)
		f.Notes = append(f.Notes, note{"seen", err.Error()})
		return f
	}
	switch {
	case errors.Is(err, objstore.ErrBucketNotFound):
		return say("E_S3_NO_BUCKET", "no such bucket", "estran doctor --create-bucket, or name another in storage.url")
	case errors.Is(err, objstore.ErrRegion):
		return say("E_S3_REGION", "wrong region", "name the bucket's region: ?region=… in storage.url")
	case errors.Is(err, objstore.ErrExpiredCredentials):
		return say("E_S3_CREDENTIALS", "credentials are unknown or have expired", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
	case errors.Is(err, objstore.ErrAccess):
		return say("E_S3_ACCESS", "access denied", "allow get, put, list and delete below the prefix; check the secret key and this machine's clock")
	case errors.Is(err, objstore.ErrUnavailable), errors.Is(err, objstore.ErrTimeout):
		return say("E_STORE_UNREACHABLE", "cannot be reached", "check endpoint, DNS, TLS and that the store runs")
	case errors.Is(err, objstore.ErrUnsupported):
		return say("E_STORE_UNSUPPORTED", "lacks what is needed", "use a store with conditional PUT (If-None-Match) and ranged GET")
	case errors.Is(err, errBucketForeign):
		return say("E_STORE_FOREIGN", "belongs to another cluster or a newer version", "use another bucket or prefix; a node that joins a cluster needs the cluster's own storage.url")
	}
	return f
}

// quorumFault explains why a node found no place among the voters; other errors are about its data directory.
func quorumFault(cfg *config, err error) error {
	f := &fault{Err: err, What: fmt.Sprintf("quorum.voters (from %s): %s", cfg.from("quorum.voters"), oneLine(err))}
	switch {
	case errors.Is(err, peer.ErrOpen):
		f.Code, f.Fix = "E_PEER_OPEN", "set quorum.secret_file or quorum.tls, or listen on loopback with listeners.peer.listen"
		f.What = fmt.Sprintf("listeners.peer.listen (from %s): anybody who reaches %s could speak for a voter", cfg.from("listeners.peer.listen"), cfg.Listeners.Peer.Listen)
	case errors.Is(err, peer.ErrStranger):
		f.Code, f.Fix = "E_PEER_STRANGER", "give every voter the same quorum.secret_file, or certificates of one CA that name node-ID, and check the addresses"
	case errors.Is(err, peer.ErrCertificate):
		f.Code, f.Fix = "E_PEER_CERTIFICATE", fmt.Sprintf("the certificate must name node-%d as a DNS name; quorum.tls.cert_file, key_file and ca_file are PEM", cfg.Node.ID)
		f.What = fmt.Sprintf("quorum.tls (from %s): %s", cfg.from("quorum.tls.cert_file"), oneLine(err))
	case errors.Is(err, raftmeta.ErrTimeout), errors.Is(err, context.Canceled):
		f.Code, f.Fix = "E_QUORUM_WAIT", "start the other voters; check their addresses"
	case errors.Is(err, raftmeta.ErrRemoved):
		return removedFault(cfg, err)
	default:
		return dataDirFault(cfg, err)
	}
	return f
}

// removedFault tells a node's end by its removal from the members.
func removedFault(cfg *config, err error) error {
	return &fault{Code: "E_NODE_REMOVED", Err: err, What: fmt.Sprintf("node %d (node.id, from %s) was removed from the cluster", cfg.Node.ID, cfg.from("node.id")),
		Fix: fmt.Sprintf("nothing, if it should go. To have it back: empty %s, start it, estran cluster members add %d", cfg.Node.DataDir, cfg.Node.ID)}
}

// dataDirFault explains what is wrong with the data directory.
func dataDirFault(cfg *config, err error) error {
	f := &fault{Code: "E_DATA_DIR", Err: err, What: fmt.Sprintf("data directory %s (node.data_dir, from %s): %v", cfg.Node.DataDir, cfg.from("node.data_dir"), err),
		Fix: "--data-dir DIR   or set node.data_dir"}
	switch {
	case errors.Is(err, raftmeta.ErrLocked):
		f.Code, f.Fix = "E_DATA_DIR_LOCKED", "stop the other process, or give this one a directory of its own with --data-dir"
	case errors.Is(err, raftmeta.ErrLevel):
		f.Code, f.Fix = "E_FEATURE_LEVEL", "start the newer program that the other nodes run; a feature level never falls"
	case errors.Is(err, raftmeta.ErrRecovering):
		f.Code, f.Fix = "E_RECOVERING", "run estran recover again: it goes on where it stopped"
	case errors.Is(err, raftmeta.ErrBehind):
		f.Code, f.Fix = "E_DATA_DIR_BEHIND", fmt.Sprintf("is it an old copy? Put the last one back. Else empty %s and start the node again: it comes as a new voter, and gets all from the others", cfg.Node.DataDir)
	case errors.Is(err, raftmeta.ErrForeign):
		f.Code, f.Fix = "E_DATA_DIR_FOREIGN", "give the node an empty directory with --data-dir; nothing was changed in this one"
	case errors.Is(err, fs.ErrPermission):
		f.Code, f.Fix = "E_DATA_DIR_PERMISSION", "make it writable for this user, or give another with --data-dir"
	case errors.Is(err, raftlog.ErrVersion):
		f.Code, f.Fix = "E_DATA_DIR_VERSION", "start the newer version that wrote it"
	case errors.Is(err, raftlog.ErrRead) && !errors.Is(err, raftlog.ErrCorrupt):
		f.Code, f.Fix = diskRead(cfg)
	case errors.Is(err, raftlog.ErrCorrupt):
		f.Code, f.Fix = "E_DATA_DIR_CORRUPT", fmt.Sprintf("with other voters: empty %s and start the node again, it comes as a new voter and gets all from them. A node that is alone needs its disk restored: a damaged log is never cut by itself", cfg.Node.DataDir)
	}
	return f
}

// diskFault explains a node's end by its disk; any other error stays what it is.
func diskFault(cfg *config, err error) error {
	f := &fault{Err: err, What: fmt.Sprintf("data directory %s (node.data_dir, from %s): %s", cfg.Node.DataDir, cfg.from("node.data_dir"), oneLine(err))}
	switch {
	case errors.Is(err, raftmeta.ErrRemoved):
		return removedFault(cfg, err)
	case errors.Is(err, raftmeta.ErrBehind), errors.Is(err, raftmeta.ErrLevel):
		return dataDirFault(cfg, err)
	case errors.Is(err, errFenced):
		return fencedFault(cfg, err)
	case errors.Is(err, raftlog.ErrCorrupt):
		return dataDirFault(cfg, err)
	case errors.Is(err, raftlog.ErrRead):
		f.Code, f.Fix = diskRead(cfg)
	case errors.Is(err, raftlog.ErrHung):
		f.Code, f.Fix = "E_DISK_HUNG", "see what holds the disk up; start the node again when it answers: what was acknowledged is there"
	case errors.Is(err, raftlog.ErrPoisoned), errors.Is(err, syscall.EIO), errors.Is(err, syscall.EROFS), errors.Is(err, syscall.ENOSPC): // the log, or a snapshot
		f.Code, f.Fix = "E_DISK_WRITE", "see the kernel's log about the disk, then start the node again: what was acknowledged is there"
	default:
		return err
	}
	return f
}

func diskRead(cfg *config) (code, fix string) {
	return "E_DISK_READ", fmt.Sprintf("see the kernel's log about the disk and start the node again when it can be read. If it stays unreadable and there are other voters: replace the disk, %s empty, and start the node: it comes as a new voter and gets all from them", cfg.Node.DataDir)
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// errBucketForeign: the bucket's mark names another cluster or version.
var errBucketForeign = errors.New("the bucket is marked for another cluster or version")

// bucketMark is v1/meta/format.json: whose the objects are.
type bucketMark struct {
	Version int    `json:"version"`
	Cluster string `json:"cluster"`
}

const bucketVersion = 1

// checkBucket reads the mark, or writes it if this node is a founder: one that came later must find it, or it looks at another store than the others do. A store that cannot be
// reached now is checked when sealing begins to work.
func checkBucket(ctx context.Context, b objstore.Bucket, cluster string, founder bool) error {
	const key = "v1/meta/format.json"
	rc, _, err := b.Get(ctx, key, objstore.Whole)
	switch {
	case errors.Is(err, objstore.ErrNotFound) && !founder:
		return fmt.Errorf("%w: it has no %s of cluster %s, which this node has joined", errBucketForeign, key, cluster)
	case errors.Is(err, objstore.ErrNotFound):
		data, err := json.Marshal(bucketMark{bucketVersion, cluster})
		if err != nil {
			return err
		}
		_, err = b.Put(ctx, key, objstore.Bytes(data), objstore.PutOptions{IfAbsent: true, WriterID: strings.ToLower(cluster)})
		return err
	case err != nil && retriable(err):
		return nil
	case err != nil:
		return err
	}
	defer rc.Close()
	data, err := io.ReadAll(io.LimitReader(rc, 1<<16))
	if err != nil {
		return err
	}
	var m bucketMark
	if err := json.Unmarshal(data, &m); err != nil || m.Version != bucketVersion || m.Cluster != cluster {
		return fmt.Errorf("%w: %s", errBucketForeign, data)
	}
	return nil
}
