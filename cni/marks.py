"""The numbers that say what in the kernel is ours (R10). A process deletes only its own numbers."""

from __future__ import annotations

from typing import Final

#: Route protocol of a pod's /32 and /128 on its node; written by the CNI server.
PROTO_PODS: Final = 141
#: Route protocol of the blackhole route that each own block has; written by the agent.
PROTO_BLOCKS: Final = 142
#: Route protocol of what peers announced to us, and of the nexthop objects under it; written by the agent.
PROTO_IMPORTS: Final = 143

#: Lower wins. With ``blockSize: 32`` a pod's route and its block's blackhole have one prefix: the pod's must win.
METRIC_PODS: Final = 32
METRIC_BLOCKS: Final = 512
METRIC_IMPORTS: Final = 2048
#: A default route that a peer may give (``defaultRoute: Fallback``) stands below every foreign one.
METRIC_FALLBACK: Final = 4096

#: Nexthop ids of ours are in this range: 0x554C0000 is "UL".
NEXTHOP_BASE: Final = 0x554C0000
NEXTHOP_SPAN: Final = 0x10000

#: Link group of every host-side veth, so that one RTM_DELLINK can take many.
LINK_GROUP: Final = 0x554C
#: Where DEL puts a host-side veth until it is removed with all others of this group, in the background.
LINK_GROUP_DOOMED: Final = 0x554D
#: Host-side veths are this and a hash of (container id, interface); 15 characters at most.
LINK_PREFIX: Final = "ul"
#: MAC of every host-side veth, as operators of Calico clusters know it.
LINK_MAC: Final = "ee:ee:ee:ee:ee:ee"
#: The pod's IPv4 gateway: never assigned anywhere, answered by a permanent neighbour entry.
GATEWAY4: Final = "169.254.1.1"
#: nftables table (family inet) that drops what pods send from addresses that are not theirs; written by the CNI server.
NFT_TABLE: Final = "underlay"
#: Where its chain stands at prerouting: nft's ``raw``, before connection tracking.
NFT_PRIORITY: Final = -300
