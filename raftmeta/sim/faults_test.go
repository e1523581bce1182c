package sim

import (
	"fmt"
	"math"
	"math/rand/v2"
	"time"
)

// faults are tracks that go on beside one another until the load is over; each has at most one fault at a time, and ends with none.
func (w *world) faults() {
	w.wg.Go(func() { w.track("network", w.cutNetwork) })
	w.wg.Go(func() { w.track("voters", w.stopVoters) })
	w.wg.Go(func() { w.track("store", w.troubleStore) })
	w.wg.Go(func() { w.track("clock", w.setClock) })
}

// track brings about one fault after the other.
func (w *world) track(name string, begin func(*rand.Rand) (what string, end func())) {
	rng := w.rng(name, 0)
	for w.sleep(w.load, rng, w.o.Gap) {
		what, end := begin(rng)
		d := w.lasts(rng)
		w.say("%s for %s", what, d)
		select {
		case <-w.load:
		case <-time.After(d):
		}
		end()
		w.say("%s is over", what)
	}
}

// lasts draws how long a fault lasts: as often minutes as hours.
func (w *world) lasts(rng *rand.Rand) time.Duration {
	least, most := float64(30*time.Second), float64(min(6*time.Hour, w.o.Load/3))
	return time.Duration(least * math.Pow(most/least, rng.Float64())).Round(time.Second)
}

func (w *world) cutNetwork(rng *rand.Rand) (string, func()) {
	a, b, c := w.nodes[rng.IntN(3)].addr, "", ""
	for _, n := range w.nodes {
		if n.addr != a && b == "" {
			b = n.addr
		} else if n.addr != a {
			c = n.addr
		}
	}
	var what string
	var pairs [][2]string
	switch rng.IntN(5) {
	case 0:
		what, pairs = a+" hears nobody and is heard by nobody", [][2]string{{a, b}, {b, a}, {a, c}, {c, a}}
	case 1:
		what, pairs = a+" is heard by nobody", [][2]string{{a, b}, {a, c}}
	case 2:
		what, pairs = a+" hears nobody", [][2]string{{b, a}, {c, a}}
	case 3:
		what, pairs = fmt.Sprintf("%s and %s do not hear each other", b, c), [][2]string{{b, c}, {c, b}}
	case 4:
		what, pairs = "nobody hears anybody", [][2]string{{a, b}, {b, a}, {a, c}, {c, a}, {b, c}, {c, b}}
	}
	cut := map[[2]string]bool{}
	for _, p := range pairs {
		cut[p] = true
	}
	w.net.set(cut)
	return what, func() { w.net.set(nil) }
}

func (w *world) stopVoters(rng *rand.Rand) (string, func()) {
	which := rng.Perm(3)[:[]int{1, 1, 1, 1, 2, 3}[rng.IntN(6)]]
	what := "stopped: voters"
	for _, i := range which {
		what += fmt.Sprint(" ", w.nodes[i].id)
		w.nodes[i].stop()
	}
	return what, func() {
		for _, i := range which {
			w.nodes[i].start()
		}
	}
}

func (w *world) troubleStore(rng *rand.Rand) (string, func()) {
	m := refuses + trouble(rng.IntN(4))
	w.store.set(m)
	return "the store " + m.String(), func() { w.store.set(well) }
}

func (w *world) setClock(rng *rand.Rand) (string, func()) {
	n := w.nodes[rng.IntN(3)]
	by := time.Duration(float64(time.Minute) * math.Pow(10*24*60, rng.Float64())).Round(time.Second) // a minute to ten days
	if rng.IntN(2) == 0 {
		by = -by
	}
	n.skew.Store(int64(by))
	return fmt.Sprintf("the clock of voter %d is wrong by %s", n.id, by), func() { n.skew.Store(0) }
}
