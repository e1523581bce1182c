package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/estran/estran/localstack"
)

// cli runs the program in this process.
func cli(t *testing.T, stdin string, args ...string) (code int, out, errOut string) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(args, strings.NewReader(stdin), &o, &e)
	return code, o.String(), e.String()
}

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Every fault of a configuration has one clear error: what, where from, what to do, a code.
func TestConfigurationErrors(t *testing.T) {
	for _, c := range []struct {
		name, yaml string
		env        map[string]string
		want       []string
	}{
		{"unknown key", "version: 1\nstorage:\n  buket_url: s3://orders\n", nil, []string{`estran.yaml:3:3: unknown key "storage.buket_url"`, "E_CONFIG_UNKNOWN_KEY", "buket_url: s3://orders"}},
		{"misspelt key", "tiering:\n  seal_byte: 1MiB\n", nil, []string{`did you mean "tiering.seal_bytes"?`}},
		{"unknown kafka key", "kafka:\n  num.partition: 3\n", nil, []string{`unknown key "kafka.num.partition"`, `did you mean "kafka.num.partitions"?`}},
		{"bad kafka value", "kafka:\n  num.partitions: many\n", nil, []string{`kafka.num.partitions: "many" is not a whole number`}},
		{"bad size", "hot: {max_bytes: lots}\n", nil, []string{`"lots" is not a size`}},
		{"too small", "hot: {max_bytes: 1MiB}\n", nil, []string{"hot.max_bytes: 1.0 MiB is below 64 MiB", "ESTRAN_HOT_MAX_BYTES"}},
		{"not implemented", "durability: none\n", nil, []string{`"none" is not implemented: only fsync is`}},
		{"two at once", "node: {id: 0}\nlog: {level: loud}\n", nil, []string{"node.id: 0", `log.level: "loud"`}},
		{"unknown variable", "", map[string]string{"ESTRAN_STORAGE_URI": "x"}, []string{"unknown environment variable ESTRAN_STORAGE_URI", "did you mean ESTRAN_STORAGE_URL?", "E_CONFIG_UNKNOWN_ENV"}},
		{"bad variable", "", map[string]string{"ESTRAN_TIERING_SEAL_AGE": "soon"}, []string{"tiering.seal_age (from ESTRAN_TIERING_SEAL_AGE)", `"soon" is not a duration`}},
		{"newer version", "version: 2\n", nil, []string{"version: 2 is not a version that this program reads"}},
		{"not YAML", "node: [\n", nil, []string{"E_CONFIG_SYNTAX"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for k, v := range c.env {
				t.Setenv(k, v)
			}
			code, _, errOut := cli(t, "", "config", "check", "--config", write(t, "estran.yaml", c.yaml))
			if code != exitUsage {
				t.Errorf("exit %d, want %d", code, exitUsage)
			}
			for _, w := range append(c.want, "error: ", "fix: ", "code: ") {
				if !strings.Contains(errOut, w) {
					t.Errorf("the message lacks %q:\n%s", w, errOut)
				}
			}
		})
	}
	for _, empty := range []string{"", "# nothing\n"} {
		if code, _, errOut := cli(t, "", "config", "check", "-c", write(t, "estran.yaml", empty)); code != 0 {
			t.Errorf("an empty configuration: %d %s", code, errOut)
		}
	}
	good := "version: 1\nnode: {id: 3, rack: az-a}\nstorage: {url: 's3://bkt?region=eu-central-1'}\nhot: {max_bytes: 2GiB}\ntiering: {seal_age: 30s}\nkafka: {num.partitions: 6, auto.create.topics.enable: true}\n"
	if code, out, errOut := cli(t, "", "config", "check", "-c", write(t, "estran.yaml", good)); code != 0 || !strings.Contains(out, "ok") {
		t.Errorf("a good configuration: %d %s", code, errOut)
	}
}

// Order of precedence: defaults, file, KAFKA_*, ESTRAN_*, flags.
func TestPrecedence(t *testing.T) {
	file := write(t, "estran.yaml", "node: {id: 2}\nhot: {max_bytes: 1GiB}\nlisteners: {http: {listen: '127.0.0.1:1'}}\nkafka: {num.partitions: 2, log.retention.ms: 5}\n")
	t.Setenv("ESTRAN_HOT_MAX_BYTES", "2GiB")
	t.Setenv("ESTRAN_LISTENERS_HTTP_LISTEN", "127.0.0.1:2")
	t.Setenv("KAFKA_NUM_PARTITIONS", "7")
	c, err := loadConfig(file, map[string]string{"http-listen": "127.0.0.1:3"})
	if err != nil {
		t.Fatal(err)
	}
	b, _ := c.brokerConfig()
	if c.Node.ID != 2 || c.Hot.MaxBytes != 2<<30 || c.Listeners.HTTP.Listen != "127.0.0.1:3" || b.NumPartitions != 7 || b.RetentionMs != 5 || c.Quorum.Shards != 3 {
		t.Errorf("%+v %+v", c, b)
	}
	for key, want := range map[string]string{"node.id": file, "hot.max_bytes": "ESTRAN_HOT_MAX_BYTES", "listeners.http.listen": "--http-listen", "quorum.shards": "default"} {
		if got := c.from(key); got != want {
			t.Errorf("%s comes from %q, want %q", key, got, want)
		}
	}
}

func TestNoTwoKeysShareAVariable(t *testing.T) {
	seen := map[string]string{}
	c := defaultConfig()
	for _, s := range settingsOf(&c) {
		if old := seen[envName(s.key)]; old != "" {
			t.Errorf("%s and %s are both %s", old, s.key, envName(s.key))
		}
		seen[envName(s.key)] = s.key
	}
}

// What a start can meet: a port in use, a directory that is foreign, unwritable or not one, a wrong storage URL.
func TestStartErrors(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	foreign := t.TempDir()
	if err := os.WriteFile(filepath.Join(foreign, "thesis.doc"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := write(t, "file", "x")
	free := []string{"--kafka-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"}
	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"port in use", []string{"--kafka-listen", l.Addr().String(), "--http-listen", "127.0.0.1:0", "--data-dir", t.TempDir()}, []string{"E_LISTEN_IN_USE", "--kafka-listen", "held by:"}},
		{"foreign directory", append(free, "--data-dir", foreign), []string{"E_DATA_DIR_FOREIGN", "thesis.doc"}},
		{"directory is a file", append(free, "--data-dir", file, "--storage", "mem://"), []string{"E_DATA_DIR", "--data-dir"}},
		{"no such scheme", append(free, "--data-dir", t.TempDir(), "--storage", "ftp://x"), []string{"E_STORE", "begins with s3://"}},
		{"unknown parameter", append(free, "--data-dir", t.TempDir(), "--storage", "s3://bkt?regoin=x"), []string{`unknown parameter "regoin"`}},
		{"credentials in the URL", append(free, "--data-dir", t.TempDir(), "--storage", "s3://key:secret@b/p"), []string{"credentials", "***"}},
		{"store that is not there", append(free, "--data-dir", t.TempDir(), "--storage", "s3://bkt?endpoint=http://127.0.0.1:1&path_style=true"), []string{"E_STORE_UNREACHABLE"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("AWS_ACCESS_KEY_ID", "x")
			t.Setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
			code, _, errOut := cli(t, "", append([]string{"dev"}, c.args...)...)
			if code == 0 {
				t.Error("exit 0")
			}
			for _, w := range c.want {
				if !strings.Contains(errOut, w) {
					t.Errorf("the message lacks %q:\n%s", w, errOut)
				}
			}
			if strings.Contains(errOut, "secret@") || strings.Contains(errOut, "canary-secret") {
				t.Errorf("a secret is shown:\n%s", errOut)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(foreign, "node.json")); err == nil {
		t.Error("a foreign directory was written to")
	}
}

func TestUsageErrors(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"topic", "lst"}, `did you mean "list"?`},
		{[]string{"topic", "create"}, "requires at least 1 arg"},
		{[]string{"serve", "--no-such-flag"}, "unknown flag"},
		{[]string{"topic", "delete", "t"}, "--yes"},
		{[]string{"topic", "consume", "t", "--from", "never"}, "--from"},
		{[]string{"topic", "list", "-o", "xml"}, "table or json"},
		{[]string{"segment", "dump", "/nothing/here"}, "cannot open"},
	} {
		code, _, errOut := cli(t, "", c.args...)
		if code == 0 || !strings.Contains(errOut, c.want) || !strings.Contains(errOut, "code: ") {
			t.Errorf("%v: exit %d, %q lacks %q", c.args, code, errOut, c.want)
		}
	}
	if code, out, _ := cli(t, "", "version"); code != 0 || !strings.Contains(out, "estran ") || strings.Contains(out, "unknown") {
		t.Errorf("version: %d %q", code, out)
	}
	if code, _, errOut := cli(t, "", "cluster", "health", "--http", "127.0.0.1:1"); code != exitNotReady || !strings.Contains(errOut, "E_NODE_UNREACHABLE") {
		t.Errorf("health without a node: %d %q", code, errOut)
	}
	if code, _, errOut := cli(t, "", "topic", "list", "-b", "127.0.0.1:1", "--timeout", "300ms"); code != exitNotReady || !strings.Contains(errOut, "E_BROKER_UNREACHABLE") {
		t.Errorf("list without a broker: %d %q", code, errOut)
	}
}

// What a store may say at the start: one clear error each, with the cure, through both SDKs.
func TestStoreRefusals(t *testing.T) {
	for _, c := range []struct {
		name string
		step localstack.Step
		want []string
	}{
		{"no bucket", localstack.Step{Status: 404, Code: "NoSuchBucket"}, []string{"E_S3_NO_BUCKET", "doctor --create-bucket"}},
		{"wrong region", localstack.Step{Status: 301, Code: "PermanentRedirect"}, []string{"E_S3_REGION", "region="}},
		{"unknown key", localstack.Step{Status: 403, Code: "InvalidAccessKeyId"}, []string{"E_S3_CREDENTIALS", "AWS_ACCESS_KEY_ID"}},
		{"wrong secret", localstack.Step{Status: 403, Code: "SignatureDoesNotMatch"}, []string{"E_S3_ACCESS", "secret key"}},
		{"other clock", localstack.Step{Status: 403, Code: "RequestTimeTooSkewed"}, []string{"E_S3_ACCESS", "clock"}},
		{"denied", localstack.Step{Status: 403, Code: "AccessDenied"}, []string{"E_S3_ACCESS", "allow get, put"}},
		{"no conditions", localstack.Step{Op: "put", Status: 501, Code: "NotImplemented"}, []string{"E_STORE_UNSUPPORTED", "If-None-Match"}},
		{"does not answer", localstack.Step{Reset: true}, []string{"E_STORE_UNREACHABLE", "endpoint"}},
	} {
		for _, sdk := range []string{"aws", "s3compatible"} {
			t.Run(c.name+"/"+sdk, func(t *testing.T) {
				d := localstack.NewDouble()
				defer d.Close()
				d.Script(c.step)
				for _, kv := range d.Env() {
					k, v, _ := strings.Cut(kv, "=")
					t.Setenv(k, v)
				}
				code, _, errOut := cli(t, "", "serve", "--kafka-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0", "--data-dir", t.TempDir(),
					"--storage", d.URL("bucket")+"&provider="+sdk)
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
}

// The secret of a quorum is made once and read by all; one that is too short is refused.
func TestCreateSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	t.Setenv("ESTRAN_QUORUM_SECRET_FILE", path)
	t.Setenv("ESTRAN_STORAGE_URL", "mem://")
	t.Setenv("ESTRAN_NODE_DATA_DIR", t.TempDir())
	var first []byte
	for range 2 {
		if code, out, errOut := cli(t, "", "doctor", "--create-secret"); code != 0 || !strings.Contains(out, "secret exists") {
			t.Fatalf("exit %d: %s%s", code, out, errOut)
		}
		b, err := os.ReadFile(path)
		if err != nil || len(b) < 50 || first != nil && !bytes.Equal(b, first) {
			t.Fatalf("%q %v, before %q", b, err, first)
		}
		first = b
	}
	if i, err := os.Stat(path); err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", i.Mode(), err)
	}
	if err := os.WriteFile(path, []byte("short\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"serve", "--kafka-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0", "--data-dir", t.TempDir()}
	if code, _, errOut := cli(t, "", args...); code == 0 || !strings.Contains(errOut, "E_QUORUM_SECRET") {
		t.Errorf("exit %d: %s", code, errOut)
	}
	t.Setenv("ESTRAN_QUORUM_SECRET_FILE", "")
	open := append(slices.Clone(args), "--peer-listen", "0.0.0.0:0")
	if code, _, errOut := cli(t, "", open...); code == 0 || !strings.Contains(errOut, "E_PEER_OPEN") {
		t.Errorf("a peer listener for everybody: exit %d: %s", code, errOut)
	}
}
