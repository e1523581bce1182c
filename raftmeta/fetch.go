package raftmeta

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/tiering/record"
)

const (
	// fetchesMax bounds the entries that a group of a follower is fetching, fetchTime one of them, fetchTry an attempt at one server, fetchMost an entry's Data or payload.
	fetchesMax = 16
	fetchTime  = 10 * time.Second
	fetchTry   = 3 * time.Second
	fetchMost  = 24 << 20
)

var errDamaged = errors.New("raftmeta: an entry came damaged")

// closed is a channel that nobody waits for.
var closed = func() chan struct{} { ch := make(chan struct{}); close(ch); return ch }()

// fetch gets an entry from those who have it, once however many ask; the channel is closed when it is here, or is not to be had. Then who waits for partitions is woken.
func (m *mirror) fetch(index, term uint64) <-chan struct{} {
	m.fetchMu.Lock()
	defer m.fetchMu.Unlock()
	if ch := m.fetches[index]; ch != nil {
		return ch
	}
	if len(m.fetches) >= fetchesMax {
		return closed
	}
	ch := make(chan struct{})
	if !m.f.spawn(func() {
		ctx, cancel := context.WithTimeout(m.f.ctx, fetchTime)
		defer cancel()
		if err := m.fetchEntry(ctx, index, term); err != nil && ctx.Err() == nil {
			m.f.cfg.Logger.Warn("a hot entry cannot be fetched", "event", "replica.fetch", "component", "replica", "group", m.id, "entry", index, "err", err)
		}
		m.fetchMu.Lock()
		delete(m.fetches, index)
		m.fetchMu.Unlock()
		close(ch)
		m.watch.wakeAll()
	}) {
		return closed
	}
	m.fetches[index] = ch
	return ch
}

// fetchEntry tries the leader first. One that has freed the entry says how far it is: there the state does not refer to it any more.
func (m *mirror) fetchEntry(ctx context.Context, index, term uint64) error {
	var errs []error
	for tries := range len(m.f.servers()) + 1 {
		to := m.choose(tries)
		if to == "" {
			continue
		}
		try, cancel := context.WithTimeout(ctx, fetchTry)
		e, applied, err := m.fetchFrom(try, to, index, term)
		cancel()
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", to, err))
		case e == nil:
			return m.f.await(ctx, "the entry to be sealed", func() bool { return m.position().Index >= applied })
		default:
			m.far.put(e)
			return nil
		}
	}
	return errors.Join(errs...)
}

// fetchFrom returns nil and how far the server is if it has freed the entry.
func (m *mirror) fetchFrom(ctx context.Context, to string, index, term uint64) (e *entryBytes, applied uint64, err error) {
	e = &entryBytes{index: index, term: term, whole: true}
	if held := m.ring.get(index, term); held != nil {
		e.data = held.data
	} else if e.data, applied, err = m.fetchPart(ctx, to, peer.BytesAsked{Index: index, Term: term, Place: peer.PlaceData}); err != nil || e.data == nil {
		return nil, applied, err
	}
	h, ok := raftlog.ParseEntryHeader(e.data)
	if !ok || h.Term != term {
		return nil, 0, fmt.Errorf("%w: its header", errDamaged)
	}
	if h.Place != raftlog.PlaceInline || h.PayloadLen == 0 {
		return e, 0, nil
	}
	if e.payload, applied, err = m.fetchPart(ctx, to, peer.BytesAsked{Index: index, Term: term, Place: peer.PlacePayload}); err != nil || e.payload == nil {
		return nil, applied, err
	}
	if len(e.payload) != int(h.PayloadLen) || record.CRC(e.payload) != h.PayloadCRC {
		return nil, 0, fmt.Errorf("%w: %d bytes of payload", errDamaged, len(e.payload))
	}
	return e, 0, nil
}

// fetchPart returns nil if the entry is gone.
func (m *mirror) fetchPart(ctx context.Context, to string, a peer.BytesAsked) (out []byte, applied uint64, err error) {
	for first := true; first || len(out) < cap(out); first = false {
		a.From, a.Len = uint32(len(out)), fetchMost
		e, err := m.f.peers.Bytes(ctx, to, uint32(m.id), a)
		switch {
		case err != nil:
			return nil, 0, err
		case e.Gone:
			return nil, e.Applied, nil
		case e.Total == 0 || e.Total > fetchMost || len(e.Bytes) == 0:
			return nil, 0, fmt.Errorf("%w: %d of %d bytes at %d", errDamaged, len(e.Bytes), e.Total, a.From)
		}
		if first {
			out = make([]byte, 0, e.Total)
		}
		if len(out)+len(e.Bytes) > cap(out) {
			return nil, 0, fmt.Errorf("%w: more than %d bytes", errDamaged, cap(out))
		}
		out = append(out, e.Bytes...)
	}
	return out, 0, nil
}
