package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Sink takes a group's feed, in order. An error of its methods ends the feed.
type Sink interface {
	// State replaces the sink's state by another, which is read from r to its end.
	State(at Position, r io.Reader) error
	// Entry takes the next entry. Its bytes are the sink's.
	Entry(e FeedEntry) error
	// Idle says that the sender is at a position and has nothing more.
	Idle(at Position) error
}

// ErrResync: what a feed said does not continue what its follower has.
var ErrResync = errors.New("peer: the feed does not continue the state")

// Follow gives the feed of a server's group to sink, from a position on (the zero one has nothing), with payload or headers only. It returns an error, when ctx ends too.
func (p *Peers) Follow(ctx context.Context, target string, group uint32, from Position, payload bool, sink Sink) error {
	c, err := p.dial(target)
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	if err := p.introduce(c, target, classFeed); err != nil {
		return errors.Join(ctx.Err(), err)
	}
	f := &feed{p: p, c: c, group: group, payload: payload, a: newAssembler(c, readBuffer, p.times.body), silence: time.AfterFunc(p.times.dead, func() { _ = c.Close() })}
	defer f.silence.Stop()
	if err := f.ask(from); err != nil {
		return errors.Join(ctx.Err(), err)
	}
	for {
		if err := f.give(sink); err != nil {
			return errors.Join(ctx.Err(), err)
		}
	}
}

// feed is a follower's end of one.
type feed struct {
	p       *Peers
	c       net.Conn
	a       *assembler
	group   uint32
	payload bool
	state   bool // the first part is one of a state
	silence *time.Timer
}

// message returns the next message; a sender that says nothing is given up.
func (f *feed) message() (*message, error) {
	f.silence.Reset(f.p.times.dead)
	defer f.silence.Stop()
	return f.a.next()
}

func (f *feed) ask(from Position) error {
	c := &call{kind: kindFollow, group: f.group, id: 1, meta: encodeFollow(from, f.payload)}
	if err := f.p.flush(f.c, nil, c.cut()); err != nil {
		return err
	}
	m, err := f.message()
	if err != nil {
		return err
	}
	if m.kind != kindFollow || m.flags != flagAnswer || m.group != f.group {
		return fmt.Errorf("%w: %s of group %d answers a follow of group %d", ErrFrame, m.kind, m.group, f.group)
	}
	b, err := m.answer()
	if err != nil {
		return err
	}
	if len(b) != 1 || b[0] > followState {
		return fmt.Errorf("%w: answer of %d bytes to a follow", ErrFrame, len(b))
	}
	f.state = b[0] == followState
	return nil
}

// next returns the next part.
func (f *feed) next() (any, error) {
	m, err := f.message()
	if err != nil {
		return nil, err
	}
	if m.kind != kindPart || m.flags != 0 || m.group != f.group {
		return nil, fmt.Errorf("%w: %s of group %d in the feed of group %d", ErrFrame, m.kind, m.group, f.group)
	}
	return decodePart(m)
}

// give hands the next part to the sink.
func (f *feed) give(sink Sink) error {
	x, err := f.next()
	if err != nil {
		return err
	}
	first := f.state
	f.state = false
	switch x := x.(type) {
	case statePiece:
		if !first {
			return fmt.Errorf("%w: a state behind the beginning", ErrFrame)
		}
		r := &stateReader{next: f.next, of: x.of}
		if err := r.take(x); err != nil {
			return err
		}
		if err := sink.State(x.of, r); err != nil {
			return err
		}
		return r.drain()
	case FeedEntry:
		if first {
			break
		}
		return sink.Entry(x)
	case Position:
		if first {
			break
		}
		return sink.Idle(x)
	}
	return fmt.Errorf("%w: no state, which was announced", ErrFrame)
}

// Reached asks a server how far a group is.
func (p *Peers) Reached(ctx context.Context, target string, group uint32) (Reach, error) {
	b, err := p.question(ctx, target, &call{kind: kindReach, group: group})
	if err != nil {
		return Reach{}, err
	}
	return decodeReach(b)
}

// Bytes asks a server for bytes of a group's entry. It gives at most as many as are asked for, and no more than a frame's.
func (p *Peers) Bytes(ctx context.Context, target string, group uint32, a BytesAsked) (EntryBytes, error) {
	b, err := p.question(ctx, target, &call{kind: kindBytes, group: group, meta: encodeBytesAsked(a)})
	if err != nil {
		return EntryBytes{}, err
	}
	e, err := decodeBytes(b)
	if err == nil && len(e.Bytes) > int(a.Len) {
		err = fmt.Errorf("%w: %d bytes, %d were asked for", ErrFrame, len(e.Bytes), a.Len)
	}
	return e, err
}

// question asks a server something as a follower.
func (p *Peers) question(ctx context.Context, target string, c *call) ([]byte, error) {
	limit := p.times.call
	if d, ok := ctx.Deadline(); ok {
		limit = max(min(limit, time.Until(d)), time.Millisecond)
	}
	return p.link(target, classQuery).askUntil(c, limit, ctx.Done())
}
