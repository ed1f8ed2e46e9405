"""A whole cluster in the lab: its nodes run containerd and kubelet, and Underlay comes from its manifests."""
