#!/usr/bin/env python
"""What a bug report needs, and what would stop a run, in one command.

    python tools/doctor.py [--run-dir DIR] [--peers HOST[:PORT],...] [--json]
    torchrun --nnodes=2 --node-rank=R --nproc-per-node=8 --master-addr=HOST tools/doctor.py [the same]
    python tools/doctor.py --health

Versions, GPUs and how they are connected, cores, memory, shared memory, limits, network interfaces, variables
that libraries read; with --run-dir speed, room and clock of a run's folder; with --peers whether other hosts
answer. Under torchrun, over any number of hosts and ranks, it also compares versions and clocks of the hosts,
looks whether they share --run-dir, and measures what links between ranks carry, by gloo and, with GPUs, NCCL.

Every line is ok, a warning or failed, the latter two with a remedy; the exit code is 1 when something failed.
Values of variables that look secret (TOKEN, KEY, SECRET, ...) are hidden. Host names and addresses are not.
--health is for a container's HEALTHCHECK: packages, shared memory, limits, and whether the GPUs answer; below
two seconds, without the network.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from checkups import findings, machine, network, software, storage
from checkups.findings import Finding


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="run.dir of the run")
    parser.add_argument(
        "--peers", default="", metavar="HOST[:PORT],...", help="default port: MASTER_PORT, 29500"
    )
    parser.add_argument("--health", action="store_true", help="only what takes no time")
    options = parser.parse_args(arguments)
    try:
        options.peers = [_peer(text) for text in options.peers.split(",") if text]
    except ValueError:
        parser.error(f"--peers {options.peers} must be HOST or HOST:PORT, separated by commas")
    return options


def _peer(text: str) -> tuple[str, int]:
    host, colon, port = text.partition(":")
    return host, int(port) if colon else int(os.environ.get("MASTER_PORT", 29500))


def health() -> list[Finding]:
    """What can break in a container that was well when it was started."""
    return [*software.packages(), machine.shared_memory(), *machine.limits(), software.gpus_answer(1.5)]


def of_this_host(options: argparse.Namespace) -> list[Finding]:
    return [
        *software.packages(),
        software.checkout(),
        *software.libraries(),
        *software.gpus(),
        *machine.cores_and_memory(),
        machine.shared_memory(),
        *machine.limits(),
        *network.network(),
        *(network.peer(host, port) for host, port in options.peers),
        *(storage.run_folder(options.run_dir) if options.run_dir else []),
        *network.environment_variables(),
    ]


def of_all_ranks(options: argparse.Namespace) -> tuple[dict[str, list[Finding]], bool]:
    """On rank 0 the findings of all hosts, elsewhere none; and whether nothing failed anywhere."""
    from checkups import links, ranks

    meeting = ranks.Meeting.of_torchrun()
    own = []
    if meeting.speaks:
        own = [*of_this_host(options), *ranks.clock(meeting)]
        if options.run_dir:
            own += ranks.shared_folder(meeting, options.run_dir)
    by_host = {}
    if meeting.speaks:
        by_host = ranks.collect(meeting, findings.without_secrets(own), socket.gethostname())
    if meeting.rank == 0:
        meeting.give("all have come", True)
    meeting.take("all have come", 0)  # gloo waits less long
    measured = links.measure(meeting)
    if meeting.rank == 0:
        together = [ranks.same_software(by_host, software.SECTION)] if len(by_host) > 1 else []
        by_host[findings.ALL] = findings.without_secrets([*together, *measured])
        meeting.give("healthy", not any(f.failed for lines in by_host.values() for f in lines))
    healthy = meeting.take("healthy", 0)
    meeting.leave()
    return by_host, healthy


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if "RANK" in os.environ and not options.health:
        by_host, healthy = of_all_ranks(options)
    else:
        own = health() if options.health else of_this_host(options)
        by_host = {socket.gethostname(): findings.without_secrets(own)}
        healthy = not any(f.failed for f in own)
    if by_host:
        print(json.dumps(findings.as_json(by_host), indent=2) if options.json else findings.as_text(by_host))
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
