"""Every form in which checkpoints come loads to the same bits as the bare weights. A next form is one row of FORMS."""

from __future__ import annotations

import argparse
import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import GOLDEN
from typer.testing import CliRunner

from varedit_core import load_autoencoder, load_transformer
from varedit_core.cli.app import app
from varedit_core.files.checkpoints import TOKENIZER, TRANSFORMER, canonical, select
from varedit_core.files.convert import convert
from varedit_core.files.info import inspect
from varedit_core.files.places import is_average, is_optimisers, places
from varedit_core.files.weights import WeightError, open_weights

RECORD = GOLDEN / "patchify_256.safetensors"
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Parts:
    """A transformer and a VAE as they are published, a moving average of each, and an optimiser's moments."""

    net: State
    vae: State

    @staticmethod
    def other(state: State, shift: float) -> State:
        return {key: tensor + shift for key, tensor in state.items()}

    @property
    def average(self) -> State:
        return self.other(self.net, 1)

    @property
    def moments(self) -> State:
        return {key: torch.full((2,), 2.0) for key in self.net}

    def by_name(self) -> dict:
        """An optimiser's state as FSDP writes it whole: by the names of parameters."""
        state = {key: {"step": torch.ones(()), "exp_avg": t, "exp_avg_sq": t} for key, t in self.moments.items()}
        return {"state": state, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.97), "params": list(state)}]}

    def by_number(self) -> dict:
        state = {i: {"step": torch.ones(()), "exp_avg": t} for i, t in enumerate(self.moments.values())}
        return {"state": state, "param_groups": [{"lr": 1e-4, "params": list(state)}]}


@dataclass(frozen=True)
class Form:
    """tree: what torch.save is given. words: of `varedit info`. other: a second copy that is not taken. vae: whether
    the file has the VAE, too."""

    tree: Callable[[Parts], object]
    words: str = ""
    other: str = ""
    vae: bool = False


def named(state: State, change: Callable[[str], str]) -> State:
    return OrderedDict((change(key), tensor) for key, tensor in state.items())


def inside(key: str) -> str:
    """A key of compiled chunks whose blocks are wrapped again."""
    return re.sub(r"(block_chunks\.\d+\.)(module\.\d+\.)", r"\1_orig_mod.\2_checkpoint_wrapped_module.", key)


def flat(key: str) -> str:
    return re.sub(r"block_chunks\.(\d+)\.module\.0", r"blocks.\1", key)


def published(parts: Parts, **trainer) -> dict:
    """The whole checkpoint of the published trainer."""
    return {
        "args": {"model": "infinity_8b", "tlen": 512, "betas": (0.9, 0.97)},
        "gpt_training": True,
        "arch": "infinity_8b",
        "epoch": 3,
        "iter": 70,
        "trainer": {"config": {"label_smooth": 0.0, "prog_it": 0}, "vae_local": parts.vae, **trainer},
        "acc_str": "[no acc str]",
        "milestones": [(1, 2.0)],
    }


PUBLISHED = "in a checkpoint of the published training, where trainer."
FORMS = {
    "bare": Form(lambda p: p.net),
    "blocks in one list": Form(lambda p: named(p.net, flat)),
    "published trainer, sharded": Form(
        lambda p: published(p, gpt_fsdp=p.net, gpt_ema_fsdp=p.average, gpt_fsdp_opt=p.by_name()),
        PUBLISHED + "gpt_fsdp is taken, the trained weights; a.pth:trainer.gpt_ema_fsdp takes another",
        "trainer.gpt_ema_fsdp",
        vae=True,
    ),
    "published trainer, the average first": Form(
        lambda p: published(p, gpt_ema_fsdp=p.average, gpt_fsdp_optimizer=p.by_name(), gpt_fsdp=p.net),
        PUBLISHED + "gpt_fsdp is taken",
        "trainer.gpt_ema_fsdp",
        vae=True,
    ),
    "published trainer, one process": Form(
        lambda p: published(p, gpt_ema_for_vis=p.average, gpt_wo_ddp=p.net, gpt_opt={"optimizer": p.by_number()}),
        PUBLISHED + "gpt_wo_ddp is taken",
        "trainer.gpt_ema_for_vis",
        vae=True,
    ),
    "published trainer, compiled": Form(
        lambda p: published(p, gpt_wo_ddp=named(p.net, lambda key: f"_orig_mod.{inside(key)}")),
        PUBLISHED + "gpt_wo_ddp is taken, the trained weights",
        vae=True,
    ),
    "published trainer, the average alone": Form(
        lambda p: published(p, gpt_ema_fsdp=p.net), PUBLISHED + "gpt_ema_fsdp is taken, the moving average", vae=True
    ),
    "part of that file": Form(lambda p: {"gpt_fsdp": p.net}, "published training, where gpt_fsdp is taken"),
    "DDP": Form(lambda p: named(p.net, lambda key: f"module.{key}")),
    "compiled": Form(lambda p: named(p.net, lambda key: f"_orig_mod.{key}")),
    "compiled chunks of wrapped blocks": Form(lambda p: named(p.net, inside)),
    "DDP of a compiled network": Form(lambda p: named(p.net, lambda key: f"module._orig_mod.{key}")),
    "FSDP 1": Form(lambda p: named(p.net, lambda key: f"_fsdp_wrapped_module.{key}")),
    "optimiser beside bare weights": Form(
        lambda p: {**p.net, "optimizer": p.by_name(), "ema": p.average},
        "where the copy without a name is taken; a.pth:ema takes another",
        "ema",
    ),
    "moments that have the weights' names": Form(
        lambda p: {"optim_states": {"exp_avg": p.moments}, "exp_avg_sq": p.moments, "state_dict": p.net},
    ),
    "settings as an object": Form(
        lambda p: {"model": p.net, "args": argparse.Namespace(lr=1e-4, path=None), "best": np.float64(0.5)},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(published_state) -> Parts:
    record = load_file(RECORD)
    vae = {key[4:]: t.float() for key, t in record.items() if key.startswith("vae.") and t.is_floating_point()}
    net = {key: t for key, t in published_state.items() if not re.match(r"block_chunks\.[2-9]", key)}
    return Parts(net, vae)


@pytest.fixture(scope="module")
def bare(parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("bare") / "a.pth"
    torch.save(parts.net, path)
    return load_transformer(path).state_dict()


def equal(network, state) -> bool:
    ours = network.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[key], state[key]) for key in ours)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_loads_as_the_bare_weights(name, parts, bare, tmp_path, caplog):
    form, path = FORMS[name], tmp_path / "a.pth"
    torch.save(form.tree(parts), path)
    assert equal(load_transformer(path), bare)
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == bool(form.other) and all(f"name a.pth:{form.other}, to" in one for one in warned), warned
    said = inspect(path)["is"]
    assert said.startswith("a VAREdit transformer, 2 blocks of width 128" + " with its VAE" * form.vae)
    assert form.words in said and "not whole" not in said
    assert form.words or said.endswith("width 128")
    if form.vae:
        vae = canonical(open_weights(path), TOKENIZER)
        assert vae.place == "trainer.vae_local" and not vae.others
        assert torch.equal(vae["encoder.conv_out.weight"], parts.vae["encoder.conv_out.conv.weight"])
    if form.other:
        average = canonical(open_weights(f"{path}:{form.other}"), TRANSFORMER)
        assert average.keys() == bare.keys() and torch.equal(average["head.weight"], bare["head.weight"] + 1)


@pytest.mark.parametrize("order", [("ema", "vae"), ("vae", "ema")])
def test_a_vaes_trained_weights_are_taken(order, parts, tmp_path, caplog):
    """As in the published code, which asks for `vae` unless it is told otherwise."""
    states = {"vae": parts.vae, "ema": parts.other(parts.vae, 1)}
    torch.save({name: states[name] for name in order} | {"optimizer_vae": {"exp_avg": parts.vae}}, tmp_path / "a.pth")
    ours = load_autoencoder(tmp_path / "a.pth")
    assert equal(ours, load_autoencoder(RECORD).state_dict()) and "name a.pth:ema, to" in caplog.text
    average = load_autoencoder(f"{tmp_path / 'a.pth'}:ema").encoder.conv_in.bias
    assert torch.equal(average, ours.encoder.conv_in.bias + 1)


def test_safetensors_and_convert_take_the_same(parts, bare, tmp_path):
    tensors = {f"trainer.gpt_fsdp.{key}": t for key, t in parts.net.items()}
    tensors |= {f"trainer.gpt_ema_fsdp._orig_mod.{key}": t for key, t in parts.average.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert equal(load_transformer(tmp_path / "a.safetensors"), bare)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "fp32")
    assert equal(load_transformer(tmp_path / "b.safetensors"), bare)
    arguments = [f"{tmp_path / 'a.safetensors'}:trainer.gpt_ema_fsdp", str(tmp_path / "c.safetensors")]
    done = CliRunner().invoke(app, ["convert", *arguments, "--precision", "fp32"], catch_exceptions=False)
    assert done.exit_code == 0
    assert torch.equal(load_file(tmp_path / "c.safetensors")["head.weight"], bare["head.weight"] + 1)


STATE = "is the state of an optimiser, without weights"
REFUSED = {
    "an optimiser's state alone": (lambda p: p.by_name(), "", f"{STATE}, not a VAREdit transformer"),
    "that of the published trainer": (lambda p: {"trainer": {"gpt_fsdp_opt": p.by_name()}}, "", STATE),
    "moments by name": (lambda p: {"optimizer": {"exp_avg": p.net}}, "", STATE),
    "by number": (lambda p: p.by_number(), "", STATE),
    "asked for by name": (
        lambda p: {"net": p.net, "optimizer": {"exp_avg": p.net}},
        ":optimizer.exp_avg",
        "name a part that holds weights",
    ),
    "a part that is not there": (lambda p: {"net": p.net}, ":gpt_fsdp", "holds nothing under gpt_fsdp; name one of"),
    "one name in two wrappers": (
        lambda p: {**p.net, "_orig_mod.head.weight": p.net["head.weight"]},
        "",
        "has head.weight twice, as head.weight and _orig_mod.head.weight",
    ),
    "neither": (lambda p: {"layer.weight": torch.ones(3)}, "", "is an unknown model with keys such as layer.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_none_of_them_gets_its_sentence(name, parts, tmp_path):
    tree, part, words = REFUSED[name]
    torch.save(tree(parts), tmp_path / "a.pth")
    with pytest.raises(WeightError) as error:
        load_transformer(f"{tmp_path / 'a.pth'}{part}")
    said = str(error.value)
    assert words in said and said.count(";") == 1 and "\n" not in said


def test_no_name_of_the_published_weights_is_taken_for_an_optimisers(parts):
    names = [*parts.net, *parts.vae, *canonical(open_weights(RECORD), TRANSFORMER)]
    assert not any(map(is_optimisers, names)) and not any(map(is_average, names))
    assert is_optimisers("trainer.gpt_fsdp_opt.state.head.weight") and is_average("model_ema.module")
    assert places(["b.ema.x", "a.long.x", "opt.x", "a.x"], "x") == ["a", "a.long", "b.ema"]


def test_a_part_knows_its_place(parts, tmp_path):
    torch.save(published(parts, gpt_fsdp=parts.net), tmp_path / "a.pth")
    weights = open_weights(f"{tmp_path / 'a.pth'}:trainer")
    assert select(weights, TRANSFORMER).place == "trainer.gpt_fsdp"
    assert select(weights, TOKENIZER).place == "trainer.vae_local"
