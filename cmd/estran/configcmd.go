package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

// loadConfig builds the configuration: defaults, then the file, then the environment, then the flags.
func loadConfig(file string, flags map[string]string) (*config, error) {
	c := defaultConfig()
	if file != "" {
		if err := c.loadFile(file); err != nil {
			return nil, err
		}
	}
	errs := []error{c.loadEnv(os.Environ())}
	for _, s := range settingsOf(&c) {
		for flag, value := range flags {
			if flagKeys[flag] == s.key {
				errs = append(errs, c.set(s.key, value, "--"+flag))
			}
		}
	}
	if err := errors.Join(append(errs, c.validate())...); err != nil {
		return nil, err
	}
	return &c, nil
}

// flagKeys maps a flag of serve and dev to the key that it sets.
var flagKeys = map[string]string{
	"data-dir":     "node.data_dir",
	"kafka-listen": "listeners.kafka.listen",
	"http-listen":  "listeners.http.listen",
	"peer-listen":  "listeners.peer.listen",
	"storage":      "storage.url",
}

// flagsGiven returns the flags of cmd that were set and that set a key.
func flagsGiven(cmd *cobra.Command) map[string]string {
	out := map[string]string{}
	for name := range flagKeys {
		if f := cmd.Flags().Lookup(name); f != nil && f.Changed {
			out[name] = f.Value.String()
		}
	}
	return out
}

func configCommand(s streams) *cobra.Command {
	var file string
	check := &cobra.Command{Use: "check", Short: "Check a configuration file and the environment without starting anything", Args: usage(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if _, err := loadConfig(file, nil); err != nil {
				return err
			}
			_, err := fmt.Fprintln(s.out, "configuration ok")
			return err
		}}
	check.Flags().StringVarP(&file, "config", "c", "", "configuration file")
	return group("config", "Check configuration", check)
}
