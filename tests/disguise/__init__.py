"""Another machine's GPU, driver and tools, as far as a process of this one can be made to see them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]

NVML = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) { strncpy(version, "%s", length); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = %d; return 0; }
"""


def disguised(**about: object) -> dict[str, str]:
    """Environment of a process whose torch claims to be another machine's; `about`: see sitecustomize.py.

    Nothing in it says which GPUs are visible, and no nvcc is found.
    """
    hidden = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "DS_IGNORE_CUDA_DETECTION", "CUDA_HOME", "CUDA_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if not (Path(part) / "nvcc").exists())
    return environment | {"PATH": path, "PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}", "DISGUISE": json.dumps(about)}


def nvml(folder: Path, version: str, gpus: int) -> Path:
    """`folder` with a stub of NVIDIA's management library, for LD_LIBRARY_PATH."""
    source = folder / "nvml.c"
    source.write_text(NVML % (version, gpus))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(source)], check=True)
    return folder


def executable(path: Path, script: str) -> Path:
    """`script` as a program of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path
