//go:build !linux

package localstack

// Isolate is impossible here.
func Isolate() error { return ErrNoNamespaces }

// Namespaces do not exist here.
type Namespaces struct{}

// NewNamespaces is impossible here.
func NewNamespaces(int) (*Namespaces, error) { return nil, ErrNoNamespaces }

func (*Namespaces) host(int) string    { return "127.0.0.1" }
func (*Namespaces) enter(int) []string { return nil }

// Forward is impossible here.
func (*Namespaces) Forward(string) (string, error) { return "", ErrNoNamespaces }

// Cut is impossible here.
func (*Namespaces) Cut(int, int) error { return ErrNoNamespaces }

// Unplug is impossible here.
func (*Namespaces) Unplug(int) error { return ErrNoNamespaces }

// Heal is impossible here.
func (*Namespaces) Heal() error { return ErrNoNamespaces }

// Lost is impossible here.
func (*Namespaces) Lost() (int, error) { return 0, ErrNoNamespaces }

// Close does nothing.
func (*Namespaces) Close() error { return nil }
