// Package open makes the Bucket that a storage URL names, with the retrier above it.
package open

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/fs"
	"github.com/estran/estran/objstore/mem"
	"github.com/estran/estran/objstore/minio"
	"github.com/estran/estran/objstore/s3"
)

// connections is how many are kept to a store.
const connections = 64

// Bucket opens the bucket of a storage URL. It is not probed. The caller closes it.
func Bucket(ctx context.Context, url string, p objstore.Policy, m *objstore.Metrics) (objstore.Bucket, error) {
	l, err := objstore.ParseURL(url)
	if err != nil {
		return nil, err
	}
	var b objstore.Bucket
	switch {
	case l.Scheme == "mem":
		b = mem.New()
	case l.Scheme == "file":
		b, err = fs.Open(l.Dir)
	case l.Provider == "aws":
		b, err = s3.Open(ctx, l, connections)
	default:
		var tr *http.Transport
		if tr, err = transport(); err == nil {
			b, err = minio.Open(l, tr)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("storage %s: %w", objstore.Redact(url), err)
	}
	return objstore.Prefixed(objstore.Retry(b, p, m), l.Prefix), nil
}

// transport trusts the system's certificates, and those of AWS_CA_BUNDLE as the AWS SDK does.
func transport() (*http.Transport, error) {
	t := &http.Transport{Proxy: http.ProxyFromEnvironment, DialContext: (&net.Dialer{Timeout: 2 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout: 3 * time.Second, MaxIdleConns: connections, MaxIdleConnsPerHost: connections, IdleConnTimeout: 60 * time.Second,
		WriteBufferSize: 64 << 10, ReadBufferSize: 64 << 10, DisableCompression: true}
	file := os.Getenv("AWS_CA_BUNDLE")
	if file == "" {
		return t, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("AWS_CA_BUNDLE: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("AWS_CA_BUNDLE: %s holds no certificate", file)
	}
	t.TLSClientConfig = &tls.Config{RootCAs: pool}
	return t, nil
}
