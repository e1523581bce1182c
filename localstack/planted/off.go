//go:build !planted

package planted

import "time"

// On is false: this program makes no mistake on purpose.
func On(string) bool { return false }

// Now is the time of the machine.
func Now() time.Time { return time.Now() }
