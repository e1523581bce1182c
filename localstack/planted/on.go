//go:build planted

package planted

import "os"

var made = os.Getenv("ESTRAN_TEST_PLANTED")

// On reports whether this process makes the mistake. It is not inlined: a compared constant would leave no name in the program.
//
//go:noinline
func On(mistake string) bool { return made == mistake }
