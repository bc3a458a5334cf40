"""Official .pth files: their names, and that no code of a file runs."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import re
import sys
import types
import typing

import pytest
import torch
from safetensors.torch import load_file

import mixreorg_fast
from mixreorg_fast.models import pth

from .conversion import convert, refusal
from .huggingface import SMALL, VOCABULARY, random_ids, random_images, random_model, state_equal


def nvlabs_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors under NVlabs' names, written down here a second time as rules of replacement."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in (
            (r"^vision_model\.embeddings\.patch_embeddings\.projection", "img_encoder.patch_embed.proj"),
            (r"^vision_model\.embeddings\.layernorm", "img_encoder.patch_embed.norm"),
            (r"^vision_model\.embeddings\.position_embeddings", "img_encoder.pos_embed"),
            (r"^vision_model\.layernorm", "img_encoder.norm"),
            (r"^vision_model\.encoder\.stages\.(\d+)\.layers", r"img_encoder.layers.\1.blocks"),
            (r"^vision_model\.encoder\.stages", "img_encoder.layers"),
            (r"^(img.*)\.layer_norm", r"\1.norm"),
            (r"^(img.*)\.self_attn\.out_proj", r"\1.attn.proj"),
            (r"^(img.*)\.pre_assign_attn\.attn\.out_proj", r"\1.pre_assign_attn.attn.proj"),
            (r"^(img.*)\.self_attn", r"\1.attn"),
            (r"^text_model\.embeddings\.token_embedding", "text_encoder.token_embedding"),
            (r"^text_model\.embeddings\.position_embedding\.weight", "text_encoder.positional_embedding"),
            (r"^text_model\.final_layer_norm", "text_encoder.ln_final"),
            (r"^text_model\.encoder\.layers", "text_encoder.transformer.resblocks"),
            (r"^(text.*)\.layer_norm", r"\1.ln_"),
            (r"^(text.*)\.self_attn", r"\1.attn"),
            (r"^(text.*)\.mlp\.fc1", r"\1.mlp.c_fc"),
            (r"^(text.*)\.mlp\.fc2", r"\1.mlp.c_proj"),
            (r"^visual_projection\.3", "img_projector.linear_out"),
            (r"^visual_projection", "img_projector.linear_hidden"),
            (r"^text_projection\.3", "text_projector.linear_out"),
            (r"^text_projection", "text_projector.linear_hidden"),
        ):
            name = re.sub(pattern, replacement, name)
        if re.match(r".*_projector\.linear_(hidden\.0|out)\.weight", name):
            value = value[..., None]  # they are convolutions of width 1 there
        renamed[name] = value
    for name in [name for name in renamed if re.search(r"\.attn\.q_proj", name) and "pre_assign" not in name]:
        stem, _, leaf = name.rpartition(".q_proj.")
        fused = torch.cat([renamed.pop(f"{stem}.{part}_proj.{leaf}") for part in "qkv"])
        renamed[f"{stem}.in_proj_{leaf}" if name.startswith("text") else f"{stem}.qkv.{leaf}"] = fused
    return renamed


@pytest.fixture(scope="module")
def wide():
    """A random model with NVlabs' 64 channels per head: their files do not tell the number of heads."""
    vision = SMALL["vision_config"] | {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
    text = SMALL["text_config"] | {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}
    return random_model(SMALL | {"vision_config": vision, "text_config": text})


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nvlabs_file_gives_the_same_model(wide, zipped, tmp_path, capsys, monkeypatch):
    state = nvlabs_state(wide.state_dict()) | {"multi_label_logit_scale": torch.tensor(1.0)}
    # Beside the weights: a configuration of a class that is not installed here, and objects of any kind.
    module = types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (dict,), {"__module__": module.__name__, "__qualname__": "DictConfig"})
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = module.DictConfig(lr=1e-3)
    config.parent, config.kind, config.flags = config, typing.Any, {int: collections.deque([1])}
    extras = {"config": config, "history": collections.defaultdict(list, loss=[1.0]), "path": tmp_path}
    torch.save(
        {"model": collections.OrderedDict(state), "epoch": 3, **extras},
        tmp_path / "group_vit.pth",
        _use_new_zipfile_serialization=zipped,
    )
    monkeypatch.undo()

    convert(tmp_path / "group_vit.pth", tmp_path / "ours")
    out = capsys.readouterr().out
    assert "multi_label_logit_scale left out" in out and "2 and 1, of 64 channels" in out
    convert(tmp_path / "ours", tmp_path / "back", "--to", "hf")
    assert state_equal(load_file(tmp_path / "back" / "model.safetensors"), wide.state_dict())

    images, ids = random_images(2, 64, 64), random_ids(2, 12, VOCABULARY)
    ours = mixreorg_fast.load(tmp_path / "ours")
    with torch.no_grad():
        expected = wide(pixel_values=images, input_ids=ids)
    assert (ours.image_embeddings(images) - expected.image_embeds).abs().max() < 1e-5
    assert (ours.text_embeddings(ids) - expected.text_embeds).abs().max() < 1e-5


def test_bare_state_dict_is_read_too(wide, tmp_path):
    torch.save(nvlabs_state(wide.state_dict()), tmp_path / "bare.pth")
    convert(tmp_path / "bare.pth", tmp_path / "back", "--to", "hf")
    assert state_equal(load_file(tmp_path / "back" / "model.safetensors"), wide.state_dict())


def test_heads_that_cannot_be_told_are_refused(tmp_path, capsys):
    torch.save({"model": nvlabs_state(random_model(SMALL).state_dict())}, tmp_path / "narrow.pth")
    message = refusal(capsys, tmp_path / "narrow.pth", tmp_path / "out")
    assert "a width of 96 is not a multiple of GroupViT's 64 channels per head" in message


class Calls:
    """Pickles as a call of `function`, as malicious files do."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_no_code_of_a_file_runs(wide, zipped, tmp_path):
    proof = tmp_path / "ran"
    attacks = {
        "system": Calls(os.system, f"touch {proof}"),
        "eval": Calls(eval, f"open({str(proof)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(proof)!r}, 'w')"),
        "open": Calls(open, str(proof), "w"),
        "nested": [{"config": (Calls(getattr, Calls(__import__, "os"), "system"),)}],
        "load": Calls(torch.load, str(proof)),
        "storage": Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, f"touch {proof}"))),
        Calls(os.mkdir, str(proof)): "as a key",
    }
    file = tmp_path / "evil.pth"
    torch.save(
        {"config": attacks, "model": nvlabs_state(wide.state_dict())}, file, _use_new_zipfile_serialization=zipped
    )
    convert(file, tmp_path / "ours")
    assert not proof.exists()

    content = pth.read(file)
    assert all(isinstance(value, (pth.Placeholder, str, list)) for value in content["config"].values())
    assert type(content["config"]["nested"][0]["config"][0]) is pth.Placeholder
    # The control: the same file does run under torch's own unrestricted reading.
    with pytest.raises(Exception):  # noqa: B017 - whatever the attacks end in
        torch.load(file, weights_only=False)
    assert proof.exists()


def test_a_file_cannot_change_torchs_functions():
    rebuild = torch._utils._rebuild_tensor_v2
    # BUILD with a pair sets attributes of what lies below it on the stack, here of the function.
    attack = b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__K\x01\x85stb."
    defaults = rebuild.__defaults__
    try:
        with contextlib.suppress(TypeError):
            pth.load(io.BytesIO(attack))
        assert rebuild.__defaults__ == defaults
        pickle.loads(attack)  # the control
        assert rebuild.__defaults__ == (1,)
    finally:
        rebuild.__defaults__ = defaults


def test_code_in_the_place_of_weights_is_refused(wide, tmp_path, capsys):
    proof = tmp_path / "ran"
    state = nvlabs_state(wide.state_dict()) | {"logit_scale": Calls(os.system, f"touch {proof}")}
    torch.save({"model": state}, tmp_path / "evil.pth")
    assert "'logit_scale' is no tensor" in refusal(capsys, tmp_path / "evil.pth", tmp_path / "ours")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Calls(os.system, f"touch {proof}")))
    assert "not a file of torch.save" in refusal(capsys, tmp_path / "plain.pth", tmp_path / "ours")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pth"))
    assert "TorchScript" in refusal(capsys, tmp_path / "script.pth", tmp_path / "ours")
    assert not proof.exists()
