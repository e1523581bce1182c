package sim

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/estran/estran/broker"
	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
)

// node is a voter: what cmd/estran makes of a directory, without the listeners for clients.
type node struct {
	w    *world
	id   int32
	addr string
	dir  string
	skew atomic.Int64 // how far its clock is wrong

	mu     sync.Mutex // held while it starts or stops
	live   atomic.Pointer[life]
	cancel context.CancelFunc
	opened chan struct{} // closed when the opening of the latest life is over; nil = it does not run
}

// life is a node between a start and a stop.
type life struct {
	*raftmeta.Host
	tier   *tiering.Tiering
	reader *tiering.Reader
	server *broker.Server // if the world has clients of Kafka

	mu    sync.Mutex // guards ended, and adding to reads
	ended bool
	reads sync.WaitGroup // clients in reader: it is closed when there are none, as a broker's connections end before
}

// errEnded: the node has stopped.
var errEnded = errors.New("the node has stopped")

func (l *life) read(ctx context.Context, tp record.TopicPartition, from record.Offset, lim tiering.Limits) (tiering.Result, error) {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return tiering.Result{}, errEnded
	}
	l.reads.Add(1)
	l.mu.Unlock()
	defer l.reads.Done()
	return l.reader.Read(ctx, tp, from, lim)
}

func (l *life) closeReader() {
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	l.reads.Wait()
	l.reader.Close()
}

// now is a wall clock that was set wrong. Package time makes no such Time, and in a bubble none with a monotonic reading, which goes on as ever: what counts there is put together here.
func (n *node) now() (t time.Time) {
	const year1885 = -2682288000 // where a Time with a monotonic reading counts seconds from
	right := time.Now()
	wrong := right.Add(time.Duration(n.skew.Load()))
	*(*struct {
		wall uint64
		ext  int64
		loc  *time.Location
	})(unsafe.Pointer(&t)) = struct {
		wall uint64
		ext  int64
		loc  *time.Location
	}{1<<63 | uint64(wrong.Unix()-year1885)<<30 | uint64(wrong.Nanosecond()), right.UnixNano() - birth, time.Local}
	return t
}

// birth is the beginning of a bubble's time.
const birth = 946684800e9

// start begins to open the node and does not wait: without a majority that takes as long as there is none.
func (n *node) start() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.opened != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel, n.opened = cancel, make(chan struct{})
	go n.open(ctx, n.opened)
}

func (n *node) open(ctx context.Context, opened chan struct{}) {
	defer close(opened)
	w, l, ready := n.w, &life{}, make(chan struct{})
	cfg := w.o.Raft
	cfg.NodeID, cfg.DataDir, cfg.Voters, cfg.Now = n.id, n.dir, w.voters, n.now
	cfg.Host, cfg.Port = fmt.Sprint("kafka-", n.id), 9092
	cfg.FS, cfg.PeerListener, cfg.Dial = disk{}, w.net.listen(n.addr), w.net.dialer(n.addr)
	cfg.Logger = w.logger.With("node", n.id)
	cfg.OnFatal = func(err error) { w.failf("node %d: fatal: %v", n.id, err) }
	states := tiering.Snapshots{Bucket: w.store, Dir: filepath.Join(n.dir, "stage")}
	cfg.OnBackup = func(ctx context.Context, b raftmeta.Backup) error {
		return states.Save(ctx, tiering.Snapshot{Group: b.Group, Epoch: b.Epoch, Index: b.Index, Term: b.Term}, b.Write)
	}
	cfg.OnLead = func(ctx context.Context, s record.ShardID) {
		select {
		case <-ready:
			var wg sync.WaitGroup
			defer wg.Wait()
			if l.server != nil {
				wg.Go(func() { l.server.Lead(ctx, uint32(s)) })
			}
			l.tier.Lead(ctx, s)
		case <-ctx.Done():
		}
	}
	h, err := raftmeta.Open(ctx, cfg)
	if err != nil {
		if ctx.Err() == nil {
			w.failf("node %d does not open: %v", n.id, err)
		}
		return
	}
	tc := w.o.Tiering
	tc.Logger = cfg.Logger
	l.Host = h
	l.tier = tiering.New(tc, h, w.store)
	l.reader = tiering.NewReader(l.tier, h)
	if w.kafka != nil {
		w.serve(n, l)
	}
	close(ready)
	n.live.Store(l)
}

func (n *node) stop() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.opened == nil {
		return
	}
	n.cancel()
	<-n.opened
	n.opened = nil
	l := n.live.Swap(nil)
	if l == nil {
		return
	}
	if l.server != nil {
		_ = l.server.Close()
	}
	if err := l.Close(context.Background()); err != nil {
		n.w.failf("node %d does not close: %v", n.id, err)
	}
	l.closeReader()
}

// The clock that a simulation gives a node is wrong by what it should be, and right about how much time passes.
func TestWrongClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &node{}
		before := n.now()
		if !before.Round(0).Equal(time.Now()) {
			t.Errorf("%s, not %s", before, time.Now())
		}
		n.skew.Store(int64(-50 * time.Hour))
		time.Sleep(time.Hour + 5*time.Nanosecond)
		after := n.now()
		if d := after.Round(0).Sub(before.Round(0)); d != -49*time.Hour+5*time.Nanosecond {
			t.Errorf("the wall clock moved by %s", d)
		}
		if d := after.Sub(before); d != time.Hour+5*time.Nanosecond {
			t.Errorf("%s passed", d)
		}
	})
}

// disk is the operating system's, which is not asked to make anything durable: nothing here loses power.
type disk struct{ raftlog.OS }

type file struct{ raftlog.File }

func unsynced(f raftlog.File, err error) (raftlog.File, error) {
	if err != nil {
		return nil, err
	}
	return file{f}, nil
}

func (d disk) Create(name string) (raftlog.File, error) { return unsynced(d.OS.Create(name)) }
func (d disk) Open(name string) (raftlog.File, error)   { return unsynced(d.OS.Open(name)) }
func (disk) SyncDir(string) error                       { return nil }
func (file) Sync() error                                { return nil }
func (file) Pace(int64) error                           { return nil }
