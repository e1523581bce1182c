package raftlog

import (
	"fmt"

	"github.com/hashicorp/raft"
)

// Matches reports, under one lock, whether (prevIndex, prevTerm) and the entries behind it are this log's own, and none of a later term than `term`. A goroutine of a
// leadership that has ended may hold a mix of two logs: it must not be sent.
func (l *Log) Matches(prevIndex, prevTerm, term uint64, entries []*raft.Log) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if prevIndex > 0 && !l.isLocked(prevIndex, prevTerm) {
		return false
	}
	for i, e := range entries {
		if e.Index != prevIndex+1+uint64(i) || e.Term > term || e.Type == stubType || e.Index <= l.base || !l.isLocked(e.Index, e.Term) {
			return false
		}
	}
	return prevTerm <= term
}

func (l *Log) isLocked(index, term uint64) bool {
	switch {
	case index == l.base:
		return term == l.baseTerm
	case index < l.base || index > l.lastLocked():
		return false
	}
	return l.ents[index-l.base-1].term == term
}

// Payload returns the Extensions of the entry, checked if they were read from disk. They must not be changed.
func (l *Log) Payload(index, term uint64) ([]byte, error) {
	e, err := l.Entry(index, term)
	if err != nil {
		return nil, err
	}
	defer e.Release()
	if e.InMemory() {
		return e.Payload, nil
	}
	b := make([]byte, e.PayloadLen)
	if err := e.ReadPayload(b, 0); err != nil {
		return nil, err
	}
	if crcOf(b) != e.payloadCRC {
		return nil, fmt.Errorf("%w: payload of entry %d in %s", ErrCorrupt, index, e.Where())
	}
	return b, nil
}

// Lengths returns length and CRC of an entry's payload, from the header in its Data: GetLog gives commands without it.
func (l *Log) Lengths(e *raft.Log) (payload int, crc uint32, err error) {
	if e.Type != raft.LogCommand {
		return len(e.Extensions), crcOf(e.Extensions), nil
	}
	h, ok := ParseEntryHeader(e.Data)
	if !ok {
		return 0, 0, fmt.Errorf("raftlog: command %d of %d bytes has no header", e.Index, len(e.Data))
	}
	if h.Place != PlaceInline {
		return 0, 0, nil
	}
	return int(h.PayloadLen), h.PayloadCRC, nil
}

// Check refuses an entry from a peer that must not be stored; payloadCRC is what its payload was found to have.
func (l *Log) Check(e *raft.Log, payloadCRC uint32) error {
	if err := checkEntry(e); err != nil {
		return err
	}
	if _, want, err := l.Lengths(e); err != nil || want != payloadCRC && len(e.Extensions) > 0 {
		return fmt.Errorf("%w: payload of command %d has CRC %08x, its header says %08x (%v)", ErrCorrupt, e.Index, payloadCRC, want, err)
	}
	return nil
}
