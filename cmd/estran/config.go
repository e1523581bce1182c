package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/goccy/go-yaml"

	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/peer"
)

// byteSize is a size in bytes; in YAML and in the environment it is written as 8GiB, 64MiB or a plain number.
type byteSize int64

// UnmarshalYAML accepts a number of bytes or a number with a unit.
func (b *byteSize) UnmarshalYAML(raw []byte) error {
	n, err := parseSize(unquote(raw))
	*b = byteSize(n)
	return err
}

func parseSize(s string) (int64, error) {
	n, err := humanize.ParseBytes(s)
	if err != nil || n > 1<<62 {
		return 0, fmt.Errorf("%q is not a size: write it like 64MiB or 8GiB", s)
	}
	return int64(n), nil
}

// duration is written as 30s, 10m or 1h.
type duration time.Duration

// UnmarshalYAML accepts Go's duration syntax.
func (d *duration) UnmarshalYAML(raw []byte) error {
	v, err := time.ParseDuration(unquote(raw))
	if err != nil {
		return fmt.Errorf("%q is not a duration: write it like 30s or 10m", unquote(raw))
	}
	*d = duration(v)
	return nil
}

func unquote(raw []byte) string { return strings.Trim(strings.TrimSpace(string(raw)), `"'`) }

// config is the whole configuration of a voter. Every key is implemented; what is not implemented is not a key.
type config struct {
	Version    int    `yaml:"version"`
	Durability string `yaml:"durability"`
	Node       struct {
		ID      int32  `yaml:"id"`
		Rack    string `yaml:"rack"`
		DataDir string `yaml:"data_dir"`
	} `yaml:"node"`
	Listeners struct {
		Kafka struct {
			Listen    string `yaml:"listen"`
			Advertise string `yaml:"advertise"`
		} `yaml:"kafka"`
		HTTP struct {
			Listen string `yaml:"listen"`
		} `yaml:"http"`
		Peer struct {
			Listen    string `yaml:"listen"`
			Advertise string `yaml:"advertise"`
		} `yaml:"peer"`
	} `yaml:"listeners"`
	Quorum struct {
		Voters     []string `yaml:"voters"`
		SecretFile string   `yaml:"secret_file"`
		Shards     int      `yaml:"shards"`
		TLS        struct {
			CertFile string `yaml:"cert_file"`
			KeyFile  string `yaml:"key_file"`
			CAFile   string `yaml:"ca_file"`
		} `yaml:"tls"`
	} `yaml:"quorum"`
	Storage struct {
		URL string `yaml:"url"`
	} `yaml:"storage"`
	Hot struct {
		MaxBytes byteSize `yaml:"max_bytes"`
	} `yaml:"hot"`
	Tiering struct {
		SealBytes           byteSize `yaml:"seal_bytes"`
		SealAge             duration `yaml:"seal_age"`
		UploadConcurrency   int      `yaml:"upload_concurrency"`
		LocalRetentionBytes byteSize `yaml:"local_retention_bytes"`
		CacheBytes          byteSize `yaml:"cache_bytes"`
		DeleteGrace         duration `yaml:"delete_grace"`
		PrepareTTL          duration `yaml:"prepare_ttl"`
	} `yaml:"tiering"`
	Shutdown struct {
		DrainTimeout duration `yaml:"drain_timeout"`
	} `yaml:"shutdown"`
	Log struct {
		Level  string `yaml:"level"`
		Format string `yaml:"format"`
	} `yaml:"log"`
	Kafka map[string]any `yaml:"kafka"`

	// origin says where a key's value came from: "default", "estran.yaml:5:3", "ESTRAN_STORAGE_URL", "--kafka-listen".
	origin map[string]string
	// fenceEvery is how often a node looks whether the cluster goes on without it. Only tests change it.
	fenceEvery time.Duration
}

func defaultConfig() config {
	var c config
	c.Version, c.Durability = 1, "fsync"
	c.Node.ID, c.Node.DataDir = 1, "./estran-data"
	c.Listeners.Kafka.Listen = "0.0.0.0:9092"
	c.Listeners.HTTP.Listen = "127.0.0.1:9096"
	c.Listeners.Peer.Listen = "127.0.0.1:9093"
	c.Quorum.Shards = 3
	c.Hot.MaxBytes = 8 << 30
	c.Tiering.SealBytes, c.Tiering.SealAge = 64<<20, duration(60*time.Second)
	c.Tiering.UploadConcurrency, c.Tiering.LocalRetentionBytes = 3, 2<<30
	c.Tiering.CacheBytes = 48 << 20
	c.Tiering.DeleteGrace, c.Tiering.PrepareTTL = duration(time.Hour), duration(time.Hour)
	c.Shutdown.DrainTimeout = duration(30 * time.Second)
	c.Log.Level, c.Log.Format = "info", "auto"
	c.Kafka = map[string]any{}
	c.origin = map[string]string{}
	c.fenceEvery = 30 * time.Second
	return c
}

// from names the source of a key's value, for error messages.
func (c *config) from(key string) string {
	if o := c.origin[key]; o != "" {
		return o
	}
	return "default"
}

// loadFile overlays a YAML file. Unknown keys are refused with a suggestion.
func (c *config) loadFile(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return &fault{Code: "E_CONFIG_READ", Exit: exitUsage, Err: err, What: fmt.Sprintf("cannot read configuration %s: %v", path, cause(err)),
			Fix: "give an existing file to --config"}
	}
	return c.overlay(path, data)
}

// overlay takes what a file with this name holds.
func (c *config) overlay(path string, data []byte) error {
	before := *c
	dec := yaml.NewDecoder(strings.NewReader(string(data)), yaml.Strict(), yaml.AllowDuplicateMapKey())
	if err := dec.Decode(c); errors.Is(err, io.EOF) { // nothing in it, or comments only
		*c = before
		return nil
	} else if err != nil {
		return yamlFault(path, err)
	}
	if c.Kafka == nil {
		c.Kafka = map[string]any{}
	}
	now := settingsOf(c)
	for i, s := range settingsOf(&before) { // the same ones in the same order
		if !reflect.DeepEqual(now[i].value.Interface(), s.value.Interface()) {
			c.origin[s.key] = path
		}
	}
	for k := range c.Kafka {
		c.origin["kafka."+k] = path
	}
	return nil
}

func yamlFault(path string, err error) error {
	f := &fault{Code: "E_CONFIG_SYNTAX", Exit: exitUsage, Err: err, Fix: "correct the line shown"}
	line, col, msg := 0, 0, err.Error()
	if e, ok := errors.AsType[yaml.Error](err); ok {
		msg = e.GetMessage()
		if tk := e.GetToken(); tk != nil && tk.Position != nil {
			line, col = tk.Position.Line, tk.Position.Column
		}
		f.Excerpt = excerptOf(yaml.FormatError(err, false, true))
	}
	f.What = fmt.Sprintf("%s:%d:%d: %s", path, line, col, msg)
	if e, ok := errors.AsType[*yaml.UnknownFieldError](err); ok {
		f.Code = "E_CONFIG_UNKNOWN_KEY"
		name := e.Token.Value
		full := name
		if p := parentKey(e); p != "" {
			full = p + "." + name
		}
		f.What = fmt.Sprintf("%s:%d:%d: unknown key %q", path, line, col, full)
		f.Fix = "remove it, or see the keys in docs/CONFIGURATION.md"
		if near := nearest(full, knownKeys()); near != "" {
			f.Fix = fmt.Sprintf("did you mean %q?", near)
		}
	}
	return f
}

// parentKey finds the mapping that an unknown key stands in, by walking the tokens back to a key that is less indented.
func parentKey(e *yaml.UnknownFieldError) string {
	var path []string
	col := e.Token.Position.Column
	for tk := e.Token.Prev; tk != nil; tk = tk.Prev {
		if tk.Next != nil && tk.Next.Value == ":" && tk.Position.Column < col {
			path = append(path, tk.Value)
			col = tk.Position.Column
		}
	}
	slices.Reverse(path)
	return strings.Join(path, ".")
}

// excerptOf keeps only the source lines of goccy's message.
func excerptOf(msg string) string {
	var out []string
	for line := range strings.Lines(msg) {
		if t := strings.TrimLeft(line, " >"); t != "" && (t[0] == '^' || strings.Contains(line, " | ")) {
			out = append(out, "  "+strings.TrimRight(line, "\n"))
		}
	}
	return strings.Join(out, "\n")
}

// setting is one key of the configuration and the field that holds it.
type setting struct {
	key   string
	value reflect.Value
}

// settingsOf lists all scalar settings in the order of the struct.
func settingsOf(c *config) []setting {
	var out []setting
	var walk func(prefix string, v reflect.Value)
	walk = func(prefix string, v reflect.Value) {
		for i := range v.NumField() {
			name := v.Type().Field(i).Tag.Get("yaml")
			if name == "" || name == "kafka" && prefix == "" {
				continue
			}
			if f := v.Field(i); f.Kind() == reflect.Struct {
				walk(prefix+name+".", f)
			} else {
				out = append(out, setting{prefix + name, f})
			}
		}
	}
	walk("", reflect.ValueOf(c).Elem())
	return out
}

func knownKeys() []string {
	c := defaultConfig()
	var out []string
	for _, s := range settingsOf(&c) {
		out = append(out, s.key)
	}
	for _, k := range kafkaKeys {
		out = append(out, "kafka."+k.name)
	}
	return out
}

// envName is ESTRAN_STORAGE_URL for storage.url.
func envName(key string) string {
	return "ESTRAN_" + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// loadEnv overlays KAFKA_* (as the Apache image names them) and then ESTRAN_* variables. An unknown ESTRAN_* variable is an
// error: a misspelt setting must not be ignored.
func (c *config) loadEnv(environ []string) error {
	var errs []error
	byEnv := map[string]setting{}
	var names []string
	for _, s := range settingsOf(c) {
		byEnv[envName(s.key)] = s
		names = append(names, envName(s.key))
	}
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		if rest, ok := strings.CutPrefix(name, "KAFKA_"); ok {
			key := kafkaEnvKey(rest)
			if slices.ContainsFunc(kafkaKeys, func(k kafkaKey) bool { return k.name == key }) {
				c.Kafka[key] = value
				c.origin["kafka."+key] = name
			}
			continue
		}
		if !strings.HasPrefix(name, "ESTRAN_") || strings.HasPrefix(name, "ESTRAN_TEST_") || name == "ESTRAN_BIN_CACHE" {
			continue
		}
		s, ok := byEnv[name]
		if !ok {
			f := &fault{Code: "E_CONFIG_UNKNOWN_ENV", Exit: exitUsage, What: fmt.Sprintf("unknown environment variable %s", name), Fix: "unset it"}
			if near := nearest(name, names); near != "" {
				f.Fix = fmt.Sprintf("did you mean %s?", near)
			}
			errs = append(errs, f)
			continue
		}
		if err := c.set(s.key, value, name); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// kafkaEnvKey follows the Apache image: _ is a dot, __ an underscore, ___ a dash.
func kafkaEnvKey(s string) string {
	return strings.NewReplacer("___", "-", "__", "_", "_", ".").Replace(strings.ToLower(s))
}

// set assigns a key from text that came from origin (a flag or a variable).
func (c *config) set(key, value, origin string) error {
	for _, s := range settingsOf(c) {
		if s.key != key {
			continue
		}
		if err := setField(s.value, value); err != nil {
			return &fault{Code: "E_CONFIG_VALUE", Exit: exitUsage, What: fmt.Sprintf("%s (from %s): %v", key, origin, err), Fix: "correct " + origin}
		}
		c.origin[key] = origin
		return nil
	}
	return fmt.Errorf("no setting %q", key)
}

func setField(v reflect.Value, text string) error {
	switch p := v.Addr().Interface().(type) {
	case *byteSize:
		return p.UnmarshalYAML([]byte(text))
	case *duration:
		return p.UnmarshalYAML([]byte(text))
	case *string:
		*p = text
		return nil
	case *[]string:
		*p = nil
		for part := range strings.SplitSeq(text, ",") {
			if part = strings.TrimSpace(part); part != "" {
				*p = append(*p, part)
			}
		}
		return nil
	case *int:
		n, err := strconv.Atoi(text)
		*p = n
		return err
	case *int32:
		n, err := strconv.ParseInt(text, 10, 32)
		*p = int32(n)
		return err
	}
	return fmt.Errorf("setting of type %s cannot be set from text", v.Type())
}

// validate reports every fault of the configuration at once.
func (c *config) validate() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, &fault{Code: "E_CONFIG_VALUE", Exit: exitUsage,
			What: fmt.Sprintf("%s: %s (from %s)", key, fmt.Sprintf(format, args...), c.from(key)), Fix: "set " + key + " or " + envName(key)})
	}
	if c.Version != 1 {
		bad("version", "%d is not a version that this program reads; it reads 1", c.Version)
	}
	if c.Durability != "fsync" {
		bad("durability", "%q is not implemented: only fsync is", c.Durability)
	}
	if c.Node.ID < 1 || c.Node.ID > 999 {
		bad("node.id", "%d is not between 1 and 999", c.Node.ID)
	}
	if c.Node.DataDir == "" {
		bad("node.data_dir", "is empty")
	}
	if c.Quorum.Shards < 1 || c.Quorum.Shards > 64 {
		bad("quorum.shards", "%d is not between 1 and 64", c.Quorum.Shards)
	}
	if voters, err := c.voters(); err != nil {
		bad("quorum.voters", "%v", err)
	} else if len(voters) > 1 {
		if !slices.ContainsFunc(voters, func(v raftmeta.Voter) bool { return v.ID == c.Node.ID }) {
			bad("quorum.voters", "node %d (node.id) is not among them", c.Node.ID)
		}
		if c.Storage.URL == "" || strings.HasPrefix(c.Storage.URL, "mem:") {
			bad("storage.url", "several voters need a store that all of them reach: s3://… or, on one machine, file://…")
		}
	}
	if t := c.Quorum.TLS; t.CertFile != "" || t.KeyFile != "" || t.CAFile != "" {
		for _, f := range []struct{ key, path string }{{"quorum.tls.cert_file", t.CertFile}, {"quorum.tls.key_file", t.KeyFile}, {"quorum.tls.ca_file", t.CAFile}} {
			if f.path == "" {
				bad(f.key, "is empty: a certificate, its key and the CA's certificate go together")
			}
		}
		if c.Quorum.SecretFile != "" {
			bad("quorum.secret_file", "voters prove who they are by certificates (quorum.tls) or by a secret, not by both")
		}
	}
	for _, l := range []struct{ key, addr string }{{"listeners.kafka.listen", c.Listeners.Kafka.Listen},
		{"listeners.http.listen", c.Listeners.HTTP.Listen}, {"listeners.peer.listen", c.Listeners.Peer.Listen}} {
		if _, _, err := net.SplitHostPort(l.addr); err != nil {
			bad(l.key, "%q is not host:port", l.addr)
		}
	}
	for _, a := range []struct{ key, addr string }{{"listeners.kafka.advertise", c.Listeners.Kafka.Advertise}, {"listeners.peer.advertise", c.Listeners.Peer.Advertise}} {
		if host, _, err := net.SplitHostPort(a.addr); a.addr != "" && (err != nil || host == "") {
			bad(a.key, "%q is not host:port", a.addr)
		}
	}
	for _, m := range []struct {
		key      string
		v, least int64
	}{{"hot.max_bytes", int64(c.Hot.MaxBytes), 64 << 20}, {"tiering.seal_bytes", int64(c.Tiering.SealBytes), 1 << 16},
		{"tiering.cache_bytes", int64(c.Tiering.CacheBytes), 8 << 20}, {"tiering.local_retention_bytes", int64(c.Tiering.LocalRetentionBytes), 0}} {
		if m.v < m.least {
			bad(m.key, "%s is below %s", humanize.IBytes(uint64(max(m.v, 0))), humanize.IBytes(uint64(m.least)))
		}
	}
	if c.Tiering.SealBytes > 256<<20 {
		bad("tiering.seal_bytes", "%s is above 256 MiB, the largest object that is written with one request", humanize.IBytes(uint64(c.Tiering.SealBytes)))
	}
	if n := c.Tiering.UploadConcurrency; n < 1 || n > 64 {
		bad("tiering.upload_concurrency", "%d is not between 1 and 64", n)
	}
	for _, d := range []struct {
		key string
		v   duration
	}{{"tiering.seal_age", c.Tiering.SealAge}, {"shutdown.drain_timeout", c.Shutdown.DrainTimeout}, {"tiering.prepare_ttl", c.Tiering.PrepareTTL}} {
		if d.v <= 0 {
			bad(d.key, "%s is not above 0", time.Duration(d.v))
		}
	}
	if c.Tiering.DeleteGrace < 0 {
		bad("tiering.delete_grace", "%s is below 0", time.Duration(c.Tiering.DeleteGrace))
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.Log.Level) {
		bad("log.level", "%q is not debug, info, warn or error", c.Log.Level)
	}
	if !slices.Contains([]string{"auto", "text", "json"}, c.Log.Format) {
		bad("log.format", "%q is not auto, text or json", c.Log.Format)
	}
	errs = append(errs, c.validateKafka()...)
	return errors.Join(errs...)
}

// voters are the nodes of the quorum; none = this node alone.
func (c *config) voters() (out []raftmeta.Voter, err error) {
	for _, v := range c.Quorum.Voters {
		id, addr, ok := strings.Cut(v, "@")
		n, perr := strconv.ParseInt(id, 10, 32)
		_, _, aerr := net.SplitHostPort(addr)
		if !ok || perr != nil || n < 1 || aerr != nil {
			return nil, fmt.Errorf("%q is not ID@HOST:PORT", v)
		}
		if slices.ContainsFunc(out, func(o raftmeta.Voter) bool { return o.ID == int32(n) || o.Addr == addr }) {
			return nil, fmt.Errorf("%q is there twice", v)
		}
		out = append(out, raftmeta.Voter{ID: int32(n), Addr: addr})
	}
	return out, nil
}

// secret is what voters prove to one another; nil if none is configured.
func (c *config) secret() ([]byte, error) {
	if c.Quorum.SecretFile == "" {
		return nil, nil
	}
	b, err := os.ReadFile(c.Quorum.SecretFile)
	if err == nil && len(strings.TrimSpace(string(b))) < secretMin {
		err = fmt.Errorf("%s holds fewer than %d characters", c.Quorum.SecretFile, secretMin)
	}
	if err != nil {
		return nil, &fault{Code: "E_QUORUM_SECRET", Exit: exitUsage, Err: err, What: fmt.Sprintf("quorum.secret_file (from %s): %v", c.from("quorum.secret_file"), err),
			Fix: "openssl rand -hex 32 > FILE, the same file on every voter"}
	}
	return []byte(strings.TrimSpace(string(b))), nil
}

const secretMin = 16

// peerTLS names the certificates that voters prove who they are with; nil if none are configured.
func (c *config) peerTLS() *peer.TLS {
	if c.Quorum.TLS.CertFile == "" {
		return nil
	}
	return &peer.TLS{CertFile: c.Quorum.TLS.CertFile, KeyFile: c.Quorum.TLS.KeyFile, CAFile: c.Quorum.TLS.CAFile}
}

func cause(err error) error {
	if e, ok := errors.AsType[*os.PathError](err); ok {
		return e.Err
	}
	return err
}
