package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// mayPoll are the functions of the packages that requests go through which may look again after a while instead of being told, and why no request that is served waits for that.
var mayPoll = map[string]string{
	"broker.Serve":             "no connection can be accepted",
	"broker.Drain":             "the node ends",
	"raftmeta.admit":           "the hot budget is used up: who writes is slowed down",
	"raftmeta.backups":         "its own task",
	"raftmeta.snapshotLoop":    "its own task",
	"raftmeta.watchNodes":      "its own task",
	"raftmeta.watchNode":       "its own task",
	"raftmeta.keepVoters":      "its own task",
	"raftmeta.balance":         "its own task",
	"raftmeta.watchMembership": "its own task",
	"raftmeta.run":             "its own task: a follower finds somebody to follow",
	"raftmeta.keepFresh":       "its own task",
	"raftmeta.rediscover":      "its own task",
	"raftmeta.open":            "a follower starts",
	"raftmeta/raftlog.pause":   "the disk is full",
	"raftmeta/raftlog.watch":   "its own task",
}

// polls names what waits for time to pass: a request that does is as slow as that, however fast the rest is.
var polls = []string{"time.Sleep", "time.Tick", "time.NewTicker", "time.After", "sleep"}

// pollers lists the functions of a file that poll.
func pollers(file *ast.File) (out []string) {
	for _, d := range file.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			name := ""
			switch x := call.Fun.(type) {
			case *ast.Ident:
				name = x.Name
			case *ast.SelectorExpr:
				if of, ok := x.X.(*ast.Ident); ok {
					name = of.Name + "." + x.Sel.Name
				}
			}
			if slices.Contains(polls, name) && !slices.Contains(out, f.Name.Name) {
				out = append(out, f.Name.Name)
			}
			return true
		})
	}
	return out
}

// Incident 39: no request waits for a ticker or a sleep.
func TestRequestsDoNotPoll(t *testing.T) {
	seen := map[string]bool{}
	for _, pkg := range []string{"broker", "broker/group", "raftmeta", "raftmeta/peer", "raftmeta/raftlog", "raftmeta/state", "tiering", "tiering/record", "tiering/segment"} {
		files, err := filepath.Glob(filepath.Join("..", "..", filepath.FromSlash(pkg), "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatal(pkg, err)
		}
		for _, path := range files {
			if strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, "mistakes_on.go") { // a mistake is one
				continue
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range pollers(file) {
				name := pkg + "." + f
				if seen[name] = true; mayPoll[name] == "" {
					t.Errorf("%s (%s) sleeps or has a ticker: a request must be told when what it waits for is there", name, path)
				}
			}
		}
	}
	for name := range mayPoll {
		if !seen[name] {
			t.Errorf("%s does not poll any more: its row goes", name)
		}
	}
}

// The rule is seen to fail.
func TestPollersAreFound(t *testing.T) {
	const src = `package p
func a() { time.Sleep(1) }
func b() { for range time.Tick(1) {} }
func c() { select { case <-time.After(1): } }
func d() { func() { t := time.NewTicker(1); t.Stop() }() }
func e() { sleep(ctx, 1) }
func f() { time.AfterFunc(1, g); time.Now() }`
	file, err := parser.ParseFile(token.NewFileSet(), "p.go", src, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(pollers(file), ""); got != "abcde" {
		t.Errorf("found %q", got)
	}
}
