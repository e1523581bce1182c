package peer

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

const (
	helloMagic   = "ESTRPEER"
	helloVersion = 3
	helloHead    = 16
	nonceBytes   = 16
	featuresMax  = 64
	nameMax      = 255
	// skewTold is how far a peer's clock may be from this node's before people are told.
	skewTold = 5 * time.Minute
)

// step is the type of a message of the handshake.
type step uint8

const (
	stepHello     step = 1
	stepChallenge step = 2
	stepProof     step = 3
	stepWelcome   step = 4
	stepRefusal   step = 5
	stepDenied    step = 6
)

// most is the limit of a message's body: who has proven nothing may not make this node hold much.
func (s step) most() int {
	return [...]int{stepHello: 8 << 10, stepChallenge: nonceBytes, stepProof: sha256.Size, stepWelcome: 64 << 10, stepRefusal: 64 << 10, stepDenied: 0}[s]
}

// Errors of a handshake.
var (
	// ErrRefused: the other side does not want this connection; the text says why.
	ErrRefused = errors.New("peer: connection refused by the peer")
	// ErrGone: another server is where the one that was asked for should be: its incarnation will not come back.
	ErrGone      = fmt.Errorf("%w: another server is there", ErrRefused)
	errNotTarget = errors.New("another incarnation")
	// ErrStranger: the other side has not shown that it belongs to the cluster, or is not who was asked for.
	ErrStranger = errors.New("peer: not the peer that was asked for")
	// ErrVersion: the other side speaks a version that this program does not know, or sent flags of one.
	ErrVersion = errors.New("peer: unknown version")
)

type class string

const (
	classBulk class = "bulk"
	classBeat class = "beat"
	// classAsk ends after the handshake: it tells who listens, and of which cluster.
	classAsk class = "ask"
	// classFeed carries one group's feed to a follower, classQuery a follower's questions: these two are all that a follower may make.
	classFeed  class = "feed"
	classQuery class = "query"
)

// follows reports whether connections of this class are a follower's.
func (c class) follows() bool { return c == classFeed || c == classQuery }

// Levels is the lowest and the highest level of a feature that a node knows.
type Levels [2]int

// hello is what the dialer says first.
type hello struct {
	Cluster  string            `json:"cluster,omitempty"`
	Server   string            `json:"server"`
	Target   string            `json:"target,omitempty"`
	Class    class             `json:"class"`
	Min      int               `json:"min"`
	Max      int               `json:"max"`
	Features map[string]Levels `json:"features,omitempty"`
	Nonce    []byte            `json:"nonce"`
}

// welcome is what a listener says of itself to who has proven that it belongs to the cluster, or why it refuses.
type welcome struct {
	Cluster string `json:"cluster,omitempty"`
	Server  string `json:"server,omitempty"`
	// Founders are the server IDs of the cluster's first voters.
	Founders []string          `json:"founders,omitempty"`
	Clock    int64             `json:"clock,omitempty"`
	Version  int               `json:"version,omitempty"`
	Features map[string]Levels `json:"features,omitempty"`
	// Known is how far the dialer has been in its groups, as the listener remembers it.
	Known map[uint32]Standing `json:"known,omitempty"`
	Error string              `json:"error,omitempty"`
	// Gone: the error is that this is not the target.
	Gone bool `json:"gone,omitempty"`
}

// talk is one handshake: the connection, the key that proofs are made with, and all that was said.
type talk struct {
	c    net.Conn
	key  []byte
	said bytes.Buffer // each message behind its length
}

// newTalk gives a handshake its key: what the connection's two ends alone share, or the cluster's secret.
func (p *Peers) newTalk(c net.Conn) (*talk, error) {
	if err := c.SetDeadline(time.Now().Add(p.times.hello)); err != nil {
		return nil, err
	}
	key, err := tlsKey(c, p.cfg.Secret)
	return &talk{c: c, key: key}, err
}

func (t *talk) note(msg []byte) {
	t.said.Write(binary.BigEndian.AppendUint32(nil, uint32(len(msg))))
	t.said.Write(msg)
}

// message makes a message and counts it as said.
func (t *talk) message(s step, body []byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte(helloMagic), helloVersion)
	b = append(b, byte(s), 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
	b = append(b, body...)
	t.note(b)
	return b
}

func (t *talk) say(s step, body []byte) error {
	_, err := t.c.Write(t.message(s, body))
	return err
}

// proof shows that its maker knows the key, in this conversation up to here and in this role.
func (t *talk) proof(role string) []byte {
	m := hmac.New(sha256.New, t.key)
	m.Write([]byte{byte(len(role))})
	m.Write([]byte(role))
	m.Write(t.said.Bytes())
	return m.Sum(nil)
}

// hear reads a message of one of the types that may come now.
func (t *talk) hear(want ...step) (step, []byte, error) {
	s, msg, err := readStep(t.c)
	if err != nil {
		return 0, nil, tlsError(t.c, err) // the listener's word on this node's certificate comes here
	}
	for _, w := range want {
		if s == w {
			t.note(msg)
			return s, msg[helloHead:], nil
		}
	}
	if s == stepDenied {
		return s, nil, fmt.Errorf("%w: %s does not share this node's secret", ErrStranger, t.c.RemoteAddr())
	}
	return s, nil, fmt.Errorf("%w: handshake: a message of type %d, want %d", ErrFrame, s, want)
}

// readStep reads one message, whole.
func readStep(r io.Reader) (step, []byte, error) {
	head := make([]byte, helloHead)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, nil, err
	}
	be := binary.BigEndian
	if string(head[:8]) != helloMagic {
		return 0, nil, fmt.Errorf("%w: not a node of Estran", ErrFrame)
	}
	if v := be.Uint16(head[8:]); v != helloVersion {
		return 0, nil, fmt.Errorf("%w: handshake of version %d, this program speaks %d", ErrVersion, v, helloVersion)
	}
	s, n := step(head[10]), be.Uint32(head[12:])
	if s < stepHello || s > stepDenied || head[11] != 0 || n > uint32(s.most()) {
		return s, nil, fmt.Errorf("%w: handshake: %d bytes of type %d", ErrFrame, n, s)
	}
	msg := append(head, make([]byte, n)...)
	if _, err := io.ReadFull(r, msg[helloHead:]); err != nil {
		return s, nil, err
	}
	return s, msg, nil
}

func newNonce() []byte {
	b := make([]byte, nonceBytes)
	_, _ = rand.Read(b) // never fails
	return b
}

func noNonce(b []byte) bool { return len(b) != nonceBytes || bytes.Equal(b, make([]byte, nonceBytes)) }

// agree returns the highest frame version that both sides have.
func agree(lowest, highest int) (int, error) {
	v := min(highest, frameVersion)
	if v < lowest || v < frameLeast {
		return 0, fmt.Errorf("%w: frames of versions %d to %d, this node speaks %d to %d", ErrVersion, lowest, highest, frameLeast, frameVersion)
	}
	return v, nil
}

// compare refuses another node's features if one that both know has no level in common. What only one side knows is not used.
func compare(own, other map[string]Levels) error {
	if len(other) > featuresMax {
		return fmt.Errorf("%w: %d features", ErrFrame, len(other))
	}
	for name, o := range own {
		if l, ok := other[name]; ok && (l[0] > o[1] || l[1] < o[0]) {
			return fmt.Errorf("%w: levels %d to %d of feature %s, this node has %d to %d", ErrVersion, l[0], l[1], name, o[0], o[1])
		}
	}
	return nil
}

// introduce is the dialer's side of the handshake.
func (p *Peers) introduce(c net.Conn, target string, cl class) error {
	w, err := p.speak(c, target, cl)
	if err != nil {
		return err
	}
	if own := p.cluster.Load().id; w.Server != target || w.Cluster != own {
		return fmt.Errorf("%w: %s is %s of cluster %q, want %s of %q", ErrStranger, c.RemoteAddr(), w.Server, w.Cluster, target, own)
	}
	if skew := time.UnixMilli(w.Clock).Sub(p.cfg.Now().Round(0)); skew.Abs() > skewTold {
		p.cfg.Logger.Warn("a peer's clock differs from this node's", "event", "clock.skew", "component", "peer", "peer", target, "ahead", skew)
	}
	p.recall(&w)
	return c.SetDeadline(time.Time{})
}

// speak does the handshake and returns what the listener says of itself.
func (p *Peers) speak(c net.Conn, target string, cl class) (w welcome, err error) {
	t, err := p.newTalk(c)
	if err != nil {
		return w, err
	}
	body, err := json.Marshal(hello{Cluster: p.cluster.Load().id, Server: p.cfg.ServerID, Target: target, Class: cl, Min: frameLeast, Max: frameVersion, Features: p.cfg.Features(), Nonce: newNonce()})
	if err != nil {
		return w, err
	}
	if err := t.say(stepHello, body); err != nil {
		return w, err
	}
	if _, nonce, err := t.hear(stepChallenge); err != nil {
		return w, err
	} else if noNonce(nonce) {
		return w, fmt.Errorf("%w: handshake: no nonce", ErrFrame)
	}
	if err := t.say(stepProof, t.proof("dialer")); err != nil {
		return w, err
	}
	s, body, err := t.hear(stepWelcome, stepRefusal)
	if err != nil {
		return w, err
	}
	want := t.proof("listener")
	if _, got, err := t.hear(stepProof); err != nil {
		return w, err
	} else if !hmac.Equal(got, want) {
		return w, fmt.Errorf("%w: %s does not share this node's secret", ErrStranger, c.RemoteAddr())
	}
	if err := json.Unmarshal(body, &w); err != nil {
		return w, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	if s == stepRefusal {
		if w.Gone {
			return welcome{}, fmt.Errorf("%w: %s", ErrGone, w.Error)
		}
		return welcome{}, fmt.Errorf("%w: %s", ErrRefused, w.Error)
	}
	return w, p.accepts(c, &w)
}

// accepts checks what a listener says of itself.
func (p *Peers) accepts(c net.Conn, w *welcome) error {
	if w.Version < frameLeast || w.Version > frameVersion {
		return fmt.Errorf("%w: frames of version %d", ErrVersion, w.Version)
	}
	if err := compare(p.cfg.Features(), w.Features); err != nil {
		return err
	}
	return tlsNames(c, w.Server)
}

// Peer is what a node says of itself: its cluster is "" while it belongs to none.
type Peer struct {
	Server, Cluster string
	Founders        []string
	// Known is how far this node has been in its groups, as the peer remembers it.
	Known map[uint32]Standing
}

// Ask asks who listens at an address. What a node of this cluster remembers of this one is compared with where it stands: OnBehind.
func (p *Peers) Ask(ctx context.Context, addr string) (Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, p.times.dial)
	defer cancel()
	c, err := p.connect(ctx, addr)
	if err != nil {
		return Peer{}, err
	}
	defer c.Close()
	w, err := p.speak(c, "", classAsk)
	if err == nil && w.Cluster != "" && w.Cluster == p.cluster.Load().id {
		p.recall(&w)
	}
	return Peer{w.Server, w.Cluster, w.Founders, w.Known}, err
}

// receive is the listener's side. Nothing that it says before the dialer's proof depends on this node but a nonce.
func (p *Peers) receive(c net.Conn) (from string, cl class, err error) {
	t, err := p.newTalk(c)
	if err != nil {
		return "", "", err
	}
	_, body, err := t.hear(stepHello)
	if errors.Is(err, ErrVersion) {
		return "", "", errors.Join(err, t.say(stepDenied, nil)) // tells the version, so that its people see what is wrong
	}
	if err != nil {
		return "", "", err
	}
	var d hello
	if err := json.Unmarshal(body, &d); err != nil {
		return "", "", fmt.Errorf("%w: handshake: %w", ErrFrame, err)
	}
	if noNonce(d.Nonce) || len(d.Server) > nameMax {
		return "", "", fmt.Errorf("%w: handshake: a nonce of %d bytes, a name of %d", ErrFrame, len(d.Nonce), len(d.Server))
	}
	if err := t.say(stepChallenge, newNonce()); err != nil {
		return "", "", err
	}
	want := t.proof("dialer")
	_, proof, err := t.hear(stepProof)
	if err != nil {
		return "", "", err
	}
	if !hmac.Equal(proof, want) {
		return "", "", errors.Join(fmt.Errorf("%w: %s calls itself %q and does not share this node's secret", ErrStranger, c.RemoteAddr(), d.Server), t.say(stepDenied, nil))
	}
	version, why := p.judge(c, &d)
	if err := p.welcome(t, d.Server, version, why); err != nil || why != nil {
		return "", "", errors.Join(why, err)
	}
	return d.Server, d.Class, c.SetDeadline(time.Time{})
}

// judge decides on a dialer that has shown that it belongs to the cluster.
func (p *Peers) judge(c net.Conn, d *hello) (version int, err error) {
	stranger := func(why string) error { return fmt.Errorf("%w: %s: %s", ErrStranger, c.RemoteAddr(), why) }
	switch own := p.cluster.Load().id; {
	case d.Class != classBulk && d.Class != classBeat && d.Class != classAsk && !d.Class.follows():
		return 0, stranger(fmt.Sprintf("class %q", d.Class))
	case d.Class != classAsk && own == "":
		return 0, stranger("this node belongs to no cluster yet")
	case d.Class != classAsk && d.Cluster != own:
		return 0, stranger("this node belongs to another cluster")
	case d.Class != classAsk && d.Target != p.cfg.ServerID:
		return 0, fmt.Errorf("%w: this is not %s", errNotTarget, d.Target)
	case d.Server == "" || d.Server == p.cfg.ServerID:
		return 0, stranger("it calls itself " + d.Server)
	}
	if err := tlsNames(c, d.Server); err != nil && (!d.Class.follows() && d.Class != classAsk || tlsNamed(c, followerName) != nil) {
		return 0, err
	}
	if err := compare(p.cfg.Features(), d.Features); err != nil {
		return 0, err
	}
	return agree(d.Min, d.Max)
}

// welcome answers a dialer whose proof was right, and proves in its turn.
func (p *Peers) welcome(t *talk, dialer string, version int, why error) error {
	cluster := p.cluster.Load()
	s, w := stepWelcome, welcome{Cluster: cluster.id, Founders: cluster.founders, Server: p.cfg.ServerID, Clock: p.cfg.Now().UnixMilli(), Version: version, Features: p.cfg.Features(), Known: p.memory.of(dialer)}
	if why != nil {
		s, w = stepRefusal, welcome{Error: why.Error(), Gone: errors.Is(why, errNotTarget)}
	}
	body, err := json.Marshal(w)
	if err != nil {
		return err
	}
	if len(body) > s.most() {
		return fmt.Errorf("%w: a welcome of %d bytes", ErrFrame, len(body))
	}
	b := t.message(s, body)
	_, err = t.c.Write(append(b, t.message(stepProof, t.proof("listener"))...))
	return err
}
