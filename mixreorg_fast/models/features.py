"""Features of a batch, and what GradCache (Gao et al., 2021) does with those of many micro-steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops


@dataclass
class Features:
    """Everything before the projections, which is all that the losses need of a batch.

    Only the projections (their batch statistics) and the losses combine images of several micro-steps. The features of
    many micro-steps fit where the activations of one do. So GradCache keeps the features, computes the losses of all of
    them and the gradients with respect to the features, and recomputes each micro-step's forward to propagate its
    gradients.
    """

    # Rows: an image each. "images" [B, C] and "restored" [B, C], pooled; "texts" [B, C'] and "nouns" [B, P, C'];
    # of the mixed images "segments" [B, G2, C] and their assignments "first" [B, G1, N], "second" [B, G2, G1].
    tensors: dict[str, Tensor]
    plan: ops.MixPlan | None
    measures: dict[str, Tensor]  # detached means over the batch

    @classmethod
    def cat(cls, parts: Sequence[Features]) -> Features:
        """Features of equally large batches, one after the other."""
        if len(parts) == 1:
            return parts[0]
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        measures = {name: torch.stack([p.measures[name] for p in parts]).mean(0) for name in parts[0].measures}
        plan = parts[0].plan
        if plan is not None:
            images = len(plan.source)
            source, inverse = (
                torch.cat([getattr(part.plan, name) + number * images for number, part in enumerate(parts)])
                for name in ("source", "inverse")
            )
            plan = ops.MixPlan(source, inverse, plan.group_size)
        return cls(tensors, plan, measures)

    def cached(self) -> Features:
        """A copy without the graph of its forward; the losses leave their gradients in the copy."""
        # Copies, since the next replay of a CUDA graph overwrites its outputs.
        tensors = {name: x.detach().clone().requires_grad_() for name, x in self.tensors.items()}
        return Features(tensors, self.plan, self.measures)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the losses with respect to these :meth:`cached` features."""
        return {name: x.grad for name, x in self.tensors.items() if x.grad is not None}

    def pull(self, gradients: dict[str, Tensor]) -> Tensor:
        """A number whose gradient with respect to these features is `gradients`."""
        return torch.stack([(x.float() * gradients[name]).sum() for name, x in self.tensors.items()]).sum()
