"""``make`` on other machines: what is installed there, and with which environment; nothing is, the tools are stubs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mixreorg_fast.devices import OLDEST_DRIVER
from tests.disguise import disguised, executable

ROOT = Path(__file__).parents[1]
VERSION = f"python3.{sys.version_info.minor}"
DEEPSPEED = "0.19.8"

# A Python that logs what it is asked to do. It answers questions (-c), and makes environments of itself.
PYTHON = f"""
case "$1 $2" in
  -c*Python.h*) test -e "$MACHINE/Python.h"; exit ;;
  -c*) exec {sys.executable} "$@" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac && echo "${{DS_IGNORE_CUDA_DETECTION-unset}} $*" >> "$MACHINE/log"
"""
APT = 'echo "apt-get $*" >> "$MACHINE/log"; touch "$MACHINE/Python.h"; cp "$MACHINE/bin/sh" "$MACHINE/bin/gcc"; ' + (
    'cp "$MACHINE/bin/sh" "$MACHINE/bin/g++"'
)


class Machine:
    """A machine with `tools` of ``compiler``, ``headers`` and ``apt``, and an NVIDIA driver or none."""

    def __init__(self, folder: Path, *tools: str, driver: str | None = None) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for tool in ("sh", "sed", "rm", "touch", "mkdir", "cp"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        executable(self.bin / "python3", PYTHON)
        if "compiler" in tools:
            for name in ("gcc", "g++"):
                executable(self.bin / name, "")
        if "headers" in tools:
            (folder / "Python.h").touch()
        if "apt" in tools:
            executable(self.bin / "apt-get", APT)
        self.drive(driver)

    def drive(self, driver: str | None) -> None:
        if driver is not None:
            executable(self.bin / "nvidia-smi", f"echo {driver}")

    def make(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run make in the checkout, with an environment of this machine's; `log` then holds what it did."""
        (self.folder / "log").unlink(missing_ok=True)
        environment = {"PATH": str(self.bin), "MACHINE": str(self.folder)}
        command = [shutil.which("make"), "-C", str(ROOT), f"VENV={self.folder / 'venv'}", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def installed(self) -> tuple[str, str]:
        """The lines that installed torch and everything else."""
        lines = [line for line in self.log.splitlines() if "pip install" in line and " -c " in line]
        assert len(lines) == 2, self.log
        return tuple(lines)


@pytest.fixture
def machine(tmp_path):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    return lambda *tools, **about: Machine(tmp_path, *tools, **about)


def test_a_machine_without_a_gpu_needs_no_compiler_to_train(machine):
    cpu = machine()
    done = cpu.make("env")
    assert done.returncode == 0, done.stderr
    torch, rest = cpu.installed()
    assert "-c constraints.txt torch==2.13.0" in torch and ".[train,hf,demo,s3,onnx,dev]" in rest
    done = cpu.make("test")  # which compiles
    assert done.returncode == 2 and f"install gcc, g++ and {VERSION}-dev" in done.stderr
    assert "pytest" not in cpu.log


def test_a_gpu_without_the_cuda_toolkit(machine):
    gpu = machine("compiler", "headers", driver="580.65.06")
    assert gpu.make("env").returncode == 0
    torch, rest = gpu.installed()
    assert "-c constraints.txt torch==2.13.0" in torch
    assert rest.startswith("1 ") and ".[train,hf,demo,s3,onnx,dev,gpu]" in rest
    assert gpu.make("env").returncode == 0 and not gpu.log  # nothing is left to do
    assert gpu.make("test").returncode == 0
    assert "-m pytest" in gpu.log and "-n 2" not in gpu.log  # tests of a GPU's size do not run side by side


def test_a_driver_of_cuda_12(machine):
    gpu = machine("compiler", "headers", driver="535.104.05")
    assert gpu.make("env").returncode == 0
    torch, rest = gpu.installed()
    assert "-c constraints-cuda12.txt torch==2.10.0" in torch
    assert "-c constraints-cuda12.txt" in rest and ".[train-cuda12,hf,demo,s3,onnx,dev,gpu]" in rest
    gpu.drive("580.65.06")
    assert gpu.make("env").returncode == 0 and not gpu.log  # an environment keeps its CUDA
    assert gpu.make("env", "CUDA=13").returncode == 0
    assert "-m venv" in gpu.log and "torch==2.13.0" in gpu.log  # rebuilt: DALI's two distributions share folders
    assert gpu.make("env").returncode == 0 and not gpu.log
    done = gpu.make("env", "CUDA=11")
    assert done.returncode == 2 and "CUDA=11: expected 12 or 13" in done.stderr
    assert OLDEST_DRIVER[13] == 580 and "-lt 580" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("there", [(), ("compiler",), ("headers",)])
def test_what_triton_compiles_with_is_brought(machine, there):
    gpu = machine("apt", *there, driver="580.65.06")
    assert gpu.make("env").returncode == 0
    assert f"apt-get install -y -q gcc g++ {VERSION}-dev" in gpu.log
    gpu.installed()


def test_what_triton_compiles_with_is_asked_for(machine):
    gpu = machine("compiler", driver="580.65.06")
    done = gpu.make("env")
    assert done.returncode == 2 and not gpu.log
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert lines == [f"A C compiler or Python.h is missing: install gcc, g++ and {VERSION}-dev"]


# ---------------------------------------------------------------------- DeepSpeed's own set-up


def environment_of_install(machine) -> dict[str, str]:
    """What `make env` adds to the environment of the command that builds DeepSpeed."""
    gpu = machine("compiler", "headers", driver="580.65.06")
    assert gpu.make("env").returncode == 0
    value = gpu.installed()[1].split()[0]
    return {} if value == "unset" else {"DS_IGNORE_CUDA_DETECTION": value}


@pytest.mark.launch
def test_deepspeed_builds_beside_a_gpu_without_nvcc(machine, tmp_path):
    folder = str(tmp_path / "wheels")
    command = [sys.executable, "-m", "pip", "--retries", "0", "--timeout", "20"]
    options = ["--no-deps", "--no-build-isolation", "--no-binary", "deepspeed", "-q"]
    bare = disguised(gpus=1) | {"PIP_NO_CACHE_DIR": "1"}
    download = [*command, "download", *options, "-d", folder, f"deepspeed=={DEEPSPEED}"]
    added = environment_of_install(machine)
    done = subprocess.run(download, env=bare | added, capture_output=True, text=True, timeout=300)
    if "No matching distribution" in done.stderr or "Could not fetch" in done.stderr:
        pytest.skip("DeepSpeed's sources cannot be downloaded here")
    assert done.returncode == 0, done.stdout + done.stderr
    (source,) = Path(folder).glob("deepspeed*.tar.gz")

    def build(environment: dict[str, str]) -> subprocess.CompletedProcess:
        wheel = [*command, "wheel", *options, "-w", folder, str(source)]
        return subprocess.run(wheel, env=environment, capture_output=True, text=True, timeout=300)

    done = build(bare | added)
    assert done.returncode == 0 and list(Path(folder).glob("deepspeed*.whl")), done.stdout + done.stderr
    done = build(bare)
    assert done.returncode != 0 and "MissingCUDAException" in done.stdout + done.stderr


@pytest.mark.launch
def test_deepspeed_is_imported_without_warnings():
    pytest.importorskip("deepspeed")
    code = "from mixreorg_fast.training.distributed import import_deepspeed as load; print(load().__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=disguised(gpus=1), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() and "compatibility check failed" not in done.stdout + done.stderr


# ---------------------------------------------------------------------- pins


def pins(name: str) -> dict[str, str]:
    """Version of each package that a file of constraints, and those that it names, pin."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-c "):
            found |= pins(line[3:])
        elif line:
            package, version = re.fullmatch(r"([A-Za-z0-9-]+)==([0-9.]+)", line).groups()
            assert package not in found
            found[package] = version
    return found


@pytest.fixture
def declared() -> dict:
    """The `[project]` table of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("file", "extra", "torch", "triton", "dali"),
    [
        ("constraints.txt", "train", "2.13.0", "3.7.1", "nvidia-dali-cuda130"),
        ("constraints-cuda12.txt", "train-cuda12", "2.10.0", "3.6.0", "nvidia-dali-cuda120"),
    ],
)
def test_every_requirement_is_pinned_within_its_range(declared, file, extra, torch, triton, dali):
    pinned = pins(file)
    assert (pinned["torch"], pinned["triton"], pinned["deepspeed"]) == (torch, triton, DEEPSPEED) and dali in pinned
    wanted = list(declared["dependencies"])
    for name in (extra, "gpu", "hf", "demo", "s3", "onnx", "dev"):
        wanted += declared["optional-dependencies"][name]
    requirements = [Requirement(text) for text in wanted]
    for requirement in requirements:
        assert requirement.specifier.contains(pinned[requirement.name]), requirement
    assert pinned.keys() == {requirement.name for requirement in requirements}
