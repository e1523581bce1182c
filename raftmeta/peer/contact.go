package peer

import (
	"slices"
	"sync"
	"time"
)

// contacts are the servers that a group's leader is in contact with: seen by itself, or told by it with its heartbeats.
type contacts struct {
	mu      sync.Mutex
	answers map[string]time.Time // of the appends of this node, by server
	leader  string               // who told
	servers []string             // whom it named
	at      time.Time

	speaker string // whose append came last
	spokeAt time.Time
	votedAt time.Time // for another server
}

// voted notes that this node has voted for somebody, who may be leading in a moment.
func (c *contacts) voted() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.votedAt = time.Now()
}

// outcome is how long to wait, d after the vote, for what has come of it; not above 0 if there is nothing to wait for.
func (c *contacts) outcome(d time.Duration) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Until(c.votedAt.Add(d))
}

// spoke notes that a server has sent an append, whatever raft makes of it.
func (c *contacts) spoke(server string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.speaker, c.spokeAt = server, time.Now()
}

// silent reports whether the leader has sent nothing for d.
func (c *contacts) silent(leader string, d time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.speaker != leader || time.Since(c.spokeAt) > d
}

// heard notes that a server has answered.
func (c *contacts) heard(server string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.answers == nil {
		c.answers = map[string]time.Time{}
	}
	c.answers[server] = time.Now()
}

// since returns the servers that have answered within d, sorted.
func (c *contacts) since(d time.Duration) (out []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s, at := range c.answers {
		if time.Since(at) <= d {
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return out
}

// told notes what a leader says.
func (c *contacts) told(leader string, servers []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leader, c.servers, c.at = leader, servers, time.Now()
}

// Contacts returns the servers that have answered this node's appends within a leader's lease.
func (t *Transport) Contacts() []string { return t.contact.since(t.p.times.contact) }

// ToldContacts returns the servers that a leader said last it was in contact with; ok is false if it is not that one who spoke last, or not lately.
func (t *Transport) ToldContacts(leader string) (servers []string, ok bool) {
	c := &t.contact
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.servers, c.leader == leader && time.Since(c.at) <= t.p.times.told
}
