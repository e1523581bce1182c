// Package localstack starts what Estran runs on and with, as processes of this machine, for tests and `estran demo`: object stores and Estran itself. It knows Estran only
// from outside.
package localstack

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// Store is an object store that runs as a process.
type Store struct {
	Endpoint  string // http://127.0.0.1:PORT or https://
	AccessKey string
	SecretKey string
	CertFile  string // of HTTPS; "" otherwise

	name string
	args []string
	env  []string
	dir  string
	port int
	path string // of the health check
	cmd  *exec.Cmd
	out  *os.File
	done chan struct{}
}

// The programs, as Go modules. MinIO's last release that can be built is unmaintained: a test double for loopback, never a production store.
var programs = map[string]string{
	"minio":     "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c",
	"versitygw": "github.com/versity/versitygw/cmd/versitygw@v1.8.0",
}

// Program returns the path of a store's program. It is built from its Go module on first use, which takes minutes, and kept in $ESTRAN_BIN_CACHE or the user's cache
// directory.
func Program(ctx context.Context, name string) (string, error) {
	dir := os.Getenv("ESTRAN_BIN_CACHE")
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("localstack: %w", err)
		}
		dir = filepath.Join(base, "estran", "bin")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("localstack: %w", err)
	}
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", fmt.Errorf("localstack: %w", err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil { // another test process may be building it
		return "", fmt.Errorf("localstack: %w", err)
	}
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	fmt.Fprintf(os.Stderr, "localstack: building %s from %s, this takes minutes and is done once\n", name, programs[name])
	tmp, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return "", fmt.Errorf("localstack: %w", err)
	}
	defer os.RemoveAll(tmp)
	cmd := exec.CommandContext(ctx, "go", "install", "-trimpath", "-ldflags", "-s -w", programs[name])
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOBIN="+tmp, "GOFLAGS=", "GOWORK=off")
	cmd.Dir = tmp
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("localstack: building %s: %w\n%s", name, err, out[max(0, len(out)-2000):])
	}
	return path, os.Rename(filepath.Join(tmp, name), path)
}

const (
	accessKey = "estran-test"
	secretKey = "estran-test-secret"
)

// StartMinIO starts MinIO with its data below dir and returns when it is ready.
func StartMinIO(ctx context.Context, dir string, tls bool) (*Store, error) {
	s := &Store{name: "minio", dir: dir, path: "/minio/health/ready", AccessKey: accessKey, SecretKey: secretKey}
	s.env = []string{"MINIO_ROOT_USER=" + accessKey, "MINIO_ROOT_PASSWORD=" + secretKey, "MINIO_BROWSER=off", "MINIO_UPDATE=off", "MINIO_CALLHOME_ENABLE=off"}
	var err error
	if s.port, err = freePort(); err != nil {
		return nil, err
	}
	s.args = []string{"server", "--address", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)), "--certs-dir", filepath.Join(dir, "certs"), filepath.Join(dir, "data")}
	if err := s.scheme(tls, filepath.Join(dir, "certs", "public.crt"), filepath.Join(dir, "certs", "private.key")); err != nil {
		return nil, err
	}
	return s, s.Start(ctx)
}

// StartVersityGW starts versitygw over a directory and returns when it is ready.
func StartVersityGW(ctx context.Context, dir string, tls bool) (*Store, error) {
	s := &Store{name: "versitygw", dir: dir, path: "/health", AccessKey: accessKey, SecretKey: secretKey}
	s.env = []string{"ROOT_ACCESS_KEY=" + accessKey, "ROOT_SECRET_KEY=" + secretKey}
	var err error
	if s.port, err = freePort(); err != nil {
		return nil, err
	}
	s.args = []string{"--port", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)), "--health", "/health", "--region", "us-east-1"}
	if tls {
		s.args = append(s.args, "--cert", filepath.Join(dir, "c.crt"), "--key", filepath.Join(dir, "c.key"))
	}
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "data"), 0o755), os.MkdirAll(filepath.Join(dir, "meta"), 0o755)); err != nil {
		return nil, err
	}
	s.args = append(s.args, "posix", "--sidecar", filepath.Join(dir, "meta"), filepath.Join(dir, "data"))
	if err := s.scheme(tls, filepath.Join(dir, "c.crt"), filepath.Join(dir, "c.key")); err != nil {
		return nil, err
	}
	return s, s.Start(ctx)
}

func (s *Store) scheme(tls bool, cert, key string) error {
	s.Endpoint = fmt.Sprintf("http://127.0.0.1:%d", s.port)
	if !tls {
		return nil
	}
	s.Endpoint, s.CertFile = fmt.Sprintf("https://127.0.0.1:%d", s.port), cert
	return selfSigned(cert, key)
}

// URL is the storage URL of a bucket in this store.
func (s *Store) URL(bucket string) string {
	return fmt.Sprintf("s3://%s?endpoint=%s&path_style=true&region=us-east-1", bucket, s.Endpoint)
}

// Env are the variables that a client of the store needs.
func (s *Store) Env() []string {
	env := []string{"AWS_ACCESS_KEY_ID=" + s.AccessKey, "AWS_SECRET_ACCESS_KEY=" + s.SecretKey}
	if s.CertFile != "" {
		env = append(env, "SSL_CERT_FILE="+s.CertFile, "AWS_CA_BUNDLE="+s.CertFile)
	}
	return env
}

// Start starts the process again after Stop or Kill, on the same port with the same data.
func (s *Store) Start(ctx context.Context) error {
	program, err := Program(ctx, s.name)
	if err != nil {
		return err
	}
	if s.out, err = os.OpenFile(filepath.Join(s.dir, s.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	s.cmd = exec.Command(program, s.args...)
	s.cmd.Env = append(os.Environ(), s.env...)
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	if err := errors.Join(s.cmd.Start(), s.out.Close()); err != nil { // the process has the log open itself
		return fmt.Errorf("localstack: starting %s: %w", s.name, err)
	}
	s.done = make(chan struct{})
	go func(c *exec.Cmd, done chan struct{}) { _ = c.Wait(); close(done) }(s.cmd, s.done)
	return s.ready(ctx)
}

func (s *Store) ready(ctx context.Context) error {
	client := &http.Client{Timeout: time.Second, Transport: insecure()}
	defer client.CloseIdleConnections()
	ask := func(path string) int {
		resp, err := client.Get(s.Endpoint + path)
		if err != nil {
			return 0
		}
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		if ask(s.path) == http.StatusOK {
			if api := ask("/"); api != 0 && api != http.StatusServiceUnavailable { // MinIO may be healthy and "not initialized yet"
				return nil
			}
		}
		select {
		case <-s.done:
			log, _ := os.ReadFile(s.out.Name())
			return fmt.Errorf("localstack: %s ended at once:\n%s", s.name, log[max(0, len(log)-2000):])
		case <-ctx.Done():
			return errors.Join(ctx.Err(), s.Kill())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return errors.Join(fmt.Errorf("localstack: %s is not ready after 30 s", s.name), s.Kill())
}

// Kill ends the process at once and waits for it.
func (s *Store) Kill() error { return s.end(syscall.SIGKILL) }

// Stop ends the process and waits for it.
func (s *Store) Stop() error { return s.end(syscall.SIGTERM) }

func (s *Store) end(sig syscall.Signal) error {
	return endProcess(s.cmd, s.done, sig, 10*time.Second)
}

// endProcess sends sig and waits until the process is gone, which done tells. One that takes longer than limit is killed, and that is an error.
func endProcess(cmd *exec.Cmd, done <-chan struct{}, sig syscall.Signal, limit time.Duration) error {
	select {
	case <-done:
		return nil
	default:
	}
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-done:
		return nil
	case <-time.After(limit):
		_ = cmd.Process.Kill() // it may just have ended
		<-done
		return fmt.Errorf("localstack: %s did not end within %s", filepath.Base(cmd.Path), limit)
	}
}

// selfSigned writes a certificate for 127.0.0.1.
func selfSigned(certFile, keyFile string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localstack"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return err
	}
	pk, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	var c, k bytes.Buffer
	if err := errors.Join(pem.Encode(&c, &pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.Encode(&k, &pem.Block{Type: "EC PRIVATE KEY", Bytes: pk}),
		os.MkdirAll(filepath.Dir(certFile), 0o755)); err != nil {
		return err
	}
	return errors.Join(os.WriteFile(certFile, c.Bytes(), 0o600), os.WriteFile(keyFile, k.Bytes(), 0o600))
}

// Supported reports whether the stores can run here.
func Supported() bool { return runtime.GOOS == "linux" || runtime.GOOS == "darwin" }
