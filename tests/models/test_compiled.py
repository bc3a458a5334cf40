"""The step as torch.compile and CUDA see it: no graph break, few graphs, no waiting for the host."""

import copy
from functools import partial

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from mixreorg_fast import ops, ranks
from mixreorg_fast.config import Config
from mixreorg_fast.models import Batch, MixReorg, layers
from mixreorg_fast.models.layers import Projection, call, compiled_call
from tests.tiny import fill, random_batch, tiny_config

pytestmark = pytest.mark.slow


def module(**changes) -> MixReorg:
    model = MixReorg(tiny_config(model={"drop_path": 0.3, "depths": [3, 2, 2]}, **changes))
    fill(model)
    return model


def on(device: torch.device, batch: Batch) -> Batch:
    batch.images, batch.ids = batch.images.to(device), batch.ids.to(device)
    if batch.noun_ids is not None:
        batch.noun_ids = batch.noun_ids.to(device)
    return batch


def gradients(model: MixReorg, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model(batch)["loss"]
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


class Graphs:
    """Stands for torch.compile's backend, and keeps the shapes of each graph's inputs, None for symbolic sizes."""

    def __init__(self, backend: str = "eager"):
        self.shapes: list[list[tuple]] = []
        self._compile = lookup_backend(backend)

    def __call__(self, graph, inputs, mode=None):  # a mode where the part is replayed from CUDA graphs
        values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        shapes = [x.shape if isinstance(x, torch.Tensor) else (x,) for x in values]
        known = lambda n: n.node.maybe_as_int() if isinstance(n, torch.SymInt) else n  # noqa: E731
        compiled = self._compile(graph, inputs)  # raises where Dynamo is to trace again, which is no graph
        self.shapes.append([tuple(map(known, shape)) for shape in shapes])
        return compiled

    @property
    def symbolic(self) -> list[list[tuple]]:
        return [shapes for shapes in self.shapes if any(None in shape for shape in shapes)]


@pytest.fixture
def graphs(request, monkeypatch):
    """:class:`Graphs` of whatever is compiled in this test; the backend is the test's, by default none."""
    torch._dynamo.reset()
    compiled_call.cache_clear()
    graphs = Graphs(getattr(request, "param", "eager"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    yield graphs
    compiled_call.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize(("recompute", "replayed"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("graphs", ["eager", pytest.param("inductor", marks=pytest.mark.gpu)], indirect=True)
def test_compiled_parts_change_nothing_and_share_graphs(recompute, replayed, graphs, device, monkeypatch):
    """Every part is traced whole (fullgraph raises on a break), blocks of one shape are one graph, images have static
    graphs, and captions of other lengths compile nothing new; also where a GPU replays the parts from CUDA graphs."""
    monkeypatch.setattr(Config, "replays", lambda config, device_type: replayed and config.train.compile)
    plain = module(train={"compile": False}).to(device)
    compiled = module(train={"compile": True, "checkpoint_activations": recompute}).to(device)
    for step in range(3):
        batch = on(device, random_batch(plain.config, 8, seed=step, nouns=2))
        (loss, grads), (expected, truth) = gradients(compiled, batch), gradients(plain, batch)
        torch.testing.assert_close(loss, expected)
        for grad, exact in zip(grads, truth, strict=True):
            torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-5)
        if step == 0:
            first = len(graphs.shapes)
    # Image blocks: without and with stochastic depth, alone and with the mixed ones in stage 1, of the three branches
    # in stages 2 and 3. Before, between and after the stages 6. Captions 2, projections 2, the measures of use.
    assert first <= 16
    assert len(graphs.shapes) == first
    # Symbolic are the blocks and the last norm of captions; no other tokens, of images, are in those graphs.
    assert len(graphs.symbolic) == 2
    channels = {shape[-1] for shapes in graphs.symbolic for shape in shapes if None in shape[:-1]}
    assert channels == {plain.config.model.text.width}


@torch.no_grad()
def test_statistics_of_all_ranks_are_in_the_graph_of_a_projection(graphs, monkeypatch):
    """Two ranks with the same rows, pretended: the sum over ranks is an operation of the graph."""
    projection = Projection(8, 12, 4)
    fill(projection)
    alone, rows = copy.deepcopy(projection), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    expected = alone(rows, 4)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(layers, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.mul_(2))
    found = projection(rows, 4, run=compiled_call())
    assert len(graphs.shapes) == 1
    torch.testing.assert_close(found, expected)
    assert projection.norm.num_batches_tracked == 1
    torch.testing.assert_close(projection.norm.running_mean, alone.norm.running_mean)


def test_losses_and_projections_are_one_graph():
    torch._dynamo.reset()
    model = module()
    backbone, config = model.backbone, model.config
    batch = random_batch(config, 8)
    plan = model._plan(batch)

    def tail(patches, groups, texts):
        stage = backbone.image_encoder.stages[0]
        queries, q, k, v = stage.grouping.prepare(patches, groups)
        out, first = ops.grouping_attention(q, k, v, seed=3, return_assignment="used")
        segments = stage.grouping.finish(queries, out)
        rows = torch.cat([segments.mean(1), segments.flatten(0, 1)])
        embeddings = backbone.image_projection(rows, statistics_rows=8)
        images, segments = embeddings[:8], embeddings[8:].unflatten(0, (8, -1))
        second = torch.eye(segments.shape[1]).expand(8, -1, -1)
        multiplier = backbone.logit_multiplier()
        loss = ops.contrastive_loss(images, texts, multiplier)
        return loss + ops.mixed_segmentation_loss(first, second, segments, texts, plan, multiplier)

    width, (groups, _) = config.model.width, config.model.groups
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator)
        for shape in ((8, config.model.patches, width), (8, groups, width), (8, config.model.embed_dim))
    ]
    explained = torch._dynamo.explain(tail)(*inputs)
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("grad_cache", [False, True])
@torch._dynamo.config.patch(recompile_limit=64)
def test_steps_in_cuda_graphs_change_nothing(grad_cache, device):
    """Two micro-steps, summed: replays overwrite neither gradients nor, under GradCache, the features that are kept."""
    torch._dynamo.reset()
    plain = module(train={"compile": False}).to(device)
    graphed = module(train={"cuda_graphs": True}).to(device)
    found = []
    for model in (plain, graphed):
        for seed in range(0, 8, 2):  # graphs are recorded in the second round and replayed from the third on
            model.zero_grad()
            batches = [on(device, random_batch(model.config, 8, seed=seed + number)) for number in range(2)]
            if grad_cache:
                with torch.no_grad():
                    cached = [model.features(batches[0]).cached()]
                model(batches[1], cached)["loss"].backward()
                model(batches[0], (), cached[0].gradients())["loss"].backward()
            else:
                for batch in batches:
                    model(batch)["loss"].backward()
            found.append([p.grad.clone() for p in model.parameters()])
    for exact, grads in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(grads, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_host_never_waits(precision, device):
    model = module(train={"precision": precision, "compile": False}, loss={"multi_label": 0.5}).to(device)
    batch = on(device, random_batch(model.config, 8, nouns=2))
    batch.seed = torch.tensor(batch.seed, device=device)
    model(batch)["loss"].backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("setting", "captions_too"), [(None, False), (True, True)])
def test_captions_are_replayed_only_if_asked_for(setting, captions_too, monkeypatch):
    """Their number of rows changes, and with it everything that is recorded behind them."""
    asked = set()
    monkeypatch.setattr(MixReorg, "_replays", True)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(
        MixReorg, "_runner", lambda self, dynamic=False, cuda_graphs=False: asked.add((dynamic, cuda_graphs)) or call
    )
    model = module(train={"cuda_graphs": setting})
    model(random_batch(model.config, 8))
    assert {graphs for dynamic, graphs in asked if dynamic} == {captions_too}
    assert (False, True) in asked  # the image encoder's
