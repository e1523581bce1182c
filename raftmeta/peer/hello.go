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
	helloVersion = 2
	helloMax     = 64 << 10
	// helloTime bounds a handshake.
	helloTime = 3 * time.Second
)

// Errors of a handshake.
var (
	// ErrRefused: the other side does not want this connection; the text says why.
	ErrRefused = errors.New("peer: connection refused by the peer")
	// ErrStranger: the other side has not shown that it knows the cluster's secret, or is not who was asked for.
	ErrStranger = errors.New("peer: not the peer that was asked for")
)

type class string

const (
	classBulk class = "bulk"
	classBeat class = "beat"
	// classAsk ends after the handshake: it tells who listens, and of which cluster.
	classAsk class = "ask"
)

// hello is what both ends say first.
type hello struct {
	Cluster string `json:"cluster,omitempty"`
	Server  string `json:"server,omitempty"`
	Target  string `json:"target,omitempty"`
	Class   class  `json:"class,omitempty"`
	Min     int    `json:"min,omitempty"`
	Max     int    `json:"max,omitempty"`
	Nonce   []byte `json:"nonce,omitempty"`
	Clock   int64  `json:"clock,omitempty"`
	MAC     []byte `json:"mac,omitempty"`
	Version int    `json:"version,omitempty"`
	Error   string `json:"error,omitempty"`
	// Founders are the server IDs of the cluster's first voters.
	Founders []string `json:"founders,omitempty"`
}

func readHello(r io.Reader) (h hello, err error) {
	head := make([]byte, len(helloMagic)+6)
	if _, err := io.ReadFull(r, head); err != nil {
		return h, err
	}
	be := binary.BigEndian
	if string(head[:8]) != helloMagic {
		return h, fmt.Errorf("%w: not a node of Estran", ErrFrame)
	}
	if v := be.Uint16(head[8:]); v != helloVersion {
		return h, fmt.Errorf("%w: handshake of version %d, this program speaks %d", ErrFrame, v, helloVersion)
	}
	n := be.Uint32(head[10:])
	if n > helloMax {
		return h, fmt.Errorf("%w: handshake of %d bytes", ErrFrame, n)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return h, err
	}
	if err := json.Unmarshal(body, &h); err != nil {
		return h, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	if h.Error != "" {
		return h, fmt.Errorf("%w: %s", ErrRefused, h.Error)
	}
	return h, nil
}

func writeHello(w io.Writer, h hello) error {
	body, err := json.Marshal(h)
	if err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint16([]byte(helloMagic), helloVersion)
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
	_, err = w.Write(append(b, body...))
	return err
}

// mac proves that its maker knows the secret, in this conversation and this role.
func mac(secret []byte, role string, d, l *hello) []byte {
	if len(secret) == 0 {
		return nil
	}
	m := hmac.New(sha256.New, secret)
	for _, b := range [][]byte{[]byte(role), d.Nonce, l.Nonce, []byte(d.Server), []byte(l.Server), []byte(d.Cluster), []byte(d.Class), []byte(d.Target)} {
		_ = binary.Write(m, binary.BigEndian, uint32(len(b))) // never fails
		m.Write(b)
	}
	return m.Sum(nil)
}

func (p *Peers) self() hello {
	c := p.cluster.Load()
	h := hello{Cluster: c.id, Founders: c.founders, Server: p.cfg.ServerID, Min: frameVersion, Max: frameVersion, Nonce: make([]byte, 16), Clock: p.cfg.Now().UnixMilli()}
	_, _ = rand.Read(h.Nonce) // never fails
	return h
}

// introduce is the dialer's side of the handshake.
func (p *Peers) introduce(c net.Conn, target string, cl class) error {
	l, err := p.talk(c, target, cl)
	if err != nil {
		return err
	}
	if own := p.cluster.Load().id; l.Server != target || l.Cluster != own {
		return fmt.Errorf("%w: %s is %s of cluster %q, want %s of %q", ErrStranger, c.RemoteAddr(), l.Server, l.Cluster, target, own)
	}
	return c.SetDeadline(time.Time{})
}

// talk does the handshake and returns what the listener says of itself.
func (p *Peers) talk(c net.Conn, target string, cl class) (l hello, err error) {
	if err := c.SetDeadline(time.Now().Add(helloTime)); err != nil {
		return l, err
	}
	d := p.self()
	d.Target, d.Class = target, cl
	if err := writeHello(c, d); err != nil {
		return l, err
	}
	if l, err = readHello(c); err != nil {
		return l, err
	}
	if !hmac.Equal(l.MAC, mac(p.cfg.Secret, "listener", &d, &l)) {
		return l, fmt.Errorf("%w: %s does not know the cluster's secret", ErrStranger, c.RemoteAddr())
	}
	if err := writeHello(c, hello{MAC: mac(p.cfg.Secret, "dialer", &d, &l)}); err != nil {
		return l, err
	}
	ok, err := readHello(c)
	if err == nil && ok.Version != frameVersion {
		err = fmt.Errorf("%w: frames of version %d", ErrFrame, ok.Version)
	}
	return l, err
}

// Peer is what a node says of itself: its cluster is "" while it belongs to none.
type Peer struct {
	Server, Cluster string
	Founders        []string
}

// Ask asks who listens at an address.
func (p *Peers) Ask(ctx context.Context, addr string) (Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	c, err := p.cfg.Dial(ctx, addr)
	if err != nil {
		return Peer{}, err
	}
	defer c.Close()
	l, err := p.talk(c, "", classAsk)
	return Peer{l.Server, l.Cluster, l.Founders}, err
}

// receive is the listener's side. It tells an unknown dialer nothing but why it is refused.
func (p *Peers) receive(c net.Conn) (from string, cl class, err error) {
	if err := c.SetDeadline(time.Now().Add(helloTime)); err != nil {
		return "", "", err
	}
	d, err := readHello(c)
	if err != nil {
		return "", "", err
	}
	refuse := func(why string) (string, class, error) {
		return "", "", errors.Join(fmt.Errorf("%w: %s: %s", ErrStranger, c.RemoteAddr(), why), writeHello(c, hello{Error: why}))
	}
	switch own := p.cluster.Load().id; {
	case d.Class != classAsk && own == "":
		return refuse("this node belongs to no cluster yet")
	case d.Class != classAsk && d.Cluster != own:
		return refuse("this node belongs to another cluster")
	case d.Class != classAsk && d.Target != p.cfg.ServerID:
		return refuse("this is not " + d.Target)
	case d.Server == "" || d.Server == p.cfg.ServerID:
		return refuse("it calls itself " + d.Server)
	case d.Class != classBulk && d.Class != classBeat && d.Class != classAsk:
		return refuse(fmt.Sprintf("class %q", d.Class))
	case d.Min > frameVersion || d.Max < frameVersion:
		return refuse(fmt.Sprintf("frames of versions %d to %d, this node speaks %d", d.Min, d.Max, frameVersion))
	case len(d.Nonce) != 16 || bytes.Equal(d.Nonce, make([]byte, 16)):
		return refuse("no nonce")
	}
	l := p.self()
	l.MAC = mac(p.cfg.Secret, "listener", &d, &l)
	if err := writeHello(c, l); err != nil {
		return "", "", err
	}
	proof, err := readHello(c)
	if err != nil {
		return "", "", err
	}
	if !hmac.Equal(proof.MAC, mac(p.cfg.Secret, "dialer", &d, &l)) {
		return refuse("it does not know the cluster's secret")
	}
	if err := writeHello(c, hello{Version: frameVersion}); err != nil {
		return "", "", err
	}
	return d.Server, d.Class, c.SetDeadline(time.Time{})
}
