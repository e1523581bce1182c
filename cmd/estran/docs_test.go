package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/estran/estran/broker"
)

func doc(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile("../../" + path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The README's table of APIs is the one that is served.
func TestReadmeListsTheAPIs(t *testing.T) {
	readme := doc(t, "README.md")
	for _, a := range broker.APIs() {
		row := fmt.Sprintf("| %s | %d-%d |", a.Name, a.Min, a.Max)
		if a.Min == a.Max {
			row = fmt.Sprintf("| %s | %d |", a.Name, a.Min)
		}
		if !strings.Contains(readme, row) {
			t.Errorf("README.md lacks %q", row)
		}
	}
}

// docs/CONFIGURATION.md lists exactly the keys that exist, with their variables.
func TestConfigurationIsDocumented(t *testing.T) {
	text := doc(t, "docs/CONFIGURATION.md")
	known := map[string]bool{}
	c := defaultConfig()
	for _, s := range settingsOf(&c) {
		known[s.key] = true
		if !strings.Contains(text, "| `"+s.key+"` | `"+envName(s.key)+"` |") {
			t.Errorf("docs/CONFIGURATION.md lacks %s (%s)", s.key, envName(s.key))
		}
	}
	for _, k := range kafkaKeys {
		known["kafka."+k.name] = true
		if !strings.Contains(text, "| `kafka."+k.name+"` |") {
			t.Errorf("docs/CONFIGURATION.md lacks kafka.%s", k.name)
		}
	}
	for line := range strings.Lines(text) {
		if key, _, ok := strings.Cut(strings.TrimPrefix(line, "| `"), "`"); ok && strings.HasPrefix(line, "| `") && !known[key] {
			t.Errorf("docs/CONFIGURATION.md names %q, which does not exist", key)
		}
	}
}

func TestArchitectureStaysShort(t *testing.T) {
	if n := strings.Count(doc(t, "docs/ARCHITECTURE.md"), "\n"); n >= 300 {
		t.Errorf("docs/ARCHITECTURE.md has %d lines, the limit is 300", n)
	}
	text := doc(t, "docs/ARCHITECTURE.md")
	for pkg := range allowed {
		name, _, _ := strings.Cut(pkg, "/mem")
		if strings.HasPrefix(pkg, "objstore/") || pkg == "bench" {
			continue
		}
		if !strings.Contains(text, "| "+name) {
			t.Errorf("docs/ARCHITECTURE.md has no row for %s", pkg)
		}
	}
}
