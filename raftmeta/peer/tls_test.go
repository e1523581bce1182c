package peer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// authority issues certificates into a directory.
type authority struct {
	t    testing.TB
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	n    int64
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	a.cert, a.key = a.issue("ca", &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

// issue writes NAME.crt and NAME.key.
func (a *authority) issue(name string, c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.n++
	c.SerialNumber, c.Subject = big.NewInt(a.n), pkix.Name{CommonName: name}
	if c.NotAfter.IsZero() {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	parent, signer := c, key
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	for ext, b := range map[string]*pem.Block{"crt": {Type: "CERTIFICATE", Bytes: der}, "key": {Type: "PRIVATE KEY", Bytes: k}} {
		if err := os.WriteFile(filepath.Join(a.dir, name+"."+ext), pem.EncodeToMemory(b), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return out, key
}

func (a *authority) node(name string, dns ...string) *TLS {
	a.issue(name, &x509.Certificate{DNSNames: dns, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}})
	return a.files(name)
}

func (a *authority) files(name string) *TLS {
	return &TLS{CertFile: filepath.Join(a.dir, name+".crt"), KeyFile: filepath.Join(a.dir, name+".key"), CAFile: filepath.Join(a.dir, "ca.crt")}
}

func tlsConfig(server string, files *TLS) Config {
	return Config{ServerID: server, ClusterID: "c", TLS: files}
}

// With certificates a node is believed to be the node that its certificate names, and no other.
func TestCertificates(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	_, addr := listening(t, tlsConfig("1.aa", ca.node("one", "node-1")), patient())
	two := ca.node("two", "node-2")
	mixed := other.node("mixed", "node-2")
	mixed.CAFile = two.CAFile // its peers' CA is right, its own certificate is of another
	old := ca.node("old", "node-2")
	ca.issue("old", &x509.Certificate{DNSNames: []string{"node-2"}, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour)})
	for name, c := range map[string]struct {
		cfg    Config
		target string
		want   error
	}{
		"peer":                 {tlsConfig("2.bb", two), "1.aa", nil},
		"several names":        {tlsConfig("3.bb", ca.node("more", "node-3", "node-2", "host.example")), "1.aa", nil},
		"of another authority": {tlsConfig("2.bb", mixed), "1.aa", ErrStranger},
		"trusts another":       {tlsConfig("2.bb", other.node("two", "node-2")), "1.aa", ErrStranger},
		"expired":              {tlsConfig("2.bb", old), "1.aa", ErrStranger},
		"other cluster":        {Config{ServerID: "2.bb", ClusterID: "d", TLS: two}, "1.aa", ErrRefused},
	} {
		if err := greet(t, c.cfg, addr, c.target, classBulk, patient()); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if err := greet(t, secretConfig("2.bb"), addr, "1.aa", classBulk, patient()); err == nil {
		t.Error("a node with a secret and no certificate is a peer")
	}
	if _, err := New(tlsConfig("4.dd", two)); !errors.Is(err, ErrCertificate) {
		t.Errorf("a node with the certificate of another: %v", err)
	}
	// A node that has another's name only in its hello: the certificate says 2, and its peers look.
	q, err := New(Config{ServerID: "2.bb", ClusterID: "c", TLS: two, Resolve: func(string) (string, bool) { return addr, true }})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	if w, err := q.Ask(t.Context(), addr); err != nil || w.Server != "1.aa" || w.Cluster != "c" { // it is not known whose certificate it must be
		t.Errorf("%+v, %v", w, err)
	}
	q.cfg.ServerID = "3.cc"
	c, err := q.dial("1.aa")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := q.introduce(c, "1.aa", classBulk); !errors.Is(err, ErrRefused) {
		t.Errorf("node 2 as node 3: %v", err)
	}
}

// A listener whose certificate names another node is not the one that was asked for, and older versions of TLS are refused.
func TestListenersCertificate(t *testing.T) {
	ca := newAuthority(t)
	files := ca.node("one", "node-5")
	p, addr := listening(t, tlsConfig("5.ee", files), patient())
	ca.node("one", "node-1")
	p.identity.mu.Lock()
	p.identity.node, p.identity.read = "node-1", time.Time{} // it does not look at its own name, as an intruder would not
	p.identity.mu.Unlock()
	if err := greet(t, tlsConfig("2.bb", ca.node("two", "node-2")), addr, "5.ee", classBulk, patient()); !errors.Is(err, ErrStranger) {
		t.Errorf("node 1 as node 5: %v", err)
	}
	if _, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		t.Error("TLS 1.2 is spoken")
	}
	c, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true})
	if err == nil { // in TLS 1.3 the dialer learns of it when it reads
		_, err = c.Read(make([]byte, 1))
		_ = c.Close()
	}
	if err == nil {
		t.Error("no certificate is needed")
	}
}

// Certificates that were renewed are used without a restart, and a file that cannot be read does no harm.
func TestCertificatesAreRenewed(t *testing.T) {
	ca := newAuthority(t)
	files := ca.node("one", "node-1")
	i, err := newIdentity(*files, "node-1")
	if err != nil {
		t.Fatal(err)
	}
	serial := func() *big.Int {
		i.read = time.Time{} // long ago
		c, _ := i.config()
		return c.Certificates[0].Leaf.SerialNumber
	}
	first := serial()
	ca.node("one", "node-1")
	second := serial()
	if second.Cmp(first) <= 0 {
		t.Errorf("certificate %s after %s", second, first)
	}
	if err := os.WriteFile(files.CertFile, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n := serial(); n.Cmp(second) != 0 {
		t.Errorf("certificate %s, want still %s", n, second)
	}
	if _, err := newIdentity(*files, "node-1"); !errors.Is(err, ErrCertificate) {
		t.Errorf("%v", err)
	}
}

// All that goes between voters goes over TLS too: entries of all sizes, heartbeats, votes.
func TestReplicationOverTLS(t *testing.T) {
	ca := newAuthority(t)
	c := newClusterOf(t, 3, func(n *node) { n.tls = ca.node(n.id[:1], "node-"+n.id[:1]) })
	size := func(v uint64) int { return []int{0, 10, 1000, 70_000, 300_000}[v%5] }
	c.write(0, 30, size)
	old := c.leader()
	old.stop()
	c.write(30, 40, size)
	old.start(c.first)
	c.write(40, 50, size)
	c.agree(50)
}
