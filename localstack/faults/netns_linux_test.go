package main

import (
	"io"
	"math/rand/v2"
	"slices"
	"testing"
)

// A life has either proxies or namespaces, and only faults that it can have; both come, where both were asked for. Without namespaces here their faults stay, to be skipped with the reason.
func TestNamespacesAndProxiesDoNotMix(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	has := func(kinds []nemesis, f func(nemesis) bool) bool { return slices.ContainsFunc(kinds, f) }
	netns, proxies := func(n nemesis) bool { return n.netns }, func(n nemesis) bool { return n.proxies }
	if !has(nemeses, netns) || !has(nemeses, proxies) {
		t.Fatal("there is nothing to choose from")
	}
	through := 0
	for range 50 {
		ns, kinds, err := namespaces(nemeses, 3, rng, io.Discard) // this process has the machine's network
		if ns != nil || err != nil {
			t.Fatalf("namespaces in the machine's network: %v", err)
		}
		if !has(kinds, proxies) {
			t.Fatal("faults of proxies are left out of a life that has them")
		}
		if !has(kinds, netns) {
			through++
		}
	}
	if through == 0 || through == 50 {
		t.Errorf("%d of 50 lives have proxies", through)
	}
	only, err := choose("netns-cut,none")
	if err != nil {
		t.Fatal(err)
	}
	if _, kinds, err := namespaces(only, 3, rng, io.Discard); err != nil || !has(kinds, netns) {
		t.Errorf("%v, %v", kinds, err)
	}
	only, err = choose("partition,kill")
	if err != nil {
		t.Fatal(err)
	}
	if _, kinds, err := namespaces(only, 3, rng, io.Discard); err != nil || len(kinds) != 2 {
		t.Errorf("%v, %v", kinds, err)
	}
}
