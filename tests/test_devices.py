"""The choice of a device, beside drivers that PyTorch can and cannot use, and ranks of a node."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixreorg_fast import devices, ranks
from mixreorg_fast.data.shards.pair import write_shard
from mixreorg_fast.devices import Driver, choose
from mixreorg_fast.errors import RankError, UserError
from tests.data.conftest import pairs
from tests.disguise import disguised, nvml

ROOT = Path(__file__).parents[1]
OLD = Driver("535.104.05", 2)


@pytest.fixture
def machine(monkeypatch):
    """``machine(driver, cuda, gpus)``: the driver found, CUDA of PyTorch's build, GPUs that PyTorch can use."""
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def become(driver: Driver | None, cuda: str | None, gpus: int) -> None:
        monkeypatch.setattr(devices, "driver", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return become


def test_a_gpu_that_pytorch_can_use_is_taken(machine, monkeypatch):
    machine(Driver("580.65.06", 2), "13.0", 2)
    assert choose() == choose("cuda") == torch.device("cuda", 0)
    assert choose("cuda:1") == torch.device("cuda", 1) and choose("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RankError, match="local rank 2 has no GPU: this node has 2"):
        choose()
    with pytest.raises(UserError, match="--device cuda:5: no such GPU: this node has 2"):
        choose("cuda:5")
    machine(None, "12.8", 2)  # NVML is missing: PyTorch knows better
    assert choose("cuda:0") == torch.device("cuda", 0)


def test_bf16_products(monkeypatch):
    for capability, native in (((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert devices.has_bf16_products(torch.device("cuda", 0)) == native
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=native: found)
        assert devices.has_bf16_products(torch.device("cpu")) == native
    assert not devices.has_bf16_products(torch.device("meta"))


@pytest.mark.parametrize(
    ("driver", "cuda", "parts", "not_said"),
    [
        (OLD, "13.0", ["2 NVIDIA GPUs", "driver 535.104.05", "CUDA 13.0 needs driver 580", "make env CUDA=12"], "nvcc"),
        (Driver("470.57", 1), "13.0", ["1 NVIDIA GPU ", "needs driver 580 or newer: update the driver"], "CUDA=12"),
        (Driver("470.57", 1), "12.8", ["needs driver 525 or newer: update the driver"], "CUDA=12"),
        (Driver("580.65", 1), None, ["is built without CUDA"], "CUDA=12"),
        (Driver("580.65", 1), "13.0", ["cannot use them: see nvidia-smi"], "CUDA=12"),
        (Driver("unknown", 1, "Driver/library version mismatch"), "13.0", ["Driver/library version mismatch"], "=12"),
    ],
)
def test_a_gpu_that_pytorch_cannot_use_is_no_reason_to_take_the_cpu(machine, driver, cuda, parts, not_said):
    machine(driver, cuda, 0)
    for name in (None, "cuda"):
        with pytest.raises(UserError) as caught:
            choose(name)
        message = str(caught.value)
        assert all(part in message for part in [*parts, "--device cpu"]), message
        assert not_said not in message and "\n" not in message
    assert choose("cpu") == torch.device("cpu")


def test_the_cpu_is_taken_where_there_is_no_gpu_or_it_is_hidden(machine, monkeypatch):
    machine(None, "13.0", 0)
    assert choose() == torch.device("cpu")
    with pytest.raises(UserError, match="no CUDA GPU is visible"):
        choose("cuda")
    with pytest.raises(UserError, match="--device cda: not available here"):
        choose("cda")
    machine(OLD, "13.0", 0)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert choose() == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the deepspeed launcher sets the other one itself
    machine(Driver("580.65", 1), "13.0", 1)
    assert choose() == torch.device("cpu")


def test_ranks_of_a_node(monkeypatch):
    for name in ("LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.local_rank(), ranks.local_size()) == (0, 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_SIZE", "4")  # of the deepspeed launcher
    assert (ranks.local_rank(), ranks.local_size()) == (1, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of torchrun
    assert ranks.local_size() == 2


# ---------------------------------------------------------------------- a machine whose driver is too old


@pytest.fixture(scope="module")
def old_driver(tmp_path_factory):
    """Environment of a machine with two GPUs under driver 535, where PyTorch, built for CUDA 13, sees none."""
    if not shutil.which("gcc"):
        pytest.skip("the stub of NVIDIA's library is compiled with gcc")
    folder = nvml(tmp_path_factory.mktemp("nvml"), OLD.version, OLD.gpus)
    return disguised(cuda="13.0", gpus=0) | {"LD_LIBRARY_PATH": str(folder)}


@pytest.mark.launch
def test_the_driver_is_found(old_driver):
    code = "from mixreorg_fast.devices import driver; found = driver(); print(found.version, found.gpus)"
    done = subprocess.run([sys.executable, "-c", code], env=old_driver, capture_output=True, text=True)
    assert done.stdout.split() == [OLD.version, str(OLD.gpus)], done.stderr


@pytest.mark.launch
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "mixreorg_fast.training.command", "--config", str(ROOT / "configs" / "zero2.json")],
        ["-m", "mixreorg_fast.cli", "shards", "verify", "{shard}"],
        ["-m", "mixreorg_fast.cli", "study", str(ROOT / "configs" / "study_cpu.json")],
        ["-m", "mixreorg_fast.cli", "demo"],
    ],
    ids=["train", "verify", "study", "demo"],
)
def test_commands_say_it_in_one_line(old_driver, tmp_path, command):
    shard = tmp_path / "a.tar"
    shard.write_bytes(bytes(10240))
    command = [part.format(shard=shard) for part in command]
    done = subprocess.run(
        [sys.executable, *command], env=old_driver, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: this machine has 2 NVIDIA GPUs (driver 535.104.05)"), lines
    assert list(tmp_path.iterdir()) == [shard]


@pytest.mark.launch
def test_info_says_it_too(old_driver):
    done = subprocess.run(
        [sys.executable, "-m", "mixreorg_fast.info"], env=old_driver, capture_output=True, text=True, timeout=120
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("CUDA"))
    assert "no: this machine has 2 NVIDIA GPUs (driver 535.104.05)" in line and "580" in line


@pytest.mark.launch
def test_shards_are_verified_on_the_cpu_when_that_is_asked_for(old_driver, tmp_path):
    pytest.importorskip("nvidia.dali")

    write_shard(tmp_path / "a.tar", pairs(3))
    for options, hidden in ((["--device", "cpu"], {}), ([], {"CUDA_VISIBLE_DEVICES": ""})):
        command = [sys.executable, "-m", "mixreorg_fast.cli", "shards", "verify", str(tmp_path / "a.tar"), *options]
        done = subprocess.run(command, env={**old_driver, **hidden}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "3 samples are sound" in done.stdout, done.stderr
