package raftlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"
)

// errNotFound has the text that raft compares with.
var errNotFound = errors.New("not found")

// The keys that raft keeps.
const (
	keyCurrentTerm  = "CurrentTerm"
	keyLastVoteTerm = "LastVoteTerm"
	keyLastVoteCand = "LastVoteCand"
)

// Stable is raft.StableStore in one small file. The term and the candidate of a vote are one record: raft sets LastVoteTerm first,
// which is held until LastVoteCand comes, since a crash between the two would grant a vote to a stale log.
type Stable struct {
	mu       sync.Mutex
	file     *abFile
	term     uint64
	voteTerm uint64
	voteCand []byte
	pending  uint64
	fatal    func(error)
	broken   error
}

var _ raft.StableStore = (*Stable)(nil)

// ErrStable: a term or a vote could not be made durable. raft cannot go on, and can only end with the process.
var ErrStable = errors.New("raftlog: stable store")

// ForRaft is the store as raft should use it: raft panics on a failed write, so that one never returns from there. The owner has been told by `fatal` and ends the process.
func (s *Stable) ForRaft() raft.StableStore { return forRaft{s} }

type forRaft struct{ *Stable }

func (s forRaft) Set(key, val []byte) error { return orNever(s.Stable.Set(key, val)) }

func (s forRaft) SetUint64(key []byte, val uint64) error {
	return orNever(s.Stable.SetUint64(key, val))
}

func orNever(err error) error {
	if errors.Is(err, ErrStable) {
		select {}
	}
	return err
}

// OpenStable opens or creates the store in dir. fatal is called once when a write fails: the node must stop.
func OpenStable(fs FS, dir string, fatal func(error)) (*Stable, error) {
	f, err := openAB(fs, dir, "stable")
	if err != nil {
		return nil, err
	}
	s := &Stable{file: f, fatal: fatal}
	if v := f.get(); v != nil {
		be := binary.BigEndian
		if len(v) < 20 || len(v) != 20+int(be.Uint32(v[16:])) {
			return nil, errors.Join(fmt.Errorf("%w: stable store of %d bytes", ErrCorrupt, len(v)), f.close())
		}
		s.term, s.voteTerm, s.voteCand = be.Uint64(v), be.Uint64(v[8:]), v[20:]
	}
	return s, nil
}

// Empty reports that no term was ever stored: the store is new.
func (s *Stable) Empty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.term == 0
}

func (s *Stable) save() error {
	if s.broken != nil {
		return s.broken
	}
	be := binary.BigEndian
	v := be.AppendUint64(nil, s.term)
	v = be.AppendUint64(v, s.voteTerm)
	v = be.AppendUint32(v, uint32(len(s.voteCand)))
	if err := s.file.set(append(v, s.voteCand...)); err != nil {
		s.broken = fmt.Errorf("%w: %w: %w", ErrStable, ErrPoisoned, err)
		if s.fatal != nil {
			go s.fatal(s.broken)
		}
	}
	return s.broken
}

// Set implements raft.StableStore.
func (s *Stable) Set(key, val []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if string(key) != keyLastVoteCand {
		return fmt.Errorf("raftlog: unknown stable key %q", key)
	}
	s.voteTerm, s.voteCand = s.pending, append([]byte(nil), val...)
	return s.save()
}

// Get implements raft.StableStore.
func (s *Stable) Get(key []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if string(key) != keyLastVoteCand || s.voteTerm == 0 {
		return nil, errNotFound
	}
	return append([]byte(nil), s.voteCand...), nil
}

// SetUint64 implements raft.StableStore.
func (s *Stable) SetUint64(key []byte, val uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch string(key) {
	case keyCurrentTerm:
		s.term = val
		return s.save()
	case keyLastVoteTerm:
		s.pending = val
		return nil
	}
	return fmt.Errorf("raftlog: unknown stable key %q", key)
}

// GetUint64 implements raft.StableStore.
func (s *Stable) GetUint64(key []byte) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case string(key) == keyCurrentTerm && s.term > 0:
		return s.term, nil
	case string(key) == keyLastVoteTerm && s.voteTerm > 0:
		return s.voteTerm, nil
	}
	return 0, errNotFound
}

// Term is the current term; 0 if there was none yet.
func (s *Stable) Term() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.term
}

// Close closes the file.
func (s *Stable) Close() error { return s.file.close() }
