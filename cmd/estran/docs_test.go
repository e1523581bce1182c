package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
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

// Every command of ours in the README exists, with its flags.
func TestReadmeCommands(t *testing.T) {
	seen := map[string]bool{}
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(doc(t, "README.md"), -1) {
		text := strings.ReplaceAll(block[1], "\\\n", " ")
		text = regexp.MustCompile(`"[^"]*"|'[^']*'`).ReplaceAllString(text, "x")
		text = regexp.MustCompile(`(?m)\s#.*$`).ReplaceAllString(text, "")
		for _, m := range regexp.MustCompile(`(?m)\./(?:cmd/)?estran ([^|;&<>\n]+)`).FindAllStringSubmatch(text, -1) {
			c, rest, err := newRoot(streams{}).Find(strings.Fields(m[1]))
			if err == nil {
				err = c.ParseFlags(rest)
			}
			if err != nil || !c.HasParent() || c.HasSubCommands() {
				t.Errorf("README.md: estran %s: %v", m[1], err)
				continue
			}
			seen[c.Name()] = true
		}
	}
	for _, name := range []string{"dev", "demo", "serve", "create", "drain"} {
		if !seen[name] {
			t.Errorf("README.md has no command %s, or it was not found", name)
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

// Every test that docs/INCIDENTS.md names is there.
func TestIncidentsNameTests(t *testing.T) {
	named := regexp.MustCompile("`([a-z]+)\\.(Test[A-Za-z0-9]+)`").FindAllStringSubmatch(doc(t, "docs/INCIDENTS.md"), -1)
	if len(named) < 30 {
		t.Fatalf("%d tests are named", len(named))
	}
	for _, m := range named {
		found := false
		for _, dir := range []string{m[1], "raftmeta/" + m[1], "cmd/" + m[1]} {
			files, err := filepath.Glob(filepath.Join("..", "..", filepath.FromSlash(dir), "*_test.go"))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				b, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				found = found || strings.Contains(string(b), "func "+m[2]+"(t *testing.T)")
			}
		}
		if !found {
			t.Errorf("docs/INCIDENTS.md names %s.%s, which does not exist", m[1], m[2])
		}
	}
}
