"""BGP's TCP connections of a namespace, as its kernel has them: what is up, whoever runs on either end."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from lab.net import Net

_ESTABLISHED: Final = "01"
_BGP: Final = 179


def established(net: Net, name: str) -> frozenset[tuple[str, int, int]]:
    """Address of the peer, our port and the peer's of each. Two looks tell whether a session is still the same."""
    # Files of the calling thread's namespace: /proc/net is that of the process (proc(5)).
    with net.inside(name):
        texts = [Path(f"/proc/thread-self/net/{file}").read_text() for file in ("tcp", "tcp6")]
    return frozenset(c for text in texts for c in parse(text) if _BGP in c[1:])


def parse(text: str) -> frozenset[tuple[str, int, int]]:
    """Established connections of ``/proc/net/tcp`` or ``tcp6``: peer, our port, its port. Pure."""
    found = set()
    for line in text.splitlines()[1:]:
        words = line.split()
        if words[3] == _ESTABLISHED:
            (_, port), (peer, there) = (word.split(":") for word in words[1:3])
            found.add((_address(peer), int(port, 16), int(there, 16)))
    return frozenset(found)


def _address(word: str) -> str:
    """Each four bytes are printed as a number of this machine's byte order (net/ipv4/tcp_ipv4.c)."""
    packed = b"".join(socket.htonl(int(word[at : at + 8], 16)).to_bytes(4) for at in range(0, len(word), 8))
    return str(ip_address(packed))
