package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

func nodeFlags(c *cobra.Command, peer bool) {
	d := defaultConfig()
	c.Flags().String("data-dir", d.Node.DataDir, "directory of the log")
	c.Flags().String("kafka-listen", "", "address for Kafka clients, HOST:PORT")
	c.Flags().String("http-listen", "", "address for metrics and health, HOST:PORT")
	c.Flags().String("storage", "", "object store: s3://bucket/prefix?region=…&endpoint=…, file:///dir or mem://; default: a directory below --data-dir")
	if peer {
		c.Flags().String("peer-listen", "", "address for other voters, HOST:PORT")
	}
}

func serveCommand(s streams) *cobra.Command {
	var file string
	c := &cobra.Command{Use: "serve", Short: "Run a voter", Args: usage(cobra.NoArgs),
		Long: "Run a voter with a configuration file. Order of precedence: flags, ESTRAN_* variables, KAFKA_* variables, the file, defaults.\nSIGTERM drains and exits 0; a second signal stops at once.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(file, flagsGiven(cmd))
			if err != nil {
				return err
			}
			log := newLogger(cfg, s.err)
			warnOpen(cfg, s.err)
			n, err := startNode(cmd.Context(), cfg, log)
			if err != nil {
				return err
			}
			log.Info("ready", "event", "server.ready", "component", "node", "kafka", n.kafka.Addr().String(), "http", n.webL.Addr().String(),
				"cluster", n.host.ClusterID(), "shards", n.host.Cluster().Shards, "took", time.Since(n.started).String())
			return n.run(cmd.Context(), s)
		}}
	c.Flags().StringVarP(&file, "config", "c", "", "configuration file (YAML)")
	nodeFlags(c, true)
	return c
}

func devCommand(s streams) *cobra.Command {
	var ephemeral bool
	c := &cobra.Command{Use: "dev", Short: "Run a one-node cluster on this machine, without configuration", Args: usage(cobra.NoArgs),
		Long: "Run one voter on loopback with objects in a directory. Topics are created on first use, and what is written is sealed into objects\nafter 10 seconds or 64 MiB. The data stays for the next start unless --ephemeral is given.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := devConfig(flagsGiven(cmd))
			if err != nil {
				return err
			}
			if ephemeral {
				dir, err := os.MkdirTemp("", "estran-dev-")
				if err != nil {
					return err
				}
				defer os.RemoveAll(dir)
				cfg.Node.DataDir = filepath.Join(dir, "data")
			}
			return runDev(cmd.Context(), s, cfg, ephemeral)
		}}
	c.Flags().BoolVar(&ephemeral, "ephemeral", false, "keep nothing: the data is deleted on exit")
	nodeFlags(c, false)
	return c
}

// devConfig is the configuration of dev: loopback, small, fast sealing.
func devConfig(flags map[string]string) (*config, error) {
	c := defaultConfig()
	c.Listeners.Kafka.Listen = "localhost:9092"
	c.Listeners.HTTP.Listen = "localhost:9096"
	c.Listeners.Peer.Listen = "127.0.0.1:0"
	c.Quorum.Shards = 1
	c.Hot.MaxBytes, c.Tiering.LocalRetentionBytes = 1<<30, 256<<20
	c.Tiering.SealAge = duration(10 * time.Second)
	c.Log.Level = "warn"
	c.Kafka["auto.create.topics.enable"] = "true"
	c.Kafka["group.initial.rebalance.delay.ms"] = "0"
	errs := []error{c.loadEnv(os.Environ())}
	for flag, v := range flags {
		errs = append(errs, c.set(flagKeys[flag], v, "--"+flag))
	}
	if c.Listeners.Kafka.Advertise == "" && strings.HasPrefix(c.Listeners.Kafka.Listen, "localhost:") && !strings.HasSuffix(c.Listeners.Kafka.Listen, ":0") {
		c.Listeners.Kafka.Advertise = c.Listeners.Kafka.Listen
	}
	if err := errors.Join(append(errs, c.validate())...); err != nil {
		return nil, err
	}
	return &c, nil
}

func runDev(ctx context.Context, s streams, cfg *config, ephemeral bool) error {
	status := "initialized new cluster"
	if _, err := os.Stat(filepath.Join(cfg.Node.DataDir, "node.json")); err == nil {
		status = "restarted existing node"
	}
	began := time.Now()
	warnOpen(cfg, s.err)
	n, err := startNode(ctx, cfg, newLogger(cfg, s.err))
	if err != nil {
		return err
	}
	took := time.Since(began)
	v := buildVersion()
	kafka, web := friendly(cfg.Listeners.Kafka.Listen, n.kafka.Addr().String()), friendly(cfg.Listeners.HTTP.Listen, n.webL.Addr().String())
	kept := "(rerun keeps the data; --ephemeral throws it away)"
	if ephemeral {
		kept = "(deleted on exit)"
	}
	boot := ""
	if kafka != "localhost:9092" {
		boot = " -b " + kafka
	}
	fmt.Fprintf(s.err, `estran %s (%s, %s/%s)  ready in %d ms
  kafka     %-32s no auth, PLAINTEXT (dev only)
  metrics   http://%s/metrics
  storage   %s   hot log %s (cap %s)
  quorum    1 voter  n%d (leader)
  status    %s  %s  %s

Try:  estran topic create orders -p 3%s
      echo hello | estran topic produce orders%s
      estran topic consume orders --from start%s
      kcat -b %s -L
Ctrl-C to stop.
`, v.Version, v.Go, v.OS, v.Arch, took.Milliseconds(), kafka, web, cfg.storageURL(), cfg.Node.DataDir, humanize.IBytes(uint64(cfg.Hot.MaxBytes)),
		cfg.Node.ID, status, n.host.ClusterID(), kept, boot, boot, boot, kafka)
	return n.run(ctx, s)
}

// friendly is the address as it was configured, with the real port.
func friendly(configured, real string) string {
	if host, _, ok := strings.Cut(configured, ":"); ok && host == "localhost" {
		return "localhost" + real[strings.LastIndexByte(real, ':'):]
	}
	return real
}
