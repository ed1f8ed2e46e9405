"""The container runtime of one node of the lab: it executes the plugin as a real one does, and knows nothing else.

CNI specification 1.1, "Section 2: Execution Protocol" and "Section 3: Execution of Network Configurations".
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from lab.errors import LabError
from lab.net import Net
from store.clock import Clock

#: Error code 11, "try again later" (CNI specification, "Error").
_TRY_AGAIN: Final = 11
_RETRY: Final = 0.1
_PATIENCE: Final = 60.0
_LIMIT: Final = 30.0


class Sandbox(msgspec.Struct, frozen=True):
    """A pod that is attached. ``result`` is the plugin's answer, given back to it at DEL as prevResult."""

    pod: str
    container: str
    addresses: tuple[str, ...]
    result: dict[str, Any]


class Runtime:
    """Attaches namespaces of ``net`` to the network in ``conflist``, from within the namespace of ``node``.

    ``plugins`` is the folder of the binaries, ``environment`` what the plugin gets beside CNI_*; ``new_id`` gives
    container ids.
    """

    def __init__(
        self,
        net: Net,
        clock: Clock,
        *,
        node: str,
        conflist: Path,
        plugins: Path,
        environment: dict[str, str],
        new_id: Callable[[], str],
    ) -> None:
        self._net = net
        self._clock = clock
        self._node = node
        self._conflist = conflist
        self._plugins = plugins
        self._environment = environment
        self._new_id = new_id

    async def attach(self, pod: str) -> Sandbox:
        """ADD, from first to last plugin. An answer "try again later" is followed, for a minute and each time with a
        sandbox of another id, as kubelet does. What failed is deleted. Raises LabError."""
        end = self._clock.monotonic() + _PATIENCE
        while True:
            container = self._new_id()
            code, answer = await self._each("ADD", pod, container, None)
            if code == 0:
                addresses = tuple(ip["address"].partition("/")[0] for ip in answer.get("ips", ()))
                return Sandbox(pod, container, addresses, answer)
            await self._each("DEL", pod, container, None)
            if answer.get("code") != _TRY_AGAIN or self._clock.monotonic() > end:
                raise LabError(f"{pod}: ADD on {self._node}: {_words(answer)}")
            await self._clock.sleep(_RETRY)

    async def detach(self, sandbox: Sandbox) -> None:
        """DEL, from last to first plugin. Raises LabError."""
        code, answer = await self._each("DEL", sandbox.pod, sandbox.container, sandbox.result)
        if code != 0:
            raise LabError(f"{sandbox.pod}: DEL on {self._node}: {_words(answer)}")

    async def _each(
        self, verb: str, pod: str, container: str, previous: dict[str, Any] | None
    ) -> tuple[int, dict[str, Any]]:
        network = json.loads(self._conflist.read_text())
        plugins = network["plugins"] if verb == "ADD" else network["plugins"][::-1]
        answer: dict[str, Any] = {}
        for plugin in plugins:
            configuration = plugin | {"cniVersion": network["cniVersion"], "name": network["name"]}
            if previous is not None:
                configuration["prevResult"] = previous
            code, answer = await self._execute(plugin["type"], verb, pod, container, configuration)
            if code != 0:
                return code, answer
            if verb == "ADD":
                previous = answer
        return 0, answer

    async def _execute(
        self, plugin: str, verb: str, pod: str, container: str, configuration: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        process = await asyncio.create_subprocess_exec(
            self._plugins / plugin,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment
            | {
                "CNI_COMMAND": verb,
                "CNI_CONTAINERID": container,
                "CNI_NETNS": str(self._net.path(pod)),
                "CNI_IFNAME": "eth0",
                "CNI_PATH": str(self._plugins),
                "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod};"
                f"K8S_POD_INFRA_CONTAINER_ID={container}",
            },
            preexec_fn=self._net.enter(self._node),
        )
        try:
            async with asyncio.timeout(_LIMIT):
                out, err = await process.communicate(json.dumps(configuration).encode())
        except TimeoutError:
            process.kill()
            await process.wait()
            return 1, {"msg": f"{plugin} gave no answer within {_LIMIT:.0f} s"}
        code = process.returncode or 0
        try:
            answer = json.loads(out) if out.strip() else {}
        except ValueError:
            return code or 1, {"msg": f"{plugin} printed what is not JSON: {out[:200]!r}"}
        if code and "msg" not in answer:
            answer["msg"] = f"{plugin} ended with {code}: {err.decode(errors='replace').strip()}"
        return code, answer


def _words(answer: dict[str, Any]) -> str:
    details = f": {answer['details']}" if answer.get("details") else ""
    return f"{answer.get('msg', 'no reason given')}{details} (code {answer.get('code', '?')})"
