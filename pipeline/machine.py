"""Reports what this machine offers: versions, processor, GPU, decoders, network, disk."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from ctypes import CDLL
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from featstore.files.disk import free_bytes
from featstore.files.machine import cpu_has_bf16, usable_cores

PACKAGES = (
    "mote-video",
    "torch",
    "torchvision",
    "open_clip_torch",
    "av",
    "zarr",
    "numcodecs",
    "webdataset",
    "nvidia-dali-cuda130",
    "ray",
    "obstore",
)


def machine_report(root: Path) -> dict[str, Any]:
    """Return JSON-ready facts about this machine; free disk space is measured at `root`."""
    import torch

    from pipeline.decoding.nvdec.graphs import dali_problem
    from pipeline.encoders.sources import hub_reachable

    report: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": _processor(),
        "cores": usable_cores(),
        "cpu_bf16": "yes" if cpu_has_bf16() else "no: fp32 is used",
        "memory_gib": _memory_gib(),
        "gpu": "none: everything runs on the CPU",
        "nvdec": "yes" if _loads("libnvcuvid.so.1") else "no",
        "dali": _dali(),
        "gpu_decoding": dali_problem() or "yes",
        "hub": (
            "reachable: pretrained weights can be downloaded"
            if hub_reachable()
            else "not reachable: use weights from the cache or a local folder (--encoder DIR)"
        ),
        "free_disk_gib": round(free_bytes(root) / 2**30, 1),
        "workspace": str(root),
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        report["gpu"] = ", ".join(names)
    return report


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _loads(library: str) -> bool:
    try:
        CDLL(library)
    except OSError:
        return False
    return True


def _dali() -> str:
    try:
        import nvidia.dali
    except (ImportError, OSError):
        return "no"
    return f"yes, {nvidia.dali.__version__}"
