"""Record what a result depends on besides its settings: package versions, the git commit, the device.

Importing this imports no torch. Nothing here needs more than torch, but for `free_bytes`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    import torch

PACKAGE_FOLDER = Path(__file__).parent
# how weights are kept off the device until they are used, see `pipelines.prepare.place`
OFFLOADS = ("model", "group", "sequential")
# errors that the user can put right, told in one line; any other is a bug, and keeps its traceback
MENDABLE = (ValueError, OSError, NotImplementedError, FloatingPointError, ModuleNotFoundError)


def version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    if package == "hybriddit":
        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package, by name."""
    return {package: version(package) for package in packages}


def running_versions() -> dict[str, str]:
    """The versions of hybriddit, diffusers and torch, with torch's build ("2.11.0+cu130"), for records of images."""
    import diffusers
    import torch

    return {"hybriddit": __version__, "diffusers": diffusers.__version__, "torch": str(torch.__version__)}


def git_state(folder: Path = PACKAGE_FOLDER) -> dict[str, Any] | None:
    """{"commit", "changed": lines of `git status`} of the checkout that holds `folder`; None outside a git checkout."""
    try:
        return {
            "commit": _output("git", "-C", str(folder), "rev-parse", "HEAD"),
            "changed": _output("git", "-C", str(folder), "status", "--porcelain").splitlines(),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def device_of_this_machine() -> torch.device:
    """The GPU where torch sees one (on a Mac, "mps"), else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_offload(setting: str, offload: str | None, device: torch.device) -> None:
    """Raise ValueError for offloading where there is no memory of an accelerator to spare.

    setting: what the user set it by, such as "--offload ", for the message.
    """
    if offload and device.type == "cpu":
        raise ValueError(
            f"{setting}{offload} spares the memory of an accelerator, and the device is the CPU: leave it out"
        )


@contextlib.contextmanager
def fits_memory(otherwise: str) -> Iterator[None]:
    """Raises ValueError with these words where the device's memory is full: what does not fit, and what to do."""
    import torch

    try:
        yield
    except RuntimeError as error:  # a CPU's allocator has no class of errors of its own
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        torch.cuda.empty_cache()
        raise ValueError(otherwise) from None


def find_device(name: str | None = None) -> torch.device:
    """The device of this name, such as "cpu", "cuda:1" or "mps"; None: this machine's, of a process of several its own.

    Raises ValueError, in one line, for a device that torch does not have here.
    """
    import torch

    if name is None:
        device = device_of_this_machine()
    else:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"no device is called {name!r}: give one such as cpu, cuda, cuda:1 or mps") from None
    if device.type == "cpu":
        return device
    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found is not None else 0
    if found is None or found.type != device.type or (device.index or 0) >= count:
        here = "only a CPU" if found is None else f"a CPU and {count} x {found.type}"
        raise ValueError(f"no device {name} on this machine: torch sees {here}")
    if device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device(device.type, int(os.environ["LOCAL_RANK"]) % count)
    return device


def gpu_name(device: torch.device | None = None) -> str | None:
    """The name of a GPU (default: this machine's first): "NVIDIA H100 80GB HBM3", "Apple M2 Pro"; None for a CPU."""
    import torch

    device = device or device_of_this_machine()
    if device.type == "mps":
        return torch.backends.mps.get_name()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def device_details(device: torch.device) -> dict[str, Any]:
    """Type, name and capability of a device; for a GPU also its memory in bytes and the CUDA and driver versions."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": gpu_driver(),
        }
    if device.type == "mps":
        return {"type": "mps", "name": gpu_name(device), "memory_bytes": torch.mps.recommended_max_memory()}
    name = f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"
    return {"type": "cpu", "name": name, "capability": torch.backends.cpu.get_cpu_capability()}


def gpu_driver() -> str | None:
    """The version of the NVIDIA driver; None without one."""
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", timeout=30).split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are still free, within a container's limit if there is one."""
    import psutil
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    try:  # a container's limit
        used, limit = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("current", "max"))
        return min(free, limit - used)
    except (OSError, ValueError):  # there is no limit, or it reads "max"
        return free


def _output(*command: str, timeout: float | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    return done.stdout.rstrip()  # a line of `git status` may begin with a space
