"""Memory and time of one rank's share of the ring exchange, its peers' features generated where they would arrive.

    python -m benchmarks.contrastive_memory                  # a share of 512, global batches of 4,096 to 262,144
    python -m benchmarks.contrastive_memory --local 512 --ranks 512
    python -m benchmarks.contrastive_memory --predict        # no measurement: the time model of docs/scaling.md

Each case runs in a process of its own. Memory is the rise of the resident set (on a GPU: of allocated memory) during
forward and backward, with the inputs in place before it. All cases together are written to
benchmarks/results/ring_<device>.json.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from mixreorg_fast import ledger
from mixreorg_fast.ops.contrastive_blocks import TORCH, TRITON
from mixreorg_fast.ops.contrastive_loss import ring_gradient, ring_log_sum_exp

from .harness import RESULTS
from .memory import peak_bytes


class GeneratedPeers:
    """A ring whose other ranks do not exist: what they would send is drawn at random."""

    def __init__(self, size: int):
        self.size = size

    def pass_on(self, *tensors, tag=0):
        def draw(x):
            return F.normalize(torch.randn_like(x), dim=-1) if x.dim() == 2 and not tag else x.clone()

        received = [draw(x) for x in tensors]
        return lambda: received


def measure(local: int, ranks: int, width: int, dtype: torch.dtype) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = TRITON if device.type == "cuda" else TORCH
    ring, scale = GeneratedPeers(ranks), torch.tensor(14.3, device=device)
    image, texts = (F.normalize(torch.randn(local, width, device=device, dtype=dtype), dim=-1) for _ in range(2))

    def share(peers):
        lse = ring_log_sum_exp(image, texts, scale, peers, blocks)
        return ring_gradient(image, texts, *lse, scale, peers, blocks)

    share(GeneratedPeers(1))  # libraries load, pools are made
    begin = time.perf_counter()
    peak = peak_bytes(lambda: share(ring))
    seconds = time.perf_counter() - begin
    return {
        "local": local,
        "ranks": ranks,
        "global": local * ranks,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "peak_mb": round(peak / 2**20, 1),
        "seconds": round(seconds, 2),
        "all_features_mb": round(2 * local * ranks * width * image.element_size() / 2**20, 1),
        "similarity_matrix_mb": round((local * ranks) ** 2 * image.element_size() / 2**20),
    }


def predict(local: int, ranks: int, width: int, *, element: int = 2) -> dict:
    """Bytes that a rank receives per step (gather, ring) and the time of its network and of its products.

    A rank's link is NVLink within a node of 8 GPUs, else a 400 Gb/s card; products run at 400 TFLOP/s.
    """
    total, link, rate = local * ranks, 450e9 if ranks <= 8 else 50e9, 400e12
    others, feature = total - local, width * element
    gather = 2 * others * feature + 12 * others
    ring = others * feature + 4 * total + others * (feature + 4) + 4 * total * width
    product = 2 * local * total * width / rate
    return {
        "ranks": ranks,
        "global": total,
        "received_mb": [f"{x / 1e6:.3g}" for x in (gather, ring)],
        "network_ms": [f"{x / link * 1e3:.2g}" for x in (gather, ring)],
        "products_ms": [f"{x * product * 1e3:.2g}" for x in (2 + 4, 1 + 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=int, default=512, help="samples of the rank")
    parser.add_argument("--ranks", type=int, help="default: 8, 64 and 512, one after the other")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--predict", action="store_true", help="print the time model instead")
    options = parser.parse_args()
    if options.predict:
        for ranks in [options.ranks] if options.ranks else (8, 64, 512):
            print(json.dumps(predict(options.local, ranks, options.width)))
        return
    if options.ranks:
        print(json.dumps(measure(options.local, options.ranks, options.width, getattr(torch, options.dtype))))
        return
    rows = []
    for ranks in (8, 64, 512):
        command = [sys.executable, "-m", "benchmarks.contrastive_memory", *sys.argv[1:], "--ranks", str(ranks)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(result.stdout, end="", flush=True)
        rows.append({"suite": "ring", **json.loads(result.stdout.splitlines()[-1])})
    path = RESULTS / f"ring_{ledger.file_stem(ledger.device_name())}.json"
    ledger.write_rows(path, ledger.versions("python -m benchmarks.contrastive_memory"), rows, keep=lambda row: False)


if __name__ == "__main__":
    main()
