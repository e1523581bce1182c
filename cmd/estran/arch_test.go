package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/estran/estran"

// allowed is the import table: package -> packages of ours that it may import. Imports point down only. A package that is
// not in the table fails the test.
var allowed = map[string][]string{
	"localstack/planted": {},
	"objstore":           {},
	"objstore/mem":       {"objstore"},
	"objstore/fs":        {"objstore"},
	"objstore/s3":        {"objstore"},
	"objstore/minio":     {"objstore"},
	"objstore/open":      {"objstore", "objstore/mem", "objstore/fs", "objstore/s3", "objstore/minio"},
	"objstore/objtest":   {"objstore"},
	"tiering/record":     {},
	"tiering/segment":    {"localstack/planted", "tiering/record"},
	"tiering":            {"localstack/planted", "objstore", "tiering/record", "tiering/segment"},
	"raftmeta/raftlog":   {"localstack/planted"},
	"raftmeta/state":     {"localstack/planted", "tiering/record", "tiering/segment"},
	"raftmeta/peer":      {"localstack/planted"},
	"raftmeta":           {"localstack/planted", "raftmeta/state", "raftmeta/raftlog", "raftmeta/peer", "tiering/record", "tiering/segment", "tiering", "objstore"},
	"raftmeta/sim":       {},
	"broker/group":       {"raftmeta/state", "tiering/record"},
	"broker/admin":       {"raftmeta/state", "tiering/record"},
	"broker":             {"localstack/planted", "broker/group", "raftmeta/state", "raftmeta", "tiering", "tiering/record", "tiering/segment"},
	"localstack":         {"objstore", "objstore/fs", "objstore/mem", "tiering/record"},
	"localstack/check":   {},
	"localstack/logs":    {"localstack/check", "raftmeta", "raftmeta/raftlog", "raftmeta/state", "tiering/record", "tiering/segment"},
	"localstack/faults":  {"localstack/planted", "localstack", "localstack/check", "localstack/logs", "broker", "tiering/segment"},
	"localstack/soak":    {"localstack"},
	"bench":              {"localstack", "tiering/record"},
	"cmd/estran":         {"*"},
}

// testsMay lists what only test files of a package may import beside the table.
var testsMay = map[string][]string{
	"objstore":         {"objstore/mem", "objstore/objtest"},
	"objstore/mem":     {"objstore/objtest"},
	"objstore/fs":      {"objstore/objtest"},
	"objstore/s3":      {"objstore/objtest", "localstack"},
	"objstore/minio":   {"objstore/objtest", "localstack"},
	"objstore/open":    {"objstore/objtest", "localstack"},
	"raftmeta/raftlog": {"localstack"},
	"raftmeta/peer":    {"raftmeta/raftlog", "localstack"},
	"localstack/logs":  {"objstore", "objstore/mem", "raftmeta", "tiering"},
	"localstack":       {"objstore/s3", "objstore/minio", "objstore/open", "objstore/objtest", "localstack/logs"},
	"tiering":          {"objstore/mem", "objstore/fs"},
	"raftmeta":         {"objstore/mem", "localstack"},
	"broker":           {"objstore/mem"},
	"raftmeta/sim":     {"objstore", "objstore/mem", "raftmeta", "raftmeta/raftlog", "raftmeta/state", "tiering", "tiering/record", "localstack/check", "broker"},
}

// owners says which packages alone may import an outside module (a path or anything below it); the longest path wins.
var owners = map[string][]string{
	"github.com/hashicorp/raft":           {"raftmeta", "raftmeta/raftlog", "raftmeta/peer", "localstack/logs"},
	"github.com/hashicorp/raft-wal":       {},
	"github.com/aws":                      {"objstore/s3"},
	"github.com/minio/minio-go":           {"objstore/minio"},
	"github.com/minio":                    {}, // MinIO itself is AGPL: a program to start, never a library
	"github.com/twmb/franz-go":            {"cmd/estran", "bench", "localstack/faults", "localstack/soak"},
	"github.com/anishathalye/porcupine":   {"localstack/check", "broker"},
	"github.com/spf13/cobra":              {"cmd/estran"},
	"github.com/goccy/go-yaml":            {"cmd/estran"},
	"github.com/pierrec/lz4":              {"tiering/record"},
	"github.com/klauspost/compress":       {"tiering/record", "tiering", "raftmeta"},
	"github.com/prometheus/client_golang": {"objstore", "tiering", "raftmeta", "raftmeta/raftlog", "raftmeta/peer", "broker", "broker/admin", "cmd/estran"},
	"github.com/tidwall/btree":            {"raftmeta/state"},
	"testing":                             {"objstore/objtest"}, // what tests are made of is not in the program
	"net/http/httptest":                   {},
}

// pure packages have no clock, chance, environment or network: the same input always gives the same output.
var pure = map[string][]string{
	"tiering/record": {"time", "math/rand", "math/rand/v2", "crypto/rand", "os", "net", "net/http"},
	"raftmeta/state": {"time", "math/rand", "math/rand/v2", "crypto/rand", "os", "net", "net/http", "sync", "sync/atomic"},
	"broker/group":   {"math/rand", "math/rand/v2", "crypto/rand", "os", "net", "net/http", "sync"},
}

func TestArchitecture(t *testing.T) {
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != root && (strings.HasPrefix(name, ".") || name == "testdata" || hasModule(path)) {
				return filepath.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(path, ".go") {
			checkFile(t, root, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func hasModule(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "go.mod"))
	return err == nil
}

func checkFile(t *testing.T, root, path string) {
	rel, _ := filepath.Rel(root, path)
	pkg := filepath.ToSlash(filepath.Dir(rel))
	isTest := strings.HasSuffix(path, "_test.go")
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Errorf("%s: %v", rel, err)
		return
	}
	for _, complaint := range violations(pkg, isTest, file) {
		t.Errorf("%s: %s", rel, complaint)
	}
}

func violations(pkg string, isTest bool, file *ast.File) (out []string) {
	allow, known := allowed[pkg]
	if !known {
		return []string{"package " + pkg + " is not in the import table of arch_test.go"}
	}
	for _, spec := range file.Imports {
		name, _ := strconv.Unquote(spec.Path.Value)
		if !isTest && name == module+"/objstore/objtest" {
			out = append(out, "objstore/objtest is for tests")
		}
		if ours, ok := strings.CutPrefix(name, module+"/"); ok {
			if ours != pkg && !slices.Contains(allow, "*") && !slices.Contains(allow, ours) &&
				!(isTest && slices.Contains(testsMay[pkg], ours)) {
				out = append(out, pkg+" must not import "+ours)
			}
			continue
		}
		if isTest {
			continue
		}
		if slices.Contains(pure[pkg], name) {
			out = append(out, pkg+" is pure and must not import "+name)
		}
		if owner, owned := ownerOf(name); owned && !slices.Contains(owner, pkg) {
			out = append(out, pkg+" must not import "+name+": it belongs to "+strings.Join(owner, ", "))
		}
	}
	if pkg == "raftmeta/state" && !isTest {
		ast.Inspect(file, func(n ast.Node) bool {
			if _, ok := n.(*ast.GoStmt); ok {
				out = append(out, "a state machine starts no goroutine")
			}
			return true
		})
	}
	return out
}

func ownerOf(name string) (owner []string, owned bool) {
	best := ""
	for path, who := range owners {
		if (name == path || strings.HasPrefix(name, path+"/")) && len(path) > len(best) {
			owner, best = who, path
		}
	}
	return owner, best != ""
}

// The rules themselves are seen to fail.
func TestArchitectureFindsViolations(t *testing.T) {
	for _, c := range []struct{ name, pkg, src, want string }{
		{"upward import", "tiering", `package tiering; import _ "` + module + `/broker"`, "must not import broker"},
		{"clock in state", "raftmeta/state", `package state; import _ "time"`, "is pure"},
		{"goroutine in state", "raftmeta/state", `package state; func f() { go f() }`, "starts no goroutine"},
		{"foreign SDK", "tiering", `package tiering; import _ "github.com/minio/minio-go/v7"`, "belongs to objstore/minio"},
		{"AGPL library", "objstore/minio", `package minio; import _ "github.com/minio/madmin-go/v3"`, "must not import"},
		{"a test's package in the program", "cmd/estran", `package main; import _ "` + module + `/objstore/objtest"`, "is for tests"},
		{"tests in the program", "localstack", `package localstack; import _ "net/http/httptest"`, "must not import"},
		{"unknown package", "util", `package util`, "not in the import table"},
		{"raft-wal is not raft", "raftmeta", `package raftmeta; import _ "github.com/hashicorp/raft-wal"`, "must not import"},
	} {
		file, err := parser.ParseFile(token.NewFileSet(), "x.go", c.src, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(violations(c.pkg, false, file), "\n"); !strings.Contains(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}
