"""Two nodes for real: network namespaces joined by a cable, one rank in each, trained across it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixreorg_fast.config import ScenesConfig
from mixreorg_fast.data.scenes.folder import ensure_scenes

from .test_faults import STEPS, config

pytestmark = [pytest.mark.launch, pytest.mark.root]

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
NODES = 2


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def nodes():
    """Names of two namespaces whose ``cable`` interfaces are 10.213.7.1 and 10.213.7.2."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"mixreorg{os.getpid()}n{number}" for number in range(NODES)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        _remove(names)
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield names
    _remove(names)


def _remove(names: list[str]) -> None:
    for name in names:  # with the last namespace the cable goes too
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


def test_two_hosts(tmp_path, nodes):
    ensure_scenes(ScenesConfig(folder=str(tmp_path / "scenes"), train=40, val=4, size=32))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(tmp_path, "two_hosts")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "cable"}
    processes = []
    for rank, name in enumerate(nodes):
        launch = ["-m", "torch.distributed.run", "--nnodes", str(NODES), "--node_rank", str(rank)]
        launch += ["--nproc_per_node", "1", "--master_addr", "10.213.7.1", "--master_port", "29571"]
        command = ["ip", "netns", "exec", name, sys.executable, *launch, str(ROOT / "train.py"), "--config", str(path)]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
    try:
        outputs = [process.communicate(timeout=280)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * NODES, "\n".join(o[-3000:] for o in outputs)
    lines = (tmp_path / "runs" / "two_hosts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert json.loads(lines[-1])["samples"] == 8 * STEPS
