"""MixReorg (ICCV 2023): GroupViT, trained with mixed and restored patches beside the original ones.

All randomness of a step is a pure function of (seed, image index): any number of ranks that share a batch draw the
same mixing plans, Gumbel noise and dropped paths, and a resumed run draws what the uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config import Config
from ..ranks import gather_rows
from .encoders import Stage
from .groupvit import GroupViT
from .layers import LearnedTokens, Projection, call, compiled_call

# What a seed is used for; added to it, these give independent streams. The grouping noise has one for each of the
# three branches of each of the two grouping blocks.
_MIXING, _DROP_PATH, _GROUPING = 0, 1, 2
_ORIGINAL, _MIXED, _RESTORED = 0, 1, 2


@dataclass
class Batch:
    """What one rank's forward needs of a micro-step."""

    images: Tensor  # [B, 3, H, W], normalised
    ids: Tensor  # int64 [B, L], zero-padded
    lengths: list[int]  # tokens per caption, start and end included
    seed: int | Tensor  # of this micro-step, the same on all ranks (0-d int64 tensor: no recompilation per step)
    first_image: int = 0  # index of this rank's first image within the micro-step's images of all ranks
    noun_ids: Tensor | None = None  # int64 [B, P, L]: prompts of the multi-label loss
    noun_lengths: list[int] | None = None
    done: float = 1.0  # share of the run's steps taken so far, for config.schedule


@dataclass
class Features:
    """What the losses need of a batch: all that comes before the projections, where images first meet each other.

    So small that those of many micro-steps fit where the activations of one do: GradCache (Gao et al., 2021) keeps
    them, finds the losses and their gradients with respect to them, and recomputes what leads to them.
    """

    # Rows: an image each. "images" [B, C] and "restored" [B, C], pooled; "texts" [B, C'] and "nouns" [B, P, C'];
    # of the mixed images "segments" [B, G2, C] and their assignments "first" [B, G1, N], "second" [B, G2, G1].
    tensors: dict[str, Tensor]
    plan: ops.MixPlan | None
    measures: dict[str, Tensor]  # detached means over the batch

    @classmethod
    def cat(cls, parts: Sequence[Features]) -> Features:
        """Of equally large batches, one after the other."""
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
        """Without the graph that led to them; losses of them leave their gradients here."""
        # Copies, for what a CUDA graph put out is overwritten by its next replay.
        tensors = {name: x.detach().clone().requires_grad_() for name, x in self.tensors.items()}
        return Features(tensors, self.plan, self.measures)

    def gradients(self) -> dict[str, Tensor]:
        """Of the losses, with respect to these :meth:`cached` features."""
        return {name: x.grad for name, x in self.tensors.items()}

    def pull(self, gradients: dict[str, Tensor]) -> Tensor:
        """A number whose gradient with respect to these features is `gradients`."""
        return torch.stack([(x.float() * gradients[name]).sum() for name, x in self.tensors.items()]).sum()


class MixReorg(nn.Module):
    """The training module: ``forward(batch)`` runs every branch and returns every loss.

    With ``model.method: "groupvit"`` the same code trains the baseline: the original branch alone.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = GroupViT(config.model)
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.mixing = mixing = config.model.method == "mixreorg"
        # A branch that no loss asks for is not computed past the place where another needs it.
        asked = (True, mixing and config.loss.mixed > 0, mixing and config.loss.restored > 0)
        self.branches = [branch for branch in (_ORIGINAL, _MIXED, _RESTORED) if asked[branch]]
        depth = sum(config.model.depths)
        # Stochastic depth grows linearly with the block's number, as in DeiT.
        self.drop_rates = [config.model.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        if self.mixing and config.mixing.group_tokens == "learned":
            # One set for each branch that has no group tokens of its own; dropped on export.
            made = 2 if _RESTORED in self.branches else 1
            size = (config.model.groups[0], config.model.width)
            self.branch_tokens = nn.ModuleList(LearnedTokens(*size) for _ in range(made))
        else:
            self.branch_tokens = None
        if config.train.cuda_graphs:
            # The next replay overwrites what a graph puts out, and gradients have to last for the optimizer's step.
            for parameter in self.parameters():
                parameter.register_hook(Tensor.clone)

    # ------------------------------------------------------------------ the step

    def forward(
        self,
        batch: Batch,
        others: Sequence[Features] = (),
        gradients: dict[str, Tensor] | None = None,
        at_exchange: Callable[[], None] = lambda: None,
    ) -> dict[str, Tensor]:
        """Losses of one micro-step, 0-d fp32: ``loss`` (their weighted sum, what to differentiate), ``loss_original``
        and, where they apply, ``loss_restored``, ``loss_mixed``, ``loss_multi_label``; detached measures:
        ``mixed_accuracy`` (share of mixed patches whose source is found), ``groups_used`` (segments of an original
        image that own at least one patch), ``group_entropy`` (of the final segments' shares of patches, in nats).

        The contrastive losses are over the micro-step's images of all ranks, ``loss_mixed`` over this rank's (its
        texts, with ``loss.mixed_negatives: batch``, over those of all ranks).

        Args:
            others: cached features of more batches, which stand before this one in the batch that the losses are of.
            gradients: of the losses with respect to this batch's features, as found before; then only ``loss`` is
                returned, a number whose gradients are those that the losses have by way of this batch.
            at_exchange: called before the ranks exchange features for the first time.
        """
        features = self.features(batch)
        at_exchange()
        if gradients is not None:
            return {"loss": features.pull(gradients) + 0.0 * self._touched(features)}
        return self.losses(Features.cat([*others, features]), self._progress(batch))

    def features(self, batch: Batch) -> Features:
        """Everything before the projections: each image, group of images or caption on its own, no other rank."""
        if self.config.train.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # nothing of the step before is needed any more
        images = len(batch.images)
        plan = self._plan(batch) if self.mixing else None
        drops = self._drops(batch)
        tokens = self._first_stage(batch, plan, drops)
        segments, pooled, used, winners = self._group(batch, tokens, drops)
        pooled = dict(zip(self.branches, pooled.split(images), strict=True))
        tensors = {"images": pooled[_ORIGINAL], **self._texts(batch)}
        if _RESTORED in pooled:
            tensors["restored"] = pooled[_RESTORED]
        if _MIXED in pooled:
            tensors |= {"segments": segments[images : 2 * images], "first": used[0], "second": used[1]}
        return Features(tensors, plan, self._runner()(_usage, *winners, self.config.model.groups[1]))

    def _touched(self, features: Features) -> Tensor:
        """Some number that every parameter of :meth:`losses` has a part in.

        Where its optimizer is offloaded, DeepSpeed 0.19 forgets the gradients of a step's earlier micro-steps for
        parameters that have none in the last one.
        """
        total = self.backbone.logit_scale.sum()
        for name in ("image", "text"):
            projection: Projection = getattr(self.backbone, f"{name}_projection")
            projection.norm.eval()  # no statistics, no exchange
            total = total + projection(features.tensors[f"{name}s"][:1].detach()).sum()
            projection.norm.train()
        return total

    def losses(self, features: Features, progress: float = 1.0) -> dict[str, Tensor]:
        """What :meth:`forward` returns, of the features of a whole batch; `progress`: of config.schedule."""
        loss, tensors = self.config.loss, features.tensors
        images = len(tensors["images"])
        texts, nouns = self._text_embeddings(tensors)
        multiplier = self.backbone.logit_multiplier()
        exchange = loss.exchange
        # One call of the projection: its batch statistics come from the pooled original features, the first rows.
        rows = [tensors[name] for name in ("images", "restored") if name in tensors]
        if "segments" in tensors:
            rows.append(tensors["segments"].flatten(0, 1))
        rows = torch.cat(rows)
        embeddings = self.backbone.image_projection(rows, images, run=self._runner())

        out = {"loss_original": ops.contrastive_loss(embeddings[:images], texts, multiplier, exchange=exchange)}
        total = loss.original * out["loss_original"]
        if "restored" in tensors:
            restored = embeddings[images : 2 * images]
            out["loss_restored"] = ops.contrastive_loss(restored, texts, multiplier, exchange=exchange)
            total = total + loss.restored * out["loss_restored"]
        if "segments" in tensors:
            first, second, plan = tensors["first"], tensors["second"], features.plan
            mixed_embeddings = embeddings[-images * second.shape[1] :].unflatten(0, (images, -1))
            negatives = loss.mixed_negatives
            named, first_text = gather_rows(texts) if negatives == "batch" else (texts, 0)
            out["loss_mixed"], out["mixed_accuracy"] = ops.mixed_segmentation_loss(
                first,
                second,
                mixed_embeddings,
                named,
                plan,
                multiplier,
                negatives=negatives,
                first_text=first_text,
                return_accuracy=True,
            )
            total = total + loss.mixed * self.config.schedule.mixed(progress) * out["loss_mixed"]
        if nouns is not None:
            out["loss_multi_label"] = ops.contrastive_loss(embeddings[:images], nouns, multiplier, exchange=exchange)
            total = total + loss.multi_label * out["loss_multi_label"]
        return {"loss": total, **out, **features.measures}

    def _plan(self, batch: Batch) -> ops.MixPlan:
        group_size = self.config.mixing.group_size
        return ops.MixPlan.sample(
            len(batch.images),
            self.config.model.patches,
            group_size,
            device=batch.images.device,
            seed=batch.seed + _MIXING,
            first_group=batch.first_image // group_size,
        )

    # ------------------------------------------------------------------ image branches

    def _first_stage(self, batch: Batch, plan: ops.MixPlan | None, drops: Tensor | None = None) -> Tensor:
        """Patch and group tokens after the blocks of stage 1, those of all branches along the batch,
        ``[branches * B, N + G, C]``."""
        stage: Stage = self.backbone.image_encoder.stages[0]
        x = self._run(self.backbone.image_encoder.begin, batch.images, self.dtype)
        if plan is None:
            return self._run_blocks(drops, stage, x, 0)
        context, alpha = self.config.mixing.context_blocks, self.config.mixing.blend
        x = self._run_blocks(drops, stage, x, 0, 0, context)

        # Contextual mixing: patches that already know their image are mixed across the images of a group.
        x = ops.mix_tokens(x, plan, self._branch_groups(x.dtype, _MIXED))  # [2B, N + G, C]
        last = len(stage.blocks) - 1
        for i in range(context, last + 1):
            x = self._run_blocks(drops, stage, x, 0, i, i + 1)
            if i < last and alpha > 0:  # progressive mixing
                x = ops.blend_tokens(x, plan, alpha)

        if _RESTORED not in self.branches:
            return x
        # Restoration: mixed patches go back to the images they came from.
        groups = self._branch_groups(x.dtype, _RESTORED)
        return ops.restore_tokens(x, plan, groups, keep_mixed=_MIXED in self.branches)

    def _branch_groups(self, dtype: torch.dtype, branch: int) -> Tensor | None:
        """Learned group tokens ``[1, G, C]`` of a branch; None: the mixing group's mean of the branch before."""
        return None if self.branch_tokens is None else self.branch_tokens[branch - 1](dtype)

    def _group(
        self, batch: Batch, x: Tensor, drops: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """The shared grouping tail.

        Returns the final segments ``[branches * B, G2, C]`` after the last norm, their means ``[branches * B, C]``,
        and of both grouping blocks what somebody reads of their assignments: of the mixed branch the one that formed
        the segments, fp32 ``[B, G, N]``, of the original branch each patch's winning group, int64 ``[B, N]``.
        """
        encoder = self.backbone.image_encoder
        hard, noise, tau = self._assignment(batch)
        assignments = {_ORIGINAL: [], _MIXED: [], _RESTORED: []}
        wanted = {_ORIGINAL: "winner", _MIXED: "used", _RESTORED: "none"}
        for number, stage in enumerate(encoder.stages):
            if number:
                x = self._run_blocks(drops, stage, x, number)
            if stage.grouping is None:
                break
            queries, *qkv = self._run(stage.prepare, x)
            collected = []
            for branch, q, k, v in zip(self.branches, *(t.split(len(batch.images)) for t in qkv), strict=True):
                out = ops.grouping_attention(
                    q,
                    k,
                    v,
                    # softmax((logits + noise * gumbel) / tau), for an op whose noise has no scale of its own.
                    scale=self.config.model.width**-0.5 / (noise or 1.0),
                    tau=tau / (noise or 1.0),
                    hard=hard,
                    seed=batch.seed + (_GROUPING + 3 * number + branch) if noise else None,
                    first_image=batch.first_image,
                    return_assignment=wanted[branch],
                )
                if wanted[branch] != "none":
                    out, assignment = out
                    assignments[branch].append(assignment)
                collected.append(out)
            x = self._run(encoder.advance, x, queries, torch.cat(collected), number)
        return *self._run(encoder.end, x), assignments[_MIXED], assignments[_ORIGINAL]

    def _progress(self, batch: Batch) -> float:
        return self.config.schedule.progress(batch.done) if self.training else 1.0

    def _assignment(self, batch: Batch) -> tuple[bool, float, float]:
        """How patches are assigned in this step: hard or not, scale of the noise, temperature."""
        model, schedule, progress = self.config.model, self.config.schedule, self._progress(batch)
        hard = model.hard_assignment and not (schedule.soft_start and progress < 1.0)
        noise = schedule.noise(progress) if model.gumbel and self.training else 0.0
        return hard, noise, schedule.tau(model.tau, progress)

    def _run_blocks(
        self, drops: Tensor | None, stage: Stage, x: Tensor, number: int, start: int = 0, end: int | None = None
    ) -> Tensor:
        """Blocks `start` to `end` of stage `number`; `drops`: of :meth:`_drops`."""
        offset = sum(self.config.model.depths[:number])
        for i in range(start, len(stage.blocks) if end is None else end):
            x = self._run(stage.blocks[i], x, self._keep(drops, offset + i, len(x)))
        return x

    def _run(self, function: Callable, *args, dynamic: bool = False):
        """Call a part of the encoders, compiled and recomputing activations in backward where the configuration says
        so; `dynamic`: see :func:`~mixreorg_fast.models.layers.compiled_call`."""
        run = self._runner(dynamic=dynamic, cuda_graphs=self.config.train.cuda_graphs)
        if self.config.train.checkpoint_activations and self.training:
            return checkpoint(run, function, *args, use_reentrant=False, preserve_rng_state=False)
        return run(function, *args)

    def _runner(self, *, dynamic: bool = False, cuda_graphs: bool = False) -> Callable:
        """:func:`~mixreorg_fast.models.layers.call`, compiled where the configuration says so.

        What follows the features runs without CUDA graphs: it holds collectives, and leaves gradients in cached
        features, which the next replay would overwrite.
        """
        compiles = self.training and self.config.compiles(self.backbone.device.type)
        return compiled_call(dynamic=dynamic, cuda_graphs=cuda_graphs) if compiles else call

    def _drops(self, batch: Batch) -> Tensor | None:
        """Stochastic depth of both residuals of every block, fp32 ``[2, blocks, branches * B]``. None where nothing is
        dropped."""
        if not self.training or not any(self.drop_rates):
            return None
        return ops.stochastic_depth(
            batch.seed + _DROP_PATH,
            self.drop_rates,
            len(batch.images),
            branches=3,
            first_image=batch.first_image,
            device=batch.images.device,
        )

    def _keep(self, drops: Tensor | None, block: int, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """What to multiply both residuals of a block by, per row."""
        if drops is None or not self.drop_rates[block]:
            return None, None
        return drops[:, block, :rows].unbind()

    # ------------------------------------------------------------------ texts

    def _texts(self, batch: Batch) -> dict[str, Tensor]:
        """Features of the captions, ``texts [B, C]``, and of the noun prompts if there are any, ``nouns [B, P, C]``."""
        rows, lengths = batch.ids, list(batch.lengths)
        if batch.noun_ids is not None:
            rows = torch.cat([rows, batch.noun_ids.flatten(0, 1)])
            lengths += batch.noun_lengths
        features = self.backbone.text_encoder(rows, self.dtype, lengths, partial(self._run, dynamic=True))
        if batch.noun_ids is None:
            return {"texts": features}
        texts, nouns = features.split([len(batch.ids), len(features) - len(batch.ids)])
        return {"texts": texts, "nouns": nouns.unflatten(0, (len(batch.ids), -1))}

    def _text_embeddings(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the captions ``[B, D]`` and of the noun prompts ``[B, P, D]``, L2-normalised."""
        texts, nouns = tensors["texts"], tensors.get("nouns")
        rows = texts if nouns is None else torch.cat([texts, nouns.flatten(0, 1)])
        embeddings = self.backbone.text_projection(rows, len(texts), run=self._runner())
        if nouns is None:
            return embeddings, None
        captions, nouns = embeddings.split([len(texts), len(embeddings) - len(texts)])
        return captions, nouns.unflatten(0, (len(texts), -1))


@torch.no_grad()
def _usage(first: Tensor, second: Tensor, groups: int) -> dict[str, Tensor]:
    """Final segments in use per image, of `groups`, and the entropy of their shares of patches. A patch belongs to
    the group that won it, or most of it, in both stages: int64 ``[B, N]`` and ``[B, G1]``."""
    owner = second.gather(1, first)  # [B, N] <- [B, G1] at [B, N]
    shares = F.one_hot(owner, groups).float().mean(1)  # [B, G2]
    used = (shares > 0).sum(1).float().mean()
    return {"groups_used": used, "group_entropy": torch.special.entr(shares).sum(1).mean()}
