"""``underlay-speaker``: prepares run/speaker and becomes ExaBGP.

It execs, so pid and signals are ExaBGP's: SIGTERM shuts it down, SIGUSR1 is the relay's to send. The sessions come from
the agent through the configuration file; an agent need not be there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import sys
from collections.abc import Mapping
from pathlib import Path

from agent.bgp import conf

RELAY = Path(__file__).resolve().with_name("relay.py")


class SpeakerError(Exception):
    """The speaker cannot start; the message says why and what to do."""


def relay_command(folder: Path, *options: str) -> tuple[str, ...]:
    """How ExaBGP starts the relay of this folder. ExaBGP splits the line at spaces, so no part may hold one."""
    command = (sys.executable, "-ISEs", str(RELAY), str(folder), str(folder / "exabgp.conf"), *options)
    if any(" " in word or ";" in word for word in command):
        raise SpeakerError(f"{' '.join(command)}: ExaBGP cannot run a path with a space or semicolon; choose another")
    return command


def prepare(folder: Path, *options: str) -> Path:
    """Makes the folder (0700) and, if there is none, a configuration without peers. Returns the configuration's path.

    Raises SpeakerError, and OSError if the folder cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "exabgp.conf"
    if not path.exists():
        temporary = folder / f"exabgp.conf.{os.getpid()}"
        temporary.touch(mode=0o600)
        temporary.write_text(conf.render((), relay_command(folder, *options)))
        # A link, as it replaces nothing: agent and speaker may start at once, and one may have written it by now.
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)
        temporary.unlink()
    return path


def environment(folder: Path, base: Mapping[str, str]) -> dict[str, str]:
    """ExaBGP's settings, on top of ``base``. Raises SpeakerError if the user we run as has no name."""
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        # ExaBGP looks the name up only when one of our ids is 0; any name will do otherwise.
        user = "root"
    return {
        **{key: value for key, value in base.items() if not key.lower().startswith(("exabgp.", "exabgp_"))},
        # As another user it could not read its configuration again (exabgp.md, fault 10).
        "exabgp.daemon.user": user,
        "exabgp.daemon.daemonize": "false",
        "exabgp.api.cli": "false",
        "exabgp.api.chunk": "5000",
        "exabgp.api.ack": "true",
        "exabgp.log.destination": str(folder / "exabgp.log"),
        "exabgp.log.level": "INFO",
        "exabgp.log.processes": "false",  # one line for each route told
        "exabgp.log.statistics": "false",
        "exabgp.log.short": "false",
        "exabgp.bgp.openwait": "10",
        # In 10 ms: how often it looks at its peers when none speaks. 1, its default, is 10 ms of CPU a second at rest.
        "exabgp.reactor.speed": "5",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="underlay-speaker", description="Runs ExaBGP for the Underlay agent.")
    run = os.environ.get("UNDERLAY_RUN", "/run/underlay")
    parser.add_argument("--run", type=Path, default=Path(run), help="run folder (UNDERLAY_RUN, default /run/underlay)")
    options = parser.parse_args()
    folder = Path(options.run).resolve() / "speaker"
    try:
        path = prepare(folder)
    except (SpeakerError, OSError) as e:
        sys.stderr.write(f"underlay-speaker: {e}\n")
        sys.exit(1)
    argv = [sys.executable, "-P", "-m", "exabgp", "server", str(path)]
    os.execve(argv[0], argv, environment(folder, os.environ))


if __name__ == "__main__":
    main()
