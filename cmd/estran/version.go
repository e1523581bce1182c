package main

import (
	"encoding/json"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// Set by the linker in release builds; otherwise the build information of the module is shown.
var version, commit, date string

// versionInfo is what `estran version --json` and /version say.
type versionInfo struct {
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	Date    string `json:"date,omitempty"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

func buildVersion() versionInfo {
	v := versionInfo{Version: version, Commit: commit, Date: date, Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
	if bi, ok := debug.ReadBuildInfo(); ok {
		if v.Version == "" {
			v.Version = bi.Main.Version
		}
		for _, s := range bi.Settings {
			switch {
			case s.Key == "vcs.revision" && v.Commit == "":
				v.Commit = s.Value[:min(12, len(s.Value))]
			case s.Key == "vcs.time" && v.Date == "":
				v.Date = s.Value
			}
		}
	}
	if v.Version == "" || v.Version == "(devel)" {
		v.Version = "devel"
	}
	return v
}

func (v versionInfo) String() string {
	s := fmt.Sprintf("estran %s (%s, %s/%s)", v.Version, v.Go, v.OS, v.Arch)
	if v.Commit != "" {
		s += " " + v.Commit
	}
	return s
}

func versionCommand(s streams) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{Use: "version", Short: "Show version, commit and platform", Args: usage(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if asJSON {
				return json.NewEncoder(s.out).Encode(buildVersion())
			}
			_, err := fmt.Fprintln(s.out, buildVersion())
			return err
		}}
	c.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return c
}
