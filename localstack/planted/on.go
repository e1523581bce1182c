//go:build planted

package planted

import (
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
	"unsafe"
)

var made = os.Getenv("ESTRAN_TEST_PLANTED")

// On reports whether this process makes the mistake. It is not inlined: a compared constant would leave no name in the program.
//
//go:noinline
func On(mistake string) bool { return made == mistake }

var wrong atomic.Int64 // seconds

// Now is the time of a clock that is as wrong as a file says, clock-N of voter N, in the directory that ESTRAN_TEST_CLOCK names. Its monotonic reading is right, as after a real jump: package time has no way to
// make such a value, so the seconds of its wall clock are changed in place (they begin at bit 30).
func Now() time.Time {
	t := time.Now()
	*(*uint64)(unsafe.Pointer(&t)) += uint64(wrong.Load()) << 30
	return t
}

func init() {
	if dir := os.Getenv("ESTRAN_TEST_CLOCK"); dir != "" {
		path := filepath.Join(dir, "clock-"+os.Getenv("ESTRAN_NODE_ID"))
		seen := look(path, "")
		go func() {
			for ; ; time.Sleep(10 * time.Millisecond) {
				seen = look(path, seen)
			}
		}()
	}
}

// look sets the clock as the file says now, and says what it has seen.
func look(path, seen string) string {
	b, err := os.ReadFile(path)
	by, bad := time.ParseDuration(string(b))
	if err != nil || bad != nil || string(b) == seen {
		return seen
	}
	wrong.Store(int64(by / time.Second))
	_ = os.WriteFile(path+".seen", b, 0o600) // nobody waits for it if it cannot be written
	return string(b)
}
