"""MixReorg (ICCV 2023): GroupViT, trained with mixed and restored patches beside the original ones.

All randomness of a step is a pure function of (seed, image index): any number of ranks that share a batch draw the
same mixing plans, Gumbel noise and dropped paths, and a resumed run draws the same as an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config import Config
from ..devices import upload
from ..ranks import gather_rows
from .features import Features
from .groupvit import GroupViT
from .layers import LearnedTokens, Projection, call, compiled_call

# Added to a seed, these give independent random streams. The grouping noise takes one stream for each of the three
# branches in each of the two grouping blocks.
_MIXING, _DROP_PATH, _GROUPING = 0, 1, 2
_ORIGINAL, _MIXED, _RESTORED = 0, 1, 2


@dataclass
class Batch:
    """One rank's images and captions of a micro-step."""

    images: Tensor  # [B, 3, H, W], normalised
    ids: Tensor  # int64 [B, L], zero-padded
    lengths: list[int]  # tokens per caption, start and end included
    seed: int | Tensor  # of this micro-step, the same on all ranks (0-d int64 tensor: no recompilation per step)
    first_image: int = 0  # index of this rank's first image within the micro-step's images of all ranks
    noun_ids: Tensor | None = None  # int64 [B, P, L]: prompts of the multi-label loss
    noun_lengths: list[int] | None = None
    done: float = 1.0  # share of the run's steps taken so far, for config.schedule


class MixReorg(nn.Module):
    """The training module: ``forward(batch)`` runs every branch and returns every loss.

    With ``model.method: "groupvit"`` the same code trains the baseline: the original branch alone.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = GroupViT(config.model)
        self.dtype = config.train.dtype
        self.mixing = mixing = config.model.method == "mixreorg"
        # A branch without a loss is computed only as far as another branch needs it.
        asked = (True, mixing and config.loss.mixed > 0, mixing and config.loss.restored > 0)
        self.branches = [branch for branch in (_ORIGINAL, _MIXED, _RESTORED) if asked[branch]]
        self.branch_tokens = None
        if mixing and config.mixing.group_tokens == "learned":
            # One set for each branch but the original; dropped on export.
            made = 2 if _RESTORED in self.branches else 1
            size = (config.model.groups[0], config.model.width)
            self.branch_tokens = nn.ModuleList(LearnedTokens(*size) for _ in range(made))
        for parameter in self.parameters():
            parameter.register_hook(self._kept)

    # ------------------------------------------------------------------ the step

    def forward(
        self,
        batch: Batch,
        others: Sequence[Features] = (),
        gradients: dict[str, Tensor] | None = None,
        at_exchange: Callable[[], None] = lambda: None,
    ) -> dict[str, Tensor]:
        """Losses of one micro-step, 0-d fp32: ``loss`` (their weighted sum, to be differentiated), ``loss_original``
        and, where they apply, ``loss_restored``, ``loss_mixed``, ``loss_multi_label``; detached measures:
        ``mixed_accuracy`` (share of mixed patches whose source is found), ``groups_used`` (segments of an original
        image that own at least one patch), ``group_entropy`` (of the final segments' shares of patches, in nats).

        The contrastive losses are over the micro-step's images of all ranks. ``loss_mixed`` is over this rank's images;
        unless ``loss.mixed_negatives`` is "group", its texts are those of all ranks.

        Args:
            others: cached features of more batches; the losses are over those batches followed by this one.
            gradients: gradients of the losses with respect to this batch's features. Then only ``loss`` is returned,
                a number whose gradients are the losses' gradients through this batch.
            at_exchange: called before the ranks exchange features for the first time.
        """
        features = self.features(batch)
        at_exchange()
        if gradients is not None:
            return {"loss": features.pull(gradients) + 0.0 * self._touched(features)}
        return self.losses(Features.cat([*others, features]), self._progress(batch))

    def features(self, batch: Batch) -> Features:
        """The features that the losses need. Nothing passes between mixing groups or ranks in computing them."""
        if self._replays:
            torch.compiler.cudagraph_mark_step_begin()  # outputs of the step before may be overwritten
        images = len(batch.images)
        plan = self._plan(batch) if self.mixing else None
        drops = self._drops(batch)
        tokens = self._first_stage(batch, plan, drops)
        segments, pooled, assignments = self.backbone.image_encoder.finish(
            tokens, partial(self._assign, batch), drops, self._run
        )
        pooled = dict(zip(self.branches, pooled.split(images), strict=True))
        tensors = {"images": pooled[_ORIGINAL], **self._texts(batch)}
        if _RESTORED in pooled:
            tensors["restored"] = pooled[_RESTORED]
        if _MIXED in pooled:
            first, second = (assignment[_MIXED] for assignment in assignments)
            tensors |= {"segments": segments[images : 2 * images], "first": first, "second": second}
        winners = (assignment[_ORIGINAL] for assignment in assignments)
        return Features(tensors, plan, self._runner()(_usage, *winners, self.config.model.groups[1]))

    def _touched(self, features: Features) -> Tensor:
        """A number that depends on every parameter of :meth:`losses`.

        With an offloaded optimizer, DeepSpeed 0.19 forgets gradients of parameters without one in the last micro-step.
        """
        total = self.backbone.logit_scale.sum()
        for projection, name in ((self.backbone.image_projection, "images"), (self.backbone.text_projection, "texts")):
            projection.norm.eval()  # no statistics, no exchange
            total = total + projection(features.tensors[name][:1].detach()).sum()
            projection.norm.train()
        return total

    def losses(self, features: Features, progress: float = 1.0) -> dict[str, Tensor]:
        """Losses and measures of a whole batch, as :meth:`forward` returns them; `progress`: of config.schedule."""
        loss, tensors = self.config.loss, features.tensors
        texts = self._embeddings(self.backbone.text_projection, tensors, "texts", "nouns")
        multiplier = self.backbone.logit_multiplier()
        images = self._embeddings(self.backbone.image_projection, tensors, "images", "restored", "segments")

        def contrastive(image: str, text: str) -> Tensor:
            return ops.contrastive_loss(images[image], texts[text], multiplier, exchange=loss.exchange)

        out = {"loss_original": contrastive("images", "texts")}
        total = loss.original * out["loss_original"]
        if "restored" in images:
            out["loss_restored"] = contrastive("restored", "texts")
            total = total + loss.restored * out["loss_restored"]
        if "segments" in images:
            negatives, captions = loss.mixed_negatives, texts["texts"]
            captions, first = (captions, 0) if negatives == "group" else gather_rows(captions)
            maps = (tensors["first"], tensors["second"], images["segments"])
            out["loss_mixed"], out["mixed_accuracy"] = ops.mixed_segmentation_loss(
                *maps, captions, features.plan, multiplier, negatives=negatives, first_text=first, return_accuracy=True
            )
            total = total + loss.mixed * self.config.schedule.mixed(progress) * out["loss_mixed"]
        if "nouns" in texts:
            out["loss_multi_label"] = contrastive("images", "nouns")
            total = total + loss.multi_label * out["loss_multi_label"]
        return {"loss": total, **out, **features.measures}

    def _embeddings(self, projection: Projection, tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
        """Embeddings of those `names` that `tensors` has, L2-normalised, from one call of the projection: its batch
        statistics come from the first, the pooled original features."""
        shapes = {name: tensors[name].shape[:-1] for name in names if name in tensors}
        rows = [tensors[name].flatten(0, -2) for name in shapes]
        sizes, several = [len(x) for x in rows], len(rows) > 1  # a single one without copies
        out = projection(torch.cat(rows) if several else rows[0], sizes[0], run=self._runner())
        parts = out.split(sizes) if several else [out]
        return {name: x.unflatten(0, shape) for (name, shape), x in zip(shapes.items(), parts, strict=True)}

    def _plan(self, batch: Batch) -> ops.MixPlan:
        group_size = self.config.mixing.group_size
        sizes = (len(batch.images), self.config.model.patches, group_size)
        seed, first_group = batch.seed + _MIXING, batch.first_image // group_size
        return ops.MixPlan.sample(*sizes, seed=seed, first_group=first_group, device=batch.images.device)

    # ------------------------------------------------------------------ stage 1, the three stages of the paper

    def _first_stage(self, batch: Batch, plan: ops.MixPlan | None, drops: Tensor | None = None) -> Tensor:
        """Patch and group tokens after the blocks of stage 1, those of all branches along the batch,
        ``[branches * B, N + G, C]``; without a `plan` the original branch alone."""
        encoder = self.backbone.image_encoder
        tokens = self._run(encoder.begin, batch.images, self.dtype)
        if plan is None:
            return encoder.run_blocks(tokens, 0, drops=drops, run=self._run)
        contextual = self._contextual(batch)
        tokens = self.contextual_mixing(tokens, plan, drops, contextual)
        tokens = self.progressive_mixing(tokens, plan, drops, contextual)
        return self.restoration(tokens, plan)

    def contextual_mixing(
        self, tokens: Tensor, plan: ops.MixPlan, drops: Tensor | None, contextual: Tensor | None
    ) -> Tensor:
        """``[original | mixed]``, ``[2B, N + G, C]``: the first blocks of stage 1 give each patch the context of its
        image; then patches are mixed across the images of a group.

        Args:
            contextual: bool ``[B, 1, 1]``: True for images whose patches are mixed with context, False for those whose
                patches are mixed as embedded. None: all True.
        """
        context, embedded = self.config.mixing.context_blocks, tokens
        tokens = self.backbone.image_encoder.run_blocks(tokens, 0, 0, context, drops, self._run)
        groups = self._branch_groups(tokens.dtype, _MIXED)
        if contextual is None:
            return ops.mix_tokens(tokens, plan, groups)
        both = ops.mix_tokens(torch.where(contextual, tokens, embedded), plan, groups)
        return torch.cat([tokens, both[len(tokens) :]])

    def progressive_mixing(
        self, tokens: Tensor, plan: ops.MixPlan, drops: Tensor | None, contextual: Tensor | None
    ) -> Tensor:
        """``[original | mixed]`` after the other blocks of stage 1; after each block but the last, the original
        features, mixed by the same plan, are blended into the mixed ones of the `contextual` images."""
        encoder, alpha = self.backbone.image_encoder, self.config.mixing.blend
        last = self.config.model.depths[0] - 1
        for i in range(self.config.mixing.context_blocks, last + 1):
            tokens = encoder.run_blocks(tokens, 0, i, i + 1, drops, self._run)
            if i < last and alpha > 0:
                blended = ops.blend_tokens(tokens, plan, alpha)
                tokens = blended if contextual is None else torch.where(contextual.repeat(2, 1, 1), blended, tokens)
        return tokens

    def restoration(self, tokens: Tensor, plan: ops.MixPlan) -> Tensor:
        """``[original | mixed | restored]``, those with a loss: mixed patches go back to their own images."""
        if _RESTORED not in self.branches:
            return tokens
        groups = self._branch_groups(tokens.dtype, _RESTORED)
        return ops.restore_tokens(tokens, plan, groups, keep_mixed=_MIXED in self.branches)

    def _contextual(self, batch: Batch) -> Tensor | None:
        """See :meth:`contextual_mixing`; ``mixing.context_share`` of the groups are True, evenly over all ranks."""
        mixing, images = self.config.mixing, len(batch.images)
        if mixing.context_share == 1.0:
            return None
        return _spread(mixing.context_share, mixing.group_size, batch.first_image, images, batch.images.device)

    def _branch_groups(self, dtype: torch.dtype, branch: int) -> Tensor | None:
        """Learned group tokens ``[1, G, C]`` of a branch; None: the mixing group's mean of the branch before."""
        return None if self.branch_tokens is None else self.branch_tokens[branch - 1](dtype)

    def _assign(self, batch: Batch, number: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The grouping attention of stage `number`, each branch with noise of its own.

        Returns the collected patches, ``[branches * B, G, C]``, and assignments by branch: for the mixed images the
        assignment that formed the segments, fp32 ``[B, G, N]``; for the original images the winning group of each
        patch, int64 ``[B, N]``.
        """
        hard, noise, tau = self._assignment(batch)
        wanted = {_ORIGINAL: "winner", _MIXED: "used", _RESTORED: "none"}
        collected, assignments = [], {}
        for branch, *qkv in zip(self.branches, *(x.split(len(batch.images)) for x in (q, k, v)), strict=True):
            out = ops.grouping_attention(
                *qkv,
                # softmax((logits + noise * gumbel) / tau), for an op whose noise has no scale of its own.
                scale=self.config.model.width**-0.5 / (noise or 1.0),
                tau=tau / (noise or 1.0),
                hard=hard,
                seed=batch.seed + (_GROUPING + 3 * number + branch) if noise else None,
                first_image=batch.first_image,
                return_assignment=wanted[branch],
            )
            if wanted[branch] != "none":
                out, assignments[branch] = out
            collected.append(out)
        return torch.cat(collected), assignments

    def _progress(self, batch: Batch) -> float:
        return self.config.schedule.progress(batch.done) if self.training else 1.0

    def _assignment(self, batch: Batch) -> tuple[bool, float, float]:
        """The assignment of patches in this step: hard or not, scale of the noise, temperature."""
        model, schedule, progress = self.config.model, self.config.schedule, self._progress(batch)
        hard = model.hard_assignment and not (schedule.soft_start and progress < 1.0)
        noise = schedule.noise(progress) if model.gumbel and self.training else 0.0
        return hard, noise, schedule.tau(model.tau, progress)

    def _run(self, function: Callable, *args, dynamic: bool = False):
        """Call a function of the encoders, compiled and with activation checkpointing where the configuration says so;
        `dynamic`: see :func:`~mixreorg_fast.models.layers.compiled_call`.

        By default captions are not replayed from CUDA graphs. Each new number of caption rows would record their graphs
        anew, and the image encoder's backward after them; DALI's thread may break a recording by waiting for the
        device.
        """
        graphs = self._replays and (not dynamic or self.config.train.cuda_graphs is True)
        run = self._runner(dynamic=dynamic, cuda_graphs=graphs)
        if self.config.train.checkpoint_activations and self.training:
            return checkpoint(run, function, *args, use_reentrant=False, preserve_rng_state=False)
        return run(function, *args)

    @property
    def _replays(self) -> bool:
        return self.training and self.config.replays(self.backbone.device.type)

    def _kept(self, gradient: Tensor) -> Tensor:
        """A gradient that lasts until the optimizer's step: the next replay overwrites a graph's outputs."""
        return gradient.clone() if self._replays else gradient

    def _runner(self, *, dynamic: bool = False, cuda_graphs: bool = False) -> Callable:
        """:func:`~mixreorg_fast.models.layers.call`, compiled where the configuration says so.

        Losses run without CUDA graphs: they call collectives, and leave gradients in cached features, which the next
        replay would overwrite.
        """
        compiles = self.training and self.config.compiles(self.backbone.device.type)
        return compiled_call(dynamic=dynamic, cuda_graphs=cuda_graphs) if compiles else call

    def _drops(self, batch: Batch) -> Tensor | None:
        """Stochastic depth of both residuals of every block, fp32 ``[2, blocks, branches * B]``; None: no drops."""
        rates = self.backbone.image_encoder.drop_rates
        if not self.training or not any(rates):
            return None
        seed, images = batch.seed + _DROP_PATH, batch.images
        return ops.stochastic_depth(
            seed, rates, len(images), branches=3, first_image=batch.first_image, device=images.device
        )

    # ------------------------------------------------------------------ texts

    def _texts(self, batch: Batch) -> dict[str, Tensor]:
        """Features of the captions, ``texts [B, C]``, and of the noun prompts if there are any, ``nouns [B, P, C]``."""
        rows, lengths = batch.ids, list(batch.lengths)
        if batch.noun_ids is not None and batch.noun_lengths is not None:
            rows = torch.cat([rows, batch.noun_ids.flatten(0, 1)])
            lengths += batch.noun_lengths
        features = self.backbone.text_encoder(rows, self.dtype, lengths, partial(self._run, dynamic=True))
        if batch.noun_ids is None:
            return {"texts": features}
        texts, nouns = features.split([len(batch.ids), len(features) - len(batch.ids)])
        return {"texts": texts, "nouns": nouns.unflatten(0, batch.noun_ids.shape[:2])}


@lru_cache(maxsize=64)
def _spread(share: float, group_size: int, first_image: int, images: int, device: torch.device) -> Tensor:
    """See :meth:`MixReorg._contextual`; cached, so that a GPU's copy is made once."""
    groups = torch.arange(first_image, first_image + images, dtype=torch.float64) // group_size
    chosen = ((groups + 1) * share).floor() > (groups * share).floor()
    return upload(chosen[:, None, None], device)


@torch.no_grad()
def _usage(first: Tensor, second: Tensor, groups: int) -> dict[str, Tensor]:
    """Final segments in use per image, of `groups`, and the entropy of their shares of patches. A patch belongs to
    the group that won it, or most of it, in both stages: int64 ``[B, N]`` and ``[B, G1]``."""
    owner = second.gather(1, first)  # [B, N] <- [B, G1] at [B, N]
    shares = F.one_hot(owner, groups).float().mean(1)  # [B, G2]
    used = (shares > 0).sum(1).float().mean()
    return {"groups_used": used, "group_entropy": torch.special.entr(shares).sum(1).mean()}
