package peer

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// listening starts a node that listens on loopback.
func listening(t testing.TB, cfg Config, at times) (*Peers, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Listener = l
	if cfg.Resolve == nil {
		cfg.Resolve = func(string) (string, bool) { return "", false }
	}
	p, err := newPeers(cfg, at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p, l.Addr().String()
}

// greet makes a node of cfg and lets it introduce itself at addr as to target.
func greet(t testing.TB, cfg Config, addr, target string, cl class, at times) error {
	t.Helper()
	cfg.Resolve = func(string) (string, bool) { return addr, true }
	q, err := newPeers(cfg, at)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	c, err := q.dial(target)
	if err != nil {
		return err
	}
	defer c.Close()
	return q.introduce(c, target, cl)
}

// levels is what a node says that knows levels of one feature.
func levels(name string, least, most int) func() map[string]Levels {
	return func() map[string]Levels { return map[string]Levels{name: {least, most}} }
}

// patient are times for a handshake that must succeed, however busy the machine is.
func patient() times {
	at := defaultTimes()
	at.dial, at.hello, at.dead = time.Minute, time.Minute, time.Hour
	return at
}

func secretConfig(server string) Config {
	return Config{ServerID: server, ClusterID: "c", Founders: []string{"1.aa"}, Secret: []byte("secret"), Features: levels("entry", 2, 4)}
}

// Who is not a peer gets nothing, who is one but is not wanted is told why, and the node goes on.
func TestStrangers(t *testing.T) {
	_, addr := listening(t, secretConfig("1.aa"), patient())
	for name, c := range map[string]struct {
		change func(*Config)
		target string
		class  class
		want   error
	}{
		"peer":                   {func(*Config) {}, "1.aa", classBulk, nil},
		"wrong secret":           {func(c *Config) { c.Secret = []byte("other") }, "1.aa", classBulk, ErrStranger},
		"no secret":              {func(c *Config) { c.Secret = nil }, "1.aa", classBulk, ErrStranger},
		"other cluster":          {func(c *Config) { c.ClusterID = "d" }, "1.aa", classBulk, ErrRefused},
		"itself":                 {func(c *Config) { c.ServerID = "1.aa" }, "1.aa", classBulk, ErrRefused},
		"other target":           {func(*Config) {}, "1.old", classBulk, ErrRefused},
		"unknown class":          {func(*Config) {}, "1.aa", "gossip", ErrRefused},
		"levels that overlap":    {func(c *Config) { c.Features = levels("entry", 4, 9) }, "1.aa", classBulk, nil},
		"levels that are behind": {func(c *Config) { c.Features = levels("entry", 1, 1) }, "1.aa", classBulk, ErrRefused},
		"levels that are ahead":  {func(c *Config) { c.Features = levels("entry", 5, 9) }, "1.aa", classBulk, ErrRefused},
		"unknown feature": {func(c *Config) {
			c.Features = func() map[string]Levels { return map[string]Levels{"entry": {2, 2}, "wings": {7, 7}} }
		}, "1.aa", classBulk, nil},
		"lacking a feature": {func(c *Config) { c.Features = nil }, "1.aa", classBulk, nil},
	} {
		cfg := secretConfig("2.bb")
		c.change(&cfg)
		if err := greet(t, cfg, addr, c.target, c.class, patient()); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	raw := func(version uint16, s step, n uint32, body string) string {
		b := binary.BigEndian.AppendUint16([]byte(helloMagic), version)
		return string(append(binary.BigEndian.AppendUint32(append(b, byte(s), 0), n), body...))
	}
	for name, b := range map[string]string{"garbage": "GET / HTTP/1.1\r\n\r\n", "huge hello": raw(helloVersion, stepHello, 8<<10+1, ""), "no JSON": raw(helloVersion, stepHello, 2, "{["),
		"no nonce": raw(helloVersion, stepHello, 2, "{}"), "a proof first": raw(helloVersion, stepProof, 32, strings.Repeat("x", 32)), "unknown type": raw(helloVersion, 9, 0, "")} {
		if got := tell(t, addr, b); len(got) > 0 {
			t.Errorf("%s: answered with %q", name, got)
		}
	}
	if got, want := tell(t, addr, raw(2, stepHello, 0, "")), raw(helloVersion, stepDenied, 0, ""); got != want {
		t.Errorf("another version is answered with %q, want %q", got, want)
	}
	if err := greet(t, secretConfig("2.bb"), addr, "1.aa", classBulk, patient()); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// tell sends bytes and returns all that comes back until the other side ends the connection.
func tell(t testing.TB, addr, b string) string {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, b); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	got, err := io.ReadAll(c)
	if err != nil && !isReset(err) {
		t.Errorf("the connection stays open: %v", err)
	}
	return string(got)
}

// Before a proof that is right a listener says a nonce and nothing else; to one that is wrong, only that it is.
func TestListenerRevealsNothing(t *testing.T) {
	said := map[string]bool{}
	for _, cfg := range []Config{secretConfig("1.aa"), {ServerID: "7.cc", ClusterID: "another", Secret: []byte("s"), Founders: []string{"7.cc", "8.dd"}}} {
		_, addr := listening(t, cfg, patient())
		for range 3 {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
			k := &talk{c: c, key: []byte("guess")}
			body, err := json.Marshal(hello{Server: "2.bb", Cluster: cfg.ClusterID, Target: cfg.ServerID, Class: classBulk, Min: 1, Max: 1, Nonce: newNonce()})
			if err != nil {
				t.Fatal(err)
			}
			if err := k.say(stepHello, body); err != nil {
				t.Fatal(err)
			}
			_, nonce, err := k.hear(stepChallenge)
			if err != nil {
				t.Fatal(err)
			}
			if said[string(nonce)] {
				t.Error("a nonce was said twice")
			}
			said[string(nonce)] = true
			if err := k.say(stepProof, k.proof("dialer")); err != nil {
				t.Fatal(err)
			}
			rest, err := io.ReadAll(c)
			if want := (&talk{}).message(stepDenied, nil); !bytes.Equal(rest, want) {
				t.Errorf("a wrong proof is answered with %q (%v), want %q", rest, err, want)
			}
			_ = c.Close()
		}
	}
}

// tamper changes one byte of what goes one way, once it has passed.
type tamper struct {
	net.Conn
	write bool
	at    int
	n     int
}

func (c *tamper) flip(b []byte) {
	if c.at >= c.n && c.at < c.n+len(b) {
		b[c.at-c.n] ^= 1
	}
	c.n += len(b)
}

func (c *tamper) Write(b []byte) (int, error) {
	if !c.write {
		return c.Conn.Write(b)
	}
	b = bytes.Clone(b)
	c.flip(b)
	return c.Conn.Write(b)
}

func (c *tamper) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if !c.write {
		c.flip(b[:n])
	}
	return n, err
}

// A handshake of which any byte was changed on its way, either way, fails: the proofs cover both IDs, the cluster, the class, versions, features and nonces.
func TestHandshakeIsCovered(t *testing.T) {
	short := defaultTimes()
	short.hello = 300 * time.Millisecond // a length that was changed is waited for
	_, addr := listening(t, secretConfig("1.aa"), short)
	cfg := secretConfig("2.bb")
	cfg.Resolve = func(string) (string, bool) { return addr, true }
	q, err := newPeers(cfg, short)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.Close() })
	try := func(write bool, at int) (*tamper, error) {
		c, err := q.dial("1.aa")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		x := &tamper{Conn: c, write: write, at: at}
		return x, q.introduce(x, "1.aa", classBeat)
	}
	for _, write := range []bool{true, false} {
		var x *tamper
		eventually(t, "an untouched handshake", func() (ok bool) { // in time, too
			var err error
			x, err = try(write, -1)
			return err == nil
		})
		if x.n < 100 {
			t.Fatalf("untouched: %d bytes", x.n)
		}
		for at := range x.n {
			t.Run(fmt.Sprintf("%v/%d", write, at), func(t *testing.T) {
				t.Parallel()
				if _, err := try(write, at); err == nil {
					t.Errorf("byte %d of %d was changed (by the dialer: %v) and nobody noticed", at, x.n, write)
				}
			})
		}
	}
}

// What one dialer said proves nothing when it is said again.
func TestHandshakeIsNotReplayed(t *testing.T) {
	_, addr := listening(t, secretConfig("1.aa"), patient())
	cfg := secretConfig("2.bb")
	cfg.Resolve = func(string) (string, bool) { return addr, true }
	q, err := newPeers(cfg, patient())
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	c, err := q.dial("1.aa")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := &recorded{Conn: c}
	if err := q.introduce(r, "1.aa", classBulk); err != nil {
		t.Fatal(err)
	}
	got := tell(t, addr, r.said.String())
	if want := string((&talk{}).message(stepDenied, nil)); len(got) != helloHead+nonceBytes+len(want) || !strings.HasSuffix(got, want) {
		t.Errorf("a repeated handshake is answered with %q", got)
	}
}

type recorded struct {
	net.Conn
	said bytes.Buffer
}

func (r *recorded) Write(b []byte) (int, error) { r.said.Write(b); return r.Conn.Write(b) }

// Strangers that say nothing do not keep peers out: the oldest give way.
func TestSilentStrangersGiveWay(t *testing.T) {
	slow := defaultTimes()
	slow.hello = time.Hour
	p, addr := listening(t, secretConfig("1.aa"), slow)
	var silent []net.Conn
	for range strangersMax + inMax {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	if err := greet(t, secretConfig("2.bb"), addr, "1.aa", classBulk, patient()); err != nil {
		t.Errorf("a peer among strangers: %v", err)
	}
	_ = silent[0].SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := silent[0].Read(make([]byte, 1)); err == nil || !isReset(err) && !errors.Is(err, io.EOF) {
		t.Errorf("the oldest stays: %v", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.strangers) > strangersMax {
		t.Errorf("%d strangers", len(p.strangers))
	}
}

// A handshake that does not go on ends.
func TestHandshakeDeadline(t *testing.T) {
	short := defaultTimes()
	short.hello = 20 * time.Millisecond
	_, addr := listening(t, secretConfig("1.aa"), short)
	if got := tell(t, addr, helloMagic); got != "" { // and no more
		t.Errorf("%q", got)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // it accepts nobody, the kernel does
	if err := greet(t, secretConfig("2.bb"), l.Addr().String(), "1.aa", classBulk, short); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a listener that says nothing: %v", err)
	}
}

// conversation is a handshake with fixed nonces, as bytes.
func conversation(t testing.TB) [][]byte {
	k := &talk{key: []byte("secret")}
	j := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	nonce := func(c byte) []byte { return bytes.Repeat([]byte{c}, nonceBytes) }
	out := [][]byte{k.message(stepHello, j(hello{Cluster: "c", Server: "2.bb", Target: "1.aa", Class: classBulk, Min: 1, Max: 1, Features: map[string]Levels{"entry": {1, 1}}, Nonce: nonce(1)}))}
	out = append(out, k.message(stepChallenge, nonce(2)))
	out = append(out, k.message(stepProof, k.proof("dialer")))
	out = append(out, k.message(stepWelcome, j(welcome{Cluster: "c", Server: "1.aa", Founders: []string{"1.aa", "2.bb"}, Clock: 1234, Version: 1, Features: map[string]Levels{"entry": {1, 1}}})))
	out = append(out, k.message(stepProof, k.proof("listener")))
	k = &talk{key: []byte("secret")}
	out = append(out, k.message(stepRefusal, j(welcome{Error: "this is not 1.old"})))
	return append(out, k.message(stepDenied, nil))
}

// golden compares bytes with a file.
func golden(t *testing.T, name string, b []byte) {
	t.Helper()
	path := "testdata/" + name + ".hex"
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, []byte(hex.Dump(b)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), hex.Dump(b)); d != "" {
		t.Errorf("%s: %s", name, d)
	}
}

// The bytes of a handshake are fixed.
func TestGoldenHandshake(t *testing.T) {
	names := []string{"hello", "challenge", "proof_dialer", "welcome", "proof_listener", "refusal", "denied"}
	for i, b := range conversation(t) {
		golden(t, names[i], b)
		if s, got, err := readStep(bytes.NewReader(b)); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%s: read as type %d, %d bytes of %d: %v", names[i], s, len(got), len(b), err)
		}
	}
}

// script is a connection on which the other side has said all it will say.
type script struct {
	net.Conn
	r io.Reader
	w bytes.Buffer
}

func (s *script) Read(b []byte) (int, error)    { return s.r.Read(b) }
func (s *script) Write(b []byte) (int, error)   { return s.w.Write(b) }
func (*script) SetDeadline(time.Time) error     { return nil }
func (*script) SetReadDeadline(time.Time) error { return nil }
func (*script) RemoteAddr() net.Addr            { return &net.TCPAddr{} }

// Whatever is said in a handshake, neither side believes it: the nonces are new each time.
func FuzzHello(f *testing.F) {
	c := conversation(f)
	f.Add(bytes.Join(append([][]byte{c[0]}, c[2]), nil))
	f.Add(bytes.Join(append([][]byte{c[1]}, c[3], c[4]), nil))
	f.Add(append(c[1], c[5]...))
	f.Add(c[6])
	p, err := New(secretConfig("1.aa"))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = p.Close() })
	f.Fuzz(func(t *testing.T, b []byte) {
		x := &script{r: bytes.NewReader(b)}
		if from, _, err := p.receive(x); err == nil {
			t.Errorf("%s was believed", from)
		}
		if n := x.w.Len(); n > 2*helloHead+nonceBytes {
			t.Errorf("a stranger was told %d bytes", n)
		}
		if err := p.introduce(&script{r: bytes.NewReader(b)}, "2.bb", classBulk); err == nil {
			t.Error("a listener was believed")
		}
	})
}
