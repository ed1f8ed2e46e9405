// kubeadm, as Kubernetes' own main calls it.
package main

import (
	"os"

	"k8s.io/kubernetes/cmd/kubeadm/app"
)

func main() {
	if app.Run() != nil {
		os.Exit(1)
	}
}
