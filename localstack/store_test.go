package localstack

import (
	"context"
	"strings"
	"testing"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/objtest"
	"github.com/estran/estran/objstore/open"
)

// TestStores runs the contract of every Bucket: in memory, in a directory, and through both SDKs against real stores, over HTTP and HTTPS.
func TestStores(t *testing.T) {
	t.Run("mem", func(t *testing.T) { objtest.Run(t, bucket("mem://")) })
	t.Run("file", func(t *testing.T) { objtest.Run(t, bucket("file://"+t.TempDir())) })
	if testing.Short() {
		t.Skip("real stores are left out with -short")
	}
	for _, store := range []struct {
		name  string
		start func(context.Context, string, bool) (*Store, error)
	}{{"minio", StartMinIO}, {"versitygw", StartVersityGW}} {
		for _, tls := range []bool{false, true} {
			name := store.name + "/http"
			if tls {
				name += "s"
			}
			t.Run(name, func(t *testing.T) {
				s, err := store.start(t.Context(), t.TempDir(), tls)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = s.Kill() })
				credentials(t, s)
				for _, sdk := range []string{"aws", "s3compatible"} {
					t.Run(sdk, func(t *testing.T) {
						objtest.Run(t, bucket(s.URL("contract-"+sdk)+"&provider="+sdk))
					})
				}
			})
		}
	}
}

func bucket(url string) func(*testing.T) objstore.Bucket {
	return func(t *testing.T) objstore.Bucket {
		b, err := open.Bucket(t.Context(), url, objstore.Policy{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = b.Close() })
		if c, ok := b.(objstore.Creator); ok {
			ctx, cancel := context.WithTimeout(t.Context(), waitMost)
			defer cancel()
			if err := c.CreateBucket(ctx); err != nil {
				t.Fatal(err)
			}
			if err := c.CreateBucket(ctx); err != nil {
				t.Errorf("creating a bucket that exists: %v", err)
			}
		}
		return b
	}
}

// credentials gives this process what a client of the store needs.
func credentials(t *testing.T, s *Store) {
	for _, kv := range s.Env() {
		k, v, _ := strings.Cut(kv, "=")
		t.Setenv(k, v)
	}
}
