"""Interfaces of this host, what gloo and NCCL are told about them, and the way to other hosts."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
from network_interface import interface_to

from checkups.findings import HIDDEN, SECRET, Finding

SHOWN = re.compile(
    r"^(CUDA|NVIDIA|NCCL|GLOO|UCX|TORCH|PYTORCH|TP|NVTE|VLLM|MEGATRON|DAPO|OMP|MKL|MASTER|SLURM|HF|WANDB"
    r"|CONTAINER)_|^(RANK|LOCAL_RANK|GROUP_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|PYTHONPATH|LD_LIBRARY_PATH)$"
    r"|^(https?|no|all)_proxy$",
    re.IGNORECASE,
)
SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def several_hosts(environment: Mapping[str, str] = os.environ) -> bool:
    """By torchrun's variables."""
    return int(environment.get("WORLD_SIZE", 1)) > int(environment.get("LOCAL_WORLD_SIZE", 1))


def network(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Interfaces, and whether gloo and NCCL are pointed at one that exists and leads to the first host."""
    addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    found = []
    for name, state in states.items():
        own = ", ".join(entry.address for entry in addresses.get(name, []) if entry.family in families)
        if name != "lo" and state.isup and own:
            speed = f", {state.speed} Mbit/s" if state.speed else ""
            found.append(Finding(section="network", name=name, text=f"{own}; MTU {state.mtu}{speed}"))
    found += [Finding(section="network", name="InfiniBand", text=text) for text in infiniband()]
    found += [_named(variable, environment, set(states)) for variable in SOCKET_VARIABLES]
    several, master = several_hosts(environment), environment.get("MASTER_ADDR")
    if several and master:
        found.append(_way_to(master))
    if several and not environment.get("GLOO_SOCKET_IFNAME"):
        found.append(_own_name())
    return found


def _named(variable: str, environment: Mapping[str, str], interfaces: set[str]) -> Finding:
    """gloo takes names, NCCL the beginnings of names, with = whole ones, with ^ all others."""
    value = environment.get(variable, "")
    if not value:
        return Finding(section="network", name=variable, text="not set")
    names, sign = value.lstrip("^=").split(","), value[0]
    whole = variable.startswith("GLOO") or sign in "=" or value.startswith("^=")
    hits = {i for i in interfaces if any(i == n if whole else i.startswith(n) for n in names)}
    exists = bool(interfaces - hits if sign == "^" else hits)
    remedy = (
        "" if exists else f"there is {', '.join(sorted(interfaces))}; tools/network_interface.py HOST tells"
    )
    text = value if exists else f"{value} is no interface of this host"
    return Finding(section="network", name=variable, text=text, remedy=remedy, failed=not exists)


def _way_to(master: str) -> Finding:
    try:
        return Finding(section="network", name="to MASTER_ADDR", text=f"{master} by {interface_to(master)}")
    except ValueError as error:
        remedy = "set MASTER_ADDR to an address of the first host that all others reach"
        return Finding(section="network", name="to MASTER_ADDR", text=str(error), remedy=remedy, failed=True)


def _own_name() -> Finding:
    """Without GLOO_SOCKET_IFNAME gloo offers others the address that the host's name has."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = ""
    wrong = not address or address.startswith("127.")
    remedy = "set GLOO_SOCKET_IFNAME, or correct /etc/hosts: other hosts cannot reach that" if wrong else ""
    text = f"{name} is {address or 'no address'} here"
    return Finding(section="network", name="own name", text=text, remedy=remedy)


def infiniband(root: Path = Path("/")) -> list[str]:
    """The ports of InfiniBand and RoCE cards: name, state, speed."""
    ports = sorted(root.glob("sys/class/infiniband/*/ports/*"))
    return [f"{p.parts[-3]} port {p.name}: {read(p / 'state')}, {read(p / 'rate')}" for p in ports]


def environment_variables(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Variables that libraries of a run read. Secret ones are named without their value."""
    return [
        Finding(section="environment", name=name, text=HIDDEN if SECRET.search(name) else value)
        for name, value in sorted(environment.items())
        if SHOWN.search(name)
    ]


def peer(host: str, port: int, timeout_s: float = 5.0) -> Finding:
    """Whether another host answers, and by which interface. A closed port is an answer too."""
    remedy = "look at the route, the firewall (runs use free ports among hosts) and whether that host is up"
    try:
        way = interface_to(host)
        begin = time.perf_counter()
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
            state = "open"
        except ConnectionRefusedError:
            state = "closed"
        taken = time.perf_counter() - begin
    except (OSError, ValueError) as error:
        return Finding(section="peers", name=host, text=f"port {port}: {error}", remedy=remedy, failed=True)
    text = f"answers in {taken * 1e3:.1f} ms by {way}; port {port} is {state}"
    return Finding(section="peers", name=host, text=text, value={"seconds": taken})


def read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
