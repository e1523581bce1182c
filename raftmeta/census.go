package raftmeta

import (
	"math"
	"slices"
	"time"
)

const (
	// reportLife is how long a voter counts by what it said last of itself: about three times the stall of a disk that costs no leadership.
	reportLife = time.Second
	// censusLife is how long a census is used: batches come faster than voters change or fill up.
	censusLife = 20 * time.Millisecond
)

// census is what a group's leader knows of the other voters.
type census struct {
	at time.Time
	// voters is their number, this node among them; names are the others' server IDs.
	voters int
	names  []string
	// free is what the fullest of those voters has left that a majority needs beside this node. Voters that say nothing are not waited for.
	free int64
}

// others returns a census that is at most censusLife old.
func (g *group) others() *census {
	if c := g.census.Load(); c != nil && time.Since(c.at) < censusLife {
		return c
	}
	all := g.voters()
	c := &census{at: time.Now(), voters: len(all), names: slices.DeleteFunc(all, func(s string) bool { return s == g.self })}
	var free []int64
	for _, s := range c.names {
		if r, ok := g.host.peers.Report(s, g.host.cfg.slow(reportLife)); ok {
			free = append(free, r.Free)
		}
	}
	c.free = neededFree(c.voters, free)
	g.census.Store(c)
	return c
}

// neededFree is what the fullest voter has left that a majority needs beside the leader, if the emptiest of those that speak are taken. If too few speak for a majority all of
// them are needed: a batch then waits for another anyway.
func neededFree(voters int, others []int64) int64 {
	need := min(voters/2, len(others))
	if need == 0 {
		return math.MaxInt64
	}
	slices.Sort(others)
	return others[len(others)-need]
}

// clocks are those of the other voters that are in contact.
func (g *group) clocks() (others []time.Time, voters int) {
	c := g.others()
	for _, s := range c.names {
		if r, ok := g.host.peers.Report(s, g.host.cfg.slow(reportLife)); ok {
			others = append(others, r.Now())
		}
	}
	return others, c.voters
}
