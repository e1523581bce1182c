//go:build race

package broker

// poisonFrame makes use after release visible in tests: bytes of a frame that is still referred to change.
func poisonFrame(b []byte) {
	for i := range b {
		b[i] = 0xdb
	}
}
