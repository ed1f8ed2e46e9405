"""A Kubernetes control plane on this machine: its programs, its processes, and Underlay installed on it."""
