package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Voters prove who they are by a secret or by certificates, whole and not both; a node does not start with files that prove nothing.
func TestPeerCertificates(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"cert", "key", "ca", "secret"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(strings.Repeat("no PEM ", 10)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("ESTRAN_STORAGE_URL", "mem://")
	args := []string{"serve", "--kafka-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"}
	for _, c := range []struct {
		set  []string
		want []string
	}{
		{[]string{"CERT"}, []string{"E_CONFIG_VALUE", "quorum.tls.key_file", "quorum.tls.ca_file"}},
		{[]string{"KEY", "CA"}, []string{"E_CONFIG_VALUE", "quorum.tls.cert_file"}},
		{[]string{"CERT", "KEY", "CA", "SECRET"}, []string{"E_CONFIG_VALUE", "not by both"}},
		{[]string{"CERT", "KEY", "CA"}, []string{"E_PEER_CERTIFICATE", "node-1"}},
	} {
		t.Run(strings.Join(c.set, "-"), func(t *testing.T) {
			for _, s := range c.set {
				key := "ESTRAN_QUORUM_TLS_" + s + "_FILE"
				if s == "SECRET" {
					key = "ESTRAN_QUORUM_SECRET_FILE"
				}
				t.Setenv(key, filepath.Join(dir, strings.ToLower(s)))
			}
			code, _, errOut := cli(t, "", append(slices.Clone(args), "--data-dir", t.TempDir())...)
			if code == 0 {
				t.Error("exit 0")
			}
			for _, w := range c.want {
				if !strings.Contains(errOut, w) {
					t.Errorf("the message lacks %q:\n%s", w, errOut)
				}
			}
		})
	}
}
