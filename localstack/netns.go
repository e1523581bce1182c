package localstack

import "errors"

// ErrNoNamespaces: this machine cannot give voters networks of their own.
var ErrNoNamespaces = errors.New("localstack: voters cannot have networks of their own here")

// isolated marks a process that has a network of its own.
const isolated = "ESTRAN_TEST_NETNS=1"
