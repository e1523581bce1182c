package peer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// TLS names the files with which nodes prove who they are, instead of a secret. They are read again while the node runs: certificates expire.
type TLS struct{ CertFile, KeyFile, CAFile string }

// tlsReload is how long what was read from the files is used.
const tlsReload = 10 * time.Second

// ErrCertificate: the files do not prove who this node is.
var ErrCertificate = errors.New("peer: certificate")

// identity is what the files of a TLS held when they were last read.
type identity struct {
	files TLS
	node  string // the name that this node's certificate must have

	mu   sync.Mutex
	read time.Time
	cert *tls.Certificate
	ca   *x509.CertPool
}

// nodeName is the DNS name of a server's node in certificates.
func nodeName(server string) string {
	node, _, _ := cutServer(server)
	return "node-" + node
}

// followerName is the DNS name in the certificates of followers, whose IDs are lent to them.
const followerName = "replica"

func newIdentity(files TLS, name string) (*identity, error) {
	i := &identity{files: files, node: name}
	return i, i.load()
}

// load reads the files; what they must be is checked here, so that a node does not start with a certificate that its peers will refuse.
func (i *identity) load() error {
	pem, err := os.ReadFile(i.files.CAFile)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCertificate, err)
	}
	ca := x509.NewCertPool()
	if !ca.AppendCertsFromPEM(pem) {
		return fmt.Errorf("%w: %s holds none", ErrCertificate, i.files.CAFile)
	}
	cert, err := tls.LoadX509KeyPair(i.files.CertFile, i.files.KeyFile)
	if err != nil {
		return fmt.Errorf("%w: %s with %s: %w", ErrCertificate, i.files.CertFile, i.files.KeyFile, err)
	}
	if err := cert.Leaf.VerifyHostname(i.node); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCertificate, i.files.CertFile, err)
	}
	i.cert, i.ca, i.read = &cert, ca, time.Now()
	return nil
}

// config returns what a handshake uses. Files that cannot be read change nothing: what was read before goes on being used.
func (i *identity) config() (*tls.Config, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	var err error
	if time.Since(i.read) > tlsReload {
		if err = i.load(); err != nil {
			i.read = time.Now() // not at every connection
		}
	}
	ca := i.ca
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*i.cert}, SessionTicketsDisabled: true,
		ClientAuth: tls.RequireAnyClientCert, InsecureSkipVerify: true, // verify does it for both sides: a dialer may not know yet which node listens
		VerifyConnection: func(s tls.ConnectionState) error { return verify(s, ca) }}, err
}

// verify checks that the other side's certificate was issued by the cluster's CA; whom it names is compared when the server ID is known.
func verify(s tls.ConnectionState, ca *x509.CertPool) error {
	if len(s.PeerCertificates) == 0 {
		return fmt.Errorf("%w: none", ErrCertificate)
	}
	o := x509.VerifyOptions{Roots: ca, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, c := range s.PeerCertificates[1:] {
		o.Intermediates.AddCert(c)
	}
	_, err := s.PeerCertificates[0].Verify(o)
	return err
}

// sealed is a TLS connection that ends at once: tls.Conn.Close waits for the peer to take its farewell, for seconds.
type sealed struct {
	*tls.Conn
	raw net.Conn
}

func (s sealed) Close() error { return s.raw.Close() }

// secure puts TLS around a connection and does its handshake; without certificates it is used as it is.
func (p *Peers) secure(ctx context.Context, c net.Conn, client bool) (net.Conn, error) {
	if p.identity == nil {
		return c, nil
	}
	cfg, err := p.identity.config()
	if err != nil {
		p.cfg.Logger.Warn("certificates cannot be read again, the old ones are used", "component", "peer", "err", err)
	}
	t := tls.Server(c, cfg)
	if client {
		t = tls.Client(c, cfg)
	}
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, tlsError(c, err)
	}
	return sealed{t, c}, nil
}

// tlsError tells a certificate that is not accepted, here or there, from a connection that broke.
func tlsError(c net.Conn, err error) error {
	var bad *tls.CertificateVerificationError
	var op *net.OpError
	var authority x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	if errors.As(err, &bad) || errors.As(err, &authority) || errors.As(err, &invalid) || errors.As(err, &op) && op.Op == "remote error" {
		return fmt.Errorf("%w: TLS with %s: %w", ErrStranger, c.RemoteAddr(), err)
	}
	return err
}

// tlsKey is what a handshake's proofs are made with: what TLS gives to the two ends of this connection alone, or the secret.
func tlsKey(c net.Conn, secret []byte) ([]byte, error) {
	if s, ok := c.(sealed); ok {
		state := s.ConnectionState()
		return state.ExportKeyingMaterial("EXPORTER-estran-peer", nil, 32)
	}
	return secret, nil
}

// tlsNames checks that the certificate of the other side names the node of the server ID that it claims.
func tlsNames(c net.Conn, server string) error {
	if err := tlsNamed(c, nodeName(server)); err != nil {
		return fmt.Errorf("%w: %s calls itself %s: %w", ErrStranger, c.RemoteAddr(), server, err)
	}
	return nil
}

// tlsNamed checks that the certificate of the other side names somebody.
func tlsNamed(c net.Conn, name string) error {
	s, ok := c.(sealed)
	if !ok {
		return nil
	}
	return s.ConnectionState().PeerCertificates[0].VerifyHostname(name)
}
