package raftmeta

import (
	"context"
	"fmt"
	"io"
	"time"
)

// Backup is the state of a group at an index, for keeping outside the cluster.
type Backup struct {
	Group       string // as Status names it
	Epoch       uint64
	Index, Term uint64
	Write       func(io.Writer) (int64, error)
}

const (
	backupEvery = 5 * time.Minute
	backupTime  = 2 * time.Minute
)

// backups hands the group's state to Config.OnBackup every BackupEvery, if anything was applied since, until ctx ends. It is the leader's: one copy is enough.
func (g *group) backups(ctx context.Context) {
	t := time.NewTicker(g.host.cfg.BackupEvery)
	defer t.Stop()
	last := uint64(0)
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		b := g.backup()
		if b.Index == last {
			continue
		}
		c, cancel := context.WithTimeout(ctx, backupTime)
		err := g.host.cfg.OnBackup(c, b)
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				g.log_.Warn("the state was not saved", "event", "backup.failed", "err", err)
			}
			continue
		}
		last = b.Index
		g.metrics.backups.Inc()
	}
}

// Backups are the states of all groups as they are applied here, whoever leads.
func (h *Host) Backups() (out []Backup) {
	for _, g := range h.groups() {
		out = append(out, g.backup())
	}
	return out
}

// backup takes the state as it is: pointer work; writing it is the caller's.
func (g *group) backup() Backup {
	g.mu.Lock()
	f := g.machine.freeze()
	term := uint64(g.machine.leader().Term)
	g.mu.Unlock()
	return Backup{Group: g.name(), Epoch: g.host.identity.Epoch, Index: uint64(f.Index()), Term: term, Write: func(w io.Writer) (int64, error) {
		n, err := f.WriteTo(w)
		if err != nil {
			return n, fmt.Errorf("raftmeta: state of group %d: %w", g.id, err)
		}
		return n, nil
	}}
}
