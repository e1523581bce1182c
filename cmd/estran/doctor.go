package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/open"
	"github.com/spf13/cobra"
)

// doctorCommand checks what a node will need before one is started: the configuration, the data directory and the object store.
func doctorCommand(s streams) *cobra.Command {
	var (
		file   string
		create bool
		secret bool
		wait   time.Duration
	)
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Check configuration, data directory and object store",
		Long: "Check what a node needs: the configuration, the data directory, and the object store (reachable, right region and\n" +
			"credentials, conditional create, ranged reads). With --create-bucket the bucket is created if it does not exist, with\n" +
			"--create-secret the file that voters prove themselves with.",
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(file, nil)
			if err != nil {
				return err
			}
			if secret {
				if err := createSecret(cfg); err != nil {
					return err
				}
				fmt.Fprintf(s.out, "[+] secret exists: %s\n", cfg.Quorum.SecretFile)
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), max(wait, 30*time.Second))
			defer cancel()
			return diagnose(ctx, s, cfg, create, wait)
		},
	}
	c.Flags().StringVarP(&file, "config", "c", "", "configuration file")
	c.Flags().BoolVar(&secret, "create-secret", false, "write a random secret to quorum.secret_file if there is no such file")
	c.Flags().BoolVar(&create, "create-bucket", false, "create the bucket if it does not exist")
	c.Flags().DurationVar(&wait, "wait", 0, "keep trying this long while the store cannot be reached")
	return c
}

// createSecret writes quorum.secret_file, if nobody has: two that begin at once end with one secret.
func createSecret(cfg *config) error {
	path := cfg.Quorum.SecretFile
	if path == "" {
		return &fault{Code: "E_QUORUM_SECRET", Exit: exitUsage, What: "--create-secret: quorum.secret_file is not set", Fix: "set quorum.secret_file or ESTRAN_QUORUM_SECRET_FILE"}
	}
	text := []byte(rand.Text() + rand.Text() + "\n") // 256 bits and more
	tmp := fmt.Sprintf("%s.%d.tmp", path, os.Getpid())
	err := os.WriteFile(tmp, text, 0o600)
	if err == nil {
		if err = os.Link(tmp, path); errors.Is(err, os.ErrExist) {
			err = nil
		}
		err = errors.Join(err, os.Remove(tmp))
	}
	if err != nil {
		return &fault{Code: "E_QUORUM_SECRET", Err: err, What: fmt.Sprintf("quorum.secret_file (from %s): %v", cfg.from("quorum.secret_file"), err), Fix: "make its directory writable"}
	}
	_, err = cfg.secret()
	return err
}

func diagnose(ctx context.Context, s streams, cfg *config, create bool, wait time.Duration) error {
	url := cfg.storageURL()
	fmt.Fprintf(s.out, "[+] configuration\n")
	if create {
		err := retryUntil(ctx, wait, func() error { return createBucket(ctx, url) })
		if err != nil {
			return storeFault(cfg, err)
		}
		fmt.Fprintf(s.out, "[+] bucket exists: %s\n", objstore.Redact(url))
	}
	var caps objstore.Capabilities
	err := retryUntil(ctx, wait, func() error {
		b, err := open.Bucket(ctx, url, objstore.Policy{}, nil)
		if err != nil {
			return err
		}
		defer b.Close()
		caps, err = objstore.Probe(ctx, b)
		return err
	})
	if err != nil {
		return storeFault(cfg, err)
	}
	fmt.Fprintf(s.out, "[+] object store: %s  %+v\n", objstore.Redact(url), caps)
	if cfg.Node.DataDir != "" {
		if fi, err := os.Stat(cfg.Node.DataDir); err == nil && !fi.IsDir() {
			return dataDirFault(cfg, fmt.Errorf("is not a directory"))
		}
	}
	return nil
}

// retryUntil repeats f while its error may pass with time and wait has not run out.
func retryUntil(ctx context.Context, wait time.Duration, f func() error) error {
	deadline := time.Now().Add(wait)
	for pause := 200 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		err := f()
		if err == nil || !retriable(err) || time.Now().Add(pause).After(deadline) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return err
		}
	}
}

func createBucket(ctx context.Context, url string) error {
	b, err := open.Bucket(ctx, url, objstore.Policy{}, nil)
	if err != nil {
		return err
	}
	defer b.Close()
	if c, ok := b.(objstore.Creator); ok {
		return c.CreateBucket(ctx)
	}
	return nil
}

func retriable(err error) bool {
	e, ok := errors.AsType[*objstore.Error](err)
	return ok && e.Retryable
}
