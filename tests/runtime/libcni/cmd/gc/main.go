// Command gc NETWORK VALID has libcni collect garbage. VALID is a JSON list of {"containerID", "ifname"}, null, or ""
// for no arguments at all, as cnitool does. CNI_PATH and NETCONFPATH are cnitool's.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
)

func collect(network, valid string) error {
	list, err := libcni.LoadNetworkConf(os.Getenv("NETCONFPATH"), network)
	if err != nil {
		return err
	}
	var args *libcni.GCArgs
	if valid != "" {
		args = &libcni.GCArgs{}
		if err := json.Unmarshal([]byte(valid), &args.ValidAttachments); err != nil {
			return err
		}
	}
	plugins := libcni.NewCNIConfig(filepath.SplitList(os.Getenv("CNI_PATH")), nil)
	return plugins.GCNetworkList(context.Background(), list, args)
}

func main() {
	if err := collect(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
