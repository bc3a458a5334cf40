"""The fast ops in a model of your own: a toy that learns to segment mixed images from captions alone.

    python examples/fast_ops.py --steps 60

Each toy image shows one of sixteen things. Its patches are a vector of that thing plus noise, its caption is the number
of the thing. A batch shows each thing once. The model embeds patches, groups them twice, and trains with two losses:

* the contrastive loss between pooled image and caption;
* the mixed segmentation loss: patches of four images are mixed, and each patch must name the image it came from.

The ops run as Triton kernels on a GPU and as PyTorch on a CPU. The code below is the same for both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mixreorg_fast import ops

BATCH, PATCHES, CHANNELS, MIXED_IMAGES = 16, 49, 64, 4


class Grouping(nn.Module):
    """Assign every token to one of `groups` learned queries, and average the tokens of each group."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(groups, CHANNELS))
        self.keys, self.values = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Groups ``[B, G, C]`` and the assignment ``[B, G, N]`` that formed them, for tokens ``[B, N, C]``."""
        queries = self.queries.expand(len(tokens), -1, -1)
        groups, assignment = ops.grouping_attention(
            queries, self.keys(tokens), self.values(tokens), hard=False, seed=seed, return_assignment="used"
        )
        return groups, assignment


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.GELU(), nn.Linear(CHANNELS, CHANNELS))
        self.first, self.second = Grouping(8), Grouping(4)
        self.project = nn.Linear(CHANNELS, CHANNELS)
        self.captions = nn.Embedding(BATCH, CHANNELS)
        self.log_scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, patches: Tensor, things: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Both losses of a batch of patches ``[B, N, C]`` and the things ``[B]`` they show."""
        texts = normalize(self.captions(things), dim=-1)
        scale = self.log_scale.exp().clamp(max=100)

        tokens = self.embed(patches)
        segments, _, _ = self.group(tokens, seed)
        contrastive = ops.contrastive_loss(normalize(segments.mean(1), dim=-1), texts, scale)

        plan = ops.MixPlan.sample(len(patches), PATCHES, MIXED_IMAGES, device=patches.device)
        segments, first, second = self.group(ops.patch_mix(tokens, plan), seed)
        mixed = ops.mixed_segmentation_loss(first, second, normalize(segments, dim=-1), texts, plan, scale)
        return contrastive, mixed

    def group(self, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Projected segments ``[B, 4, C]`` and the assignments of both stages."""
        groups, first = self.first(tokens, seed)
        segments, second = self.second(groups, seed)
        return self.project(segments), first, second


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train; print and return the sum of both losses at every step."""
    parser = argparse.ArgumentParser(description="Train a toy with the fast ops.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    device = torch.device(options.device)
    model = Toy().to(device)
    looks = torch.randn(BATCH, 1, CHANNELS, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(options.steps):
        things = torch.randperm(BATCH, device=device)
        patches = looks[things] + 0.5 * torch.randn(BATCH, PATCHES, CHANNELS, device=device)
        contrastive, mixed = model(patches, things, seed=step)
        optimizer.zero_grad()
        (contrastive + mixed).backward()
        optimizer.step()
        losses.append((contrastive + mixed).item())
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3d}  contrastive {contrastive.item():.3f}  mixed {mixed.item():.3f}")
    return losses


if __name__ == "__main__":
    main()
