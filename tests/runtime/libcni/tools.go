//go:build tools

// Package libcni keeps in go.mod what is built from there.
package libcni

import _ "github.com/containernetworking/cni/cnitool"
