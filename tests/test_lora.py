"""LoRA: what is trained is what is saved, applied, merged and read by a real ComfyUI; other files are explained."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import typer
from drop_in import RECORD, Run, furthest
from safetensors.torch import load_file, save_file
from support import ROOT
from typer.testing import CliRunner

from varedit_core import load_transformer
from varedit_core.cli.app import app, main
from varedit_core.cli.common import lora_and_strength
from varedit_core.files.convert import convert
from varedit_core.files.info import inspect
from varedit_core.files.lora import apply_lora, linear_layers, merge_lora, read_lora
from varedit_core.files.weights import WeightError, open_weights
from varedit_core.runtime.kv_caches import DeviceCache
from varedit_core.runtime.layers import StoredLinear
from varedit_core.training.lora import GROUPS, add_lora, load_lora_for_training, lora_layers, lora_state, save_lora

RANK, ALPHA = 4, 6.0

# What ComfyUI's "Load LoRA (Model)" node does to a model whose transformer is ours. Prints its log of unread keys.
_COMFYUI = """
import json, logging, sys
from types import SimpleNamespace

model_file, lora_file, strength, out, root = sys.argv[1:]
sys.path.append(root)
from comfy.cli_args import args
args.cpu = True
import comfy.lora, comfy.lora_convert, comfy.model_patcher, comfy.ops, comfy.utils
import torch
from safetensors.torch import save_file
from varedit_core import load_transformer

class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.diffusion_model = load_transformer(model_file, comfy.ops.disable_weight_init)
        self.model_config = SimpleNamespace(unet_config={})

class Log(logging.Handler):
    def emit(self, record):
        unread.append(record.getMessage())

unread = []
logging.getLogger().addHandler(Log(logging.WARNING))
model = comfy.model_patcher.ModelPatcher(Wrapped(), torch.device("cpu"), torch.device("cpu"))
state = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(lora_file, safe_load=True))
patches = comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(model.model, {}))
patched = model.clone()
applied = patched.add_patches(patches, float(strength))
patched.patch_model()
save_file({key: tensor.clone() for key, tensor in patched.model.diffusion_model.state_dict().items()}, out)
print(json.dumps({"keys": len(state), "patches": len(patches), "applied": len(applied), "unread": unread}))
"""


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


@pytest.fixture(scope="module")
def base():
    return load_transformer(RECORD)


@pytest.fixture(scope="module")
def trained(base):
    """A transformer with low-rank layers everywhere, random where training would have moved them."""
    network = deepcopy(base)
    torch.manual_seed(5)
    add_lora(network, RANK, ALPHA, "all")
    with torch.no_grad():
        for _, layer in lora_layers(network):
            layer.lora_B["default"].weight.normal_(std=0.05)
    return network


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The recorded transformer alone, in fp32: the record stores some of it in fewer bits."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    convert(RECORD, path, "fp32")
    return path


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_lora(path, lora_state(trained), {"varedit.steps": "12"})
    return path


def applied(path: Path, strength: float = 1.0, model: Path = RECORD, **kw):
    network = load_transformer(model, **kw)
    apply_lora(network, path, strength)
    return network


def same(network, reference) -> bool:
    ours, theirs = network.state_dict(), reference.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def as_flat(state: dict) -> dict:
    """The same LoRA in the other key style."""
    parts = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "alpha": "alpha"}
    flat = {}
    for key, tensor in state.items():
        stem, part = re.fullmatch(r"diffusion_model\.(.+)\.(lora_[AB]\.weight|alpha)", key).groups()
        flat[f"lora_unet_{stem.replace('.', '_')}.{parts[part]}"] = tensor
    return flat


@torch.no_grad()
def test_applied_equals_injected(run, trained, file):
    injected = run.logits(trained, plain=True)
    assert furthest(injected, run.logits(applied(file), plain=True)) < 1e-5
    assert furthest(run.expected, injected) > 1e-2, "the LoRA must change something for this to be a test"


@torch.no_grad()
def test_a_new_lora_computes_what_the_network_did(run, base):
    network = deepcopy(base)
    names = add_lora(network, RANK)
    assert furthest(run.expected, run.logits(network, plain=True)) == 0
    assert len(names) == 7 * base.config.depth


def test_only_the_low_rank_layers_learn(run, base):
    """A loss after two passes through the blocks reaches every low-rank layer, and nothing else."""
    network = deepcopy(base)
    add_lora(network, RANK, targets="all")
    with torch.no_grad():
        for _, layer in lora_layers(network):
            layer.lora_B["default"].weight.normal_(std=0.05)
    size, schedule = network.config, run.record.schedule
    store = DeviceCache(size, schedule, 1, network.dtype, "cpu")
    source, first = store.passes("cpu")[:2]
    condition = network.condition(run.record.texts("text")[:1])
    tokens = torch.randn(1, schedule.tokens[-1], size.token_bits)
    network(network.embed(tokens, len(schedule) - 1), condition, source, store)
    # Detached copies: the next pass writes into the store, which would break the graph of the first.
    store.keys, store.values = ([t.detach().clone() for t in part] for part in (store.keys, store.values))
    x = network(network.start(condition), condition, first, store)
    (network.logits(x, condition).square().mean() + network.embed(tokens, 0).square().mean()).backward()
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    reached = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learning == reached == {name for name, _ in network.named_parameters() if ".lora_" in name}
    assert len(learning) == 2 * len(list(lora_layers(network)))


def test_strength(base, file):
    assert same(applied(file, 0.0), base)
    layer = "blocks.0.ffn.fc1"
    ours, update = read_lora(file), read_lora(file).matched(base)[layer]
    before, half = (network.get_submodule(layer).weight for network in (base, applied(file, 0.5)))
    up, down = ours.weights[update.up], ours.weights[update.down]
    torch.testing.assert_close(half - before, 0.5 * ALPHA / RANK * up @ down, atol=1e-6, rtol=0)
    back = applied(file, 0.5)
    apply_lora(back, file, -0.5)
    torch.testing.assert_close(back.state_dict(), dict(base.state_dict()), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="must be a number, got nan"):
        apply_lora(back, file, float("nan"))


def test_both_key_styles_and_the_default_alpha(file, tmp_path):
    state = load_file(file)
    flat, without, spelled = (tmp_path / f"{name}.safetensors" for name in ("flat", "without", "spelled"))
    save_file(as_flat(state), flat)
    assert same(applied(flat), applied(file))
    save_file({key: tensor for key, tensor in state.items() if not key.endswith(".alpha")}, without)
    save_file({k: torch.tensor(float(RANK)) if k.endswith(".alpha") else t for k, t in state.items()}, spelled)
    assert same(applied(without), applied(spelled)) and not same(applied(without), applied(file))


def test_bf16_is_rounded_once(file):
    exact, ours = applied(file), applied(file, dtype=torch.bfloat16)
    assert ours.blocks[0].ffn.fc1.weight.dtype == torch.bfloat16 and ours.head.weight.dtype == torch.float32
    update = read_lora(file)
    for name, part in update.matched(ours).items():
        stored = load_transformer(RECORD, dtype=torch.bfloat16).get_submodule(name).weight.float()
        expected = (stored + update.difference(part, 1.0, "cpu")).to(ours.get_submodule(name).weight.dtype)
        assert torch.equal(ours.get_submodule(name).weight, expected), name
    assert torch.equal(ours.head.weight, exact.head.weight)


@torch.no_grad()
def test_eight_bit_layers_keep_the_update(run, trained, file, tmp_path):
    eight = tmp_path / "fp8.safetensors"
    convert(RECORD, eight, "fp8")
    plain, ours = load_transformer(eight), applied(file, model=eight)
    for name, layer in linear_layers(plain).items():
        scale = 1.0 if layer.weight_scale is None else layer.weight_scale
        update = read_lora(file).matched(plain).get(name)
        added = 0.0 if update is None else read_lora(file).difference(update, 1.0, "cpu")
        torch.testing.assert_close(
            ours.get_submodule(name).weight, layer.weight.float() * scale + added, atol=1e-6, rtol=0
        )
    beside = load_transformer(eight)
    load_lora_for_training(beside, file)
    assert furthest(run.logits(beside, plain=True), run.logits(ours, plain=True)) < 1e-5
    assert same(applied(file, 0.0, model=eight), plain)
    for source in (eight, RECORD):
        with pytest.raises(WeightError, match="in 8-bit; merge into the original or a bf16 file"):
            merge_lora(source, file, tmp_path / "out.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_equals_applied(file, tmp_path, precision):
    source, out = tmp_path / "model.safetensors", tmp_path / "deep" / "merged.safetensors"
    convert(RECORD, source, precision)
    seen = []
    metadata = merge_lora(source, file, out, 0.7, on_tensor=lambda done, total: seen.append(done / total))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert same(load_transformer(out, dtype=dtype), applied(file, 0.7, source, dtype=dtype))
    assert open_weights(out).shapes == open_weights(source).shapes and seen == sorted(seen) and seen[-1] == 1
    assert (
        open_weights(out).metadata
        == metadata
        == {**open_weights(source).metadata, "varedit.merged_lora": "style.safetensors:0.7"}
    )
    assert merge_lora(out, file, tmp_path / "b.safetensors")["varedit.merged_lora"].endswith(
        ":0.7, style.safetensors:1"
    )


def test_a_published_file_merges(published_file, tmp_path):
    """Chunked blocks and loose biases: the result has canonical keys and says what it is."""
    network = load_transformer(published_file)
    add_lora(network, 2, targets=["blocks.3.ffn.fc1", r"sa\.proj"])
    for _, layer in lora_layers(network):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    save_lora(tmp_path / "a.safetensors", lora_state(network))
    metadata = merge_lora(published_file, tmp_path / "a.safetensors", tmp_path / "out.safetensors", -1.5)
    assert metadata["varedit.architecture"] == "varedit" and metadata["varedit.converted_from"] == "8B-512.pth"
    merged = load_transformer(tmp_path / "out.safetensors")
    assert same(merged, applied(tmp_path / "a.safetensors", -1.5, published_file))
    assert not same(merged, load_transformer(published_file))


def test_merging_overwrites_nothing(model, file, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="exists; choose another name or allow overwriting"):
        merge_lora(model, file, out)
    with pytest.raises(ValueError, match="must end in .safetensors"):
        merge_lora(model, file, tmp_path / "out.pth")
    with pytest.raises(WeightError, match="not a VAREdit transformer"):
        merge_lora(file, file, tmp_path / "new.safetensors")
    assert out.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [out]
    merge_lora(model, file, out, overwrite=True)
    assert same(load_transformer(out), applied(file))


KEY = "diffusion_model.blocks.0.sa.proj"
WRONG = {
    "unknown layer": (
        lambda s: (
            s
            | {
                "diffusion_model.blocks.99.sa.proj." + p: s[f"{KEY}.{p}"].clone()
                for p in ("lora_A.weight", "lora_B.weight")
            }
        ),
        ("blocks.99.sa.proj.lora_A.weight", "no such layer", "choose a LoRA trained for VAREdit"),
    ),
    "another size": (
        lambda s: s | {f"{KEY}.lora_A.weight": torch.zeros(RANK, 7)},
        (f"{KEY}.lora_A.weight", "[128, 7]", "[128, 128]", "choose a LoRA"),
    ),
    "ranks differ": (
        lambda s: s | {f"{KEY}.lora_B.weight": torch.zeros(128, 3)},
        (f"{KEY}.lora_B.weight", "[128, 3]", "[rank, inputs]"),
    ),
    "a convolution": (lambda s: s | {f"{KEY}.lora_B.weight": torch.zeros(128, RANK, 1, 1)}, ("[128, 4, 1, 1]",)),
    "half missing": (
        lambda s: {k: t for k, t in s.items() if k != f"{KEY}.lora_B.weight"},
        ("lacks the up matrix of", KEY),
    ),
    "alpha alone": (
        lambda s: s | {"diffusion_model.head2.alpha": torch.ones(())},
        ("lacks the down and up matrix of", "head2"),
    ),
    "DoRA": (lambda s: s | {f"{KEY}.dora_scale": torch.ones(128, 1)}, (f"{KEY}.dora_scale", "without DoRA")),
    "another family's keys": (
        lambda s: {k.replace("diffusion_model", "transformer"): t for k, t in s.items()},
        ("transformer.blocks.0", "choose a LoRA"),
    ),
    "undefined numbers": (
        lambda s: s | {f"{KEY}.lora_B.weight": torch.full((128, RANK), torch.nan)},
        (f"{KEY}.lora_B.weight", "undefined"),
    ),
    "alpha of many": (lambda s: s | {f"{KEY}.alpha": torch.ones(2)}, (f"{KEY}.alpha", "not one number")),
    "twice": (
        lambda s: s | as_flat({k: t.clone() for k, t in s.items() if k.startswith(KEY)}),
        (KEY, "lora_unet_blocks_0_sa_proj", "remove one"),
    ),
    "nothing": (lambda s: {}, ("an unknown model", "choose a LoRA")),
    "a LoRA for another model": (
        lambda s: {
            "lora_unet_input_blocks_1_1.lora_down.weight": torch.ones(1, 3),
            "lora_unet_input_blocks_1_1.lora_up.weight": torch.ones(2, 1),
        },
        ("input_blocks_1_1", "no such layer"),
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_files_are_explained_and_change_nothing(base, model, file, tmp_path, kind):
    change, words = WRONG[kind]
    path = tmp_path / "bad.safetensors"
    save_file(change(load_file(file)) or {"x": torch.ones(1)}, path)
    network = load_transformer(RECORD)
    for use in (apply_lora, load_lora_for_training, lambda n, p: merge_lora(model, p, tmp_path / "out.safetensors")):
        with pytest.raises(WeightError) as error:
            use(network, path)
        text = str(error.value)
        assert "\n" not in text and all(word in text for word in (str(path), *words)), text
    assert same(network, base) and not list(tmp_path.glob("out*"))


def test_a_model_is_no_lora(base):
    with pytest.raises(WeightError, match="is a VAREdit transformer, not a LoRA"):
        apply_lora(deepcopy(base), RECORD)
    with pytest.raises(WeightError, match="does not exist"):
        apply_lora(deepcopy(base), "nowhere.safetensors")


@pytest.mark.parametrize(
    ("targets", "count"),
    [("attention", 5), ("mlp", 2), (["mlp", "attention", "mlp"], 7), ("ca.mat_q", 1), (r"ffn\.fc[12]", 2)],
)
def test_targets(base, targets, count):
    network = deepcopy(base)
    names = add_lora(network, 1, targets=targets)
    assert names == [name for name, _ in lora_layers(network)] and len(names) == count * base.config.depth
    assert all(name.startswith("blocks.") for name in names)


def test_every_group_is_whole(base):
    """`all` leaves out nothing but the pooled text's layers; every group's layers are linear."""
    names = set(add_lora(deepcopy(base), 1, targets="all"))
    assert set(linear_layers(base)) - names == {"text_proj_for_sos.ca.mat_kv", "text_proj_for_sos.ca.proj"}
    assert set(GROUPS) == {"attention", "mlp", "all"}


def test_mistakes_in_training(base, trained, file, tmp_path):
    network = deepcopy(base)
    for arguments, message in [
        (dict(rank=0), "at least 1, got 0"),
        (dict(rank=1, targets="banana"), "no linear layer of the transformer is named 'banana'; use attention, mlp"),
        (dict(rank=1, targets=["mlp", "cfg_uncond"]), "is named 'cfg_uncond'"),
        (dict(rank=1, targets="(("), "is no regular expression"),
        (dict(rank=1, targets=[]), "nothing to train"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            add_lora(network, **arguments)
    assert same(network, base)
    with pytest.raises(ValueError, match="has no LoRA; add one"):
        lora_state(network)
    for again in (lambda: add_lora(trained, 2), lambda: load_lora_for_training(trained, file)):
        with pytest.raises(ValueError, match="has a LoRA already"):
            again()
    with pytest.raises(FileExistsError):
        save_lora(file, lora_state(trained))
    with pytest.raises(ValueError, match="must end in"):
        save_lora(tmp_path / "a.pt", lora_state(trained))
    mixed = load_file(file) | {f"{KEY}.alpha": torch.tensor(1.0)}
    save_file(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(WeightError, match=re.escape("alphas [1.0, 6.0]; go on with a file that has one of each")):
        load_lora_for_training(network, tmp_path / "mixed.safetensors")
    assert same(network, base)


def test_without_peft(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    network = deepcopy(base)
    with pytest.raises(ImportError, match="pip install peft"):
        add_lora(network, 2)
    assert same(network, base)


def test_editing_does_not_import_peft():
    code = "import sys, varedit_core.cli.app, varedit_core.training.lora; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming(trained, file, tmp_path, dtype):
    """A saved LoRA goes on as it was, in fp32 whatever the network's type, and keeps its metadata."""
    network = load_transformer(RECORD, dtype=dtype)
    metadata = load_lora_for_training(network, file)
    assert metadata["varedit.steps"] == "12" and metadata["varedit.architecture"] == "varedit-lora"
    torch.testing.assert_close(lora_state(network), lora_state(trained), atol=0, rtol=0)
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    save_lora(tmp_path / "again.safetensors", lora_state(network))
    save_lora(tmp_path / "again.safetensors", lora_state(network), overwrite=True)
    torch.testing.assert_close(load_file(tmp_path / "again.safetensors"), load_file(file), atol=0, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


def test_the_file_is_as_comfyui_names_it(base, file):
    state = load_file(file)
    names = add_lora(deepcopy(base), 1, targets="all")
    assert set(state) == {
        f"diffusion_model.{n}.{p}" for n in names for p in ("lora_A.weight", "lora_B.weight", "alpha")
    }
    assert state[f"{KEY}.lora_A.weight"].shape == (RANK, 128) and state[f"{KEY}.lora_B.weight"].shape == (128, RANK)
    assert state[f"{KEY}.alpha"].shape == () and state[f"{KEY}.alpha"] == ALPHA
    assert isinstance(base.get_submodule("blocks.0.sa.proj"), StoredLinear)


def test_info(file, tmp_path):
    facts = inspect(file)
    assert facts["is"] == "a LoRA" and facts["metadata"]["varedit.steps"] == "12"
    depth = load_transformer(RECORD).config.depth
    assert facts["LoRA"]["rank"] == [RANK] and facts["LoRA"]["alpha"] == [ALPHA]
    assert facts["LoRA"]["targets"]["blocks.*.sa.mat_qkv"] == depth and facts["LoRA"]["targets"]["head"] == 1
    assert facts["LoRA"]["layers"] == sum(facts["LoRA"]["targets"].values()) == 7 * depth + 6
    save_file({"transformer.a.lora_A.weight": torch.ones(1, 1)}, tmp_path / "other.safetensors")
    assert "a LoRA, but none for VAREdit: " in inspect(tmp_path / "other.safetensors")["is"]
    shown = CliRunner().invoke(app, ["info", str(file), "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout) == facts


EDIT = ["edit", str(ROOT / "samples" / "cat.jpg"), "--model", str(RECORD), "--features", f"{RECORD}:in.text.0"]
EDIT += ["--size", "256", "--device", "cpu", "--json"]


def test_edits_with_loras(file, tmp_path):
    """Two halves are a whole; none is none."""
    pictures = {}
    for name, options in {
        "none": [],
        "zero": ["--lora", f"{file}:0"],
        "whole": ["--lora", str(file)],
        "halves": ["--lora", f"{file}:0.25", "--lora", f"{file}:0.75"],
    }.items():
        out = tmp_path / f"{name}.png"
        done = CliRunner().invoke(app, [*EDIT, *options, "--output", str(out)])
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        pictures[name] = out.read_bytes()
        assert [entry["strength"] for entry in report["loras"]] == {"none": [], "zero": [0], "whole": [1]}.get(
            name, [0.25, 0.75]
        )
    assert pictures["none"] == pictures["zero"] != pictures["whole"] == pictures["halves"]


def test_the_strength_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:2").touch()
    assert lora_and_strength("b.safetensors:-0.5") == (Path("b.safetensors"), -0.5)
    assert [lora_and_strength(text) for text in ("b", "a:2", "C:b")] == [
        (Path(text), 1.0) for text in ("b", "a:2", "C:b")
    ]
    Path("b.safetensors").touch()
    with pytest.raises(typer.BadParameter, match="the strength 'strong' of b.safetensors is no number"):
        lora_and_strength("b.safetensors:strong")


def test_the_command_merges_and_explains(model, file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.safetensors"
    done = CliRunner().invoke(app, ["merge", str(model), str(file), str(out), "--strength", "-0.5"])
    assert done.exit_code == 0 and same(load_transformer(out), applied(file, -0.5)), done.output
    for arguments, words in {
        ("merge", str(model), str(file), str(out)): "exists; choose another name",
        (*EDIT, "--lora", f"{RECORD}:0.5", "--output", str(tmp_path / "a.png")): "not a LoRA; choose a LoRA",
        (*EDIT, "--lora", "nowhere.safetensors:0.5"): "nowhere.safetensors does not exist",
    }.items():
        monkeypatch.setattr(sys, "argv", ["varedit", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        text = capsys.readouterr().err
        assert stop.value.code == 1 and text.count("\n") == 1 and words in text


@pytest.mark.parametrize("style", ["saved", "flat"])
def test_comfyui_reads_every_key_and_patches_as_we_do(comfyui, base, file, tmp_path, style):
    if style == "flat":
        save_file(as_flat(load_file(file)), tmp_path / "flat.safetensors")
        file = tmp_path / "flat.safetensors"
    strength, out = 0.7, tmp_path / "patched.safetensors"
    report = comfyui.run("-c", _COMFYUI, RECORD, file, strength, out, ROOT)
    layers = len(read_lora(file).updates)
    assert report == {"keys": 3 * layers, "patches": layers, "applied": layers, "unread": []}
    patched = load_file(out)
    torch.testing.assert_close(patched, dict(applied(file, strength).state_dict()), atol=1e-6, rtol=0)
    assert furthest(list(base.state_dict().values()), list(patched[key] for key in base.state_dict())) > 1e-2
