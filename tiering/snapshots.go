package tiering

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/estran/estran/objstore"
	"github.com/klauspost/compress/zstd"
)

// snapshotsKept is how many snapshots of a group stay in the bucket.
const snapshotsKept = 3

// ErrNoSnapshot: the bucket has no snapshot of the group that can be read.
var ErrNoSnapshot = errors.New("tiering: no snapshot")

// Snapshot names the state of a Raft group at an index. Snapshots in the bucket are what a cluster is made from again when no voter is left; voters never read them.
type Snapshot struct {
	Group string // meta, shard-1, …
	Epoch uint64 // of recovery: a later one begins where the survivor's log ended
	Index uint64
	Term  uint64
}

func snapshotPrefix(group string) string { return "v1/meta/snapshots/" + group + "/" }

func (s *Snapshot) key() string {
	return fmt.Sprintf("%s%06d-%020d-%020d.zst", snapshotPrefix(s.Group), s.Epoch, s.Index, s.Term)
}

func parseSnapshot(group, key string) (s Snapshot, ok bool) {
	s.Group = group
	n, err := fmt.Sscanf(strings.TrimPrefix(key, snapshotPrefix(group)), "%06d-%020d-%020d.zst", &s.Epoch, &s.Index, &s.Term)
	return s, err == nil && n == 3 && s.key() == key
}

// Snapshots keeps states of groups in a bucket, compressed; the compression's checksum finds damage.
type Snapshots struct {
	Bucket objstore.Bucket
	// Dir is where a snapshot is put together before it is uploaded.
	Dir string
	// MayDelete is asked before old ones are deleted; nil = always.
	MayDelete func(ctx context.Context) error
}

// Save uploads what write writes, and deletes all but the newest snapshots of the group.
func (b *Snapshots) Save(ctx context.Context, s Snapshot, write func(io.Writer) (int64, error)) error {
	f, err := os.CreateTemp(b.Dir, "snapshot-*.tmp")
	if err != nil {
		return err
	}
	defer func() { _, _ = f.Close(), os.Remove(f.Name()) }()
	z, err := zstd.NewWriter(f, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	if err != nil {
		return err
	}
	if _, err := write(z); err != nil {
		return errors.Join(err, z.Close())
	}
	if err := z.Close(); err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	if _, err := b.Bucket.Put(ctx, s.key(), objstore.Body{R: f, Size: size}, objstore.PutOptions{IfAbsent: true, WriterID: "snapshot"}); err != nil {
		return fmt.Errorf("tiering: snapshot %s: %w", s.key(), err)
	}
	return b.reap(ctx, s.Group)
}

func (b *Snapshots) list(ctx context.Context, group string) (keys []string, err error) {
	for info, err := range b.Bucket.List(ctx, snapshotPrefix(group), "") {
		if err != nil {
			return nil, err
		}
		if _, ok := parseSnapshot(group, info.Key); ok {
			keys = append(keys, info.Key)
		}
	}
	return keys, nil // in order: the newest last
}

func (b *Snapshots) reap(ctx context.Context, group string) error {
	keys, err := b.list(ctx, group)
	if err != nil || len(keys) <= snapshotsKept {
		return err
	}
	if b.MayDelete != nil {
		if err := b.MayDelete(ctx); err != nil {
			return err
		}
	}
	return b.Bucket.Delete(ctx, keys[:len(keys)-snapshotsKept]...)
}

// Newest gives read the newest snapshot of a group that is whole: read must fail on one that is not. ErrNoSnapshot joins what was wrong with those that were tried.
func (b *Snapshots) Newest(ctx context.Context, group string, read func(io.Reader) error) (Snapshot, error) {
	keys, err := b.list(ctx, group)
	if err != nil {
		return Snapshot{}, err
	}
	errs := []error{fmt.Errorf("%w of %s in the bucket", ErrNoSnapshot, group)}
	for i := len(keys) - 1; i >= 0; i-- {
		err := b.read(ctx, keys[i], read)
		if err == nil {
			s, _ := parseSnapshot(group, keys[i])
			return s, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", keys[i], err))
	}
	return Snapshot{}, errors.Join(errs...)
}

func (b *Snapshots) read(ctx context.Context, key string, read func(io.Reader) error) error {
	rc, _, err := b.Bucket.Get(ctx, key, objstore.Whole)
	if err != nil {
		return err
	}
	defer rc.Close()
	z, err := zstd.NewReader(rc, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(1<<20))
	if err != nil {
		return err
	}
	defer z.Close()
	if err := read(z); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, z) // to the end, where the checksum is
	return err
}
