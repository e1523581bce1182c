//go:build !planted

package planted

// On is false: this program makes no mistake on purpose.
func On(string) bool { return false }
