"""Options that would do nothing, or be cut to what there is: one sentence before anything is loaded. And previews,
contact sheets and pictures of text with everything the command line has for them."""

import re
import sys

import pytest
import torch
import typer
from PIL import Image
from support import GOLDEN
from typer.testing import CliRunner

from benchmarks.real_size import published_shapes, random_tensor
from varedit_core import Controls, Editor, Region, SamplingSettings, Shortcuts, Tokens, schedule_for
from varedit_core.cli.app import app, main
from varedit_core.controls.base import Control
from varedit_core.controls.curves import PRESETS
from varedit_core.controls.registry import knobs, registered
from varedit_core.demo import FILES, FOLDER, SAMPLES
from varedit_core.pictures.contact_sheet import Row, contact_sheet
from varedit_core.request import each
from varedit_core.runtime.memory import TorchMemory
from varedit_core.sampling import loop
from varedit_core.sweep import Axis, planned
from varedit_core.sweep import check as check_sweep

SCENE, CAT = SAMPLES / "scene.png", SAMPLES / "cat.jpg"
STAR = "recolour the black star in purple"
SCALES = 7
REFINER = FOLDER / "diffusion_models" / "varedit_demo_refiner.safetensors"

EDIT = ["edit", SCENE, STAR, "-o", "{tmp}/x.png"]
OWN = ["--model", "m.safetensors", "--text-encoder", "t5"]
MAKE = ["generate", "a cat", *OWN, "--size", "256", "-o", "{tmp}/x.png"]
SWEEP = ["sweep", SCENE, STAR, "-o", "{tmp}/x.png"]
JUDGE = ["shapeedit", "evaluate", "--count", "1"]
GREEDY = ["--temperature", "0"]
MASK = ["--mask", "{mask}"]
TOKENS = ["edit", "{tokens}", STAR, "-o", "{tmp}/x.png"]
BEGUN = ["--begun", "{begun}"]  # three scales

IDLE = [
    # beyond the scales
    ([*EDIT, "--stop", "8"], "--stop is 8 but the edit has 7 scales; give at most 7"),
    ([*EDIT, "--unguided", "8"], "--unguided is 8 but the edit has 7 scales"),
    ([*EDIT, "--inside", "8", *MASK], "--inside is 8 but the edit has 7 scales"),
    ([*EDIT, "--best-of", "2", "--best-at", "8"], "--best-at is 8 but the edit has 7 scales"),
    ([*EDIT, "--drafted", "8", "--drafter", REFINER], "the drafter's scales must be from 1 to 6, got 8"),
    ([*EDIT, "--drafted", "7", "--drafter", REFINER], "the drafter's scales must be from 1 to 6, got 7"),
    ([*EDIT, "--drafted", "3", "--stop", "3", "--drafter", REFINER], "must be from 1 to 2, got 3"),
    ([*EDIT, "--best-of", "2", "--stop", "3"], "--best-at is 4 but --stop ends the edit after 3 scales"),
    ([*EDIT, "--inside", "2", *MASK, "--stop", "5"], "--stop ends the edit before them"),
    ([*EDIT, "--auto-mask", "0.5", "--stop", "5"], "--auto-mask counts at the last 2 scales, and --stop ends the edit"),
    ([*EDIT, "--unguided", "2", "--stop", "5"], "--unguided ends guidance, but none of the last 2"),
    ([*EDIT, *BEGUN, "--stop", "3"], "3 scales are begun and --stop ends the edit after 3: nothing is drawn"),
    ([*MAKE, "--stop", "8"], "--stop is 8 but the edit has 7 scales"),
    ([*MAKE, "--unguided", "8"], "--unguided is 8 but the edit has 7 scales"),
    ([*JUDGE, "--stop", "8"], "--stop is 8 but the edit has 7 scales"),
    ([*JUDGE, "--unguided", "8"], "--unguided is 8 but the edit has 7 scales"),
    ([*SWEEP, "--x", "best_at=3,9", "--y", "best_of=2,3"], "best_at is 9 but the edit has 7 scales"),
    # one option of two
    ([*EDIT, "--drafter", REFINER], "--drafter and --drafted go together"),
    ([*EDIT, "--drafted", "3"], "--drafter and --drafted go together"),
    ([*EDIT, "--score", "near"], "--score counts only with --best-of"),
    ([*EDIT, "--best-at", "2"], "--best-at counts only with --best-of"),
    ([*MAKE, "--score", "instruction"], "--score counts only with --best-of"),
    ([*MAKE, "--best-at", "2"], "--best-at counts only with --best-of"),
    ([*EDIT, "--from-scale", "3"], "name its tokens with --begun"),
    ([*MAKE, "--from-scale", "3"], "name its tokens with --begun"),
    ([*EDIT, "--fill", "white"], "--fill is for the new part of a picture; add --extend"),
    ([*EDIT, "--crop", "0.2"], "--crop needs to know what to crop; give a --mask"),
    ([*EDIT, "--vae", "v.safetensors"], "name it with --model"),
    ([*EDIT, "--text-encoder", "t5"], "name it with --model"),
    ([*EDIT, "--tokenizer", "t.json"], "name it with --model"),
    ([*SWEEP, "--x", "seed=1,2", "--vae", "v.safetensors"], "name it with --model"),
    ([*SWEEP, "--x", "seed=1,2", "--text-encoder", "t5"], "name it with --model"),
    ([*EDIT, "--precision", "fp8"], "choose among files of --weights; add that, or leave them out"),
    ([*EDIT, "--text-precision", "fp8"], "choose among files of --weights"),
    ([*SWEEP, "--x", "seed=1,2", "--text-precision", "fp8"], "choose among files of --weights"),
    ([*JUDGE, "--text-precision", "fp8"], "choose among files of --weights"),
    ([*MAKE, "--text-precision", "fp8"], "choose among files of --weights"),
    ([*EDIT, *OWN, "--weights", "8B-512"], "--weights names all files of a model; leave out --model"),
    (["decode", "{begun}", "--vae", "v.pth", "--weights", "8B-512"], "--weights has a VAE of its own"),
    (["edit", SCENE, STAR, "--model", "m.pth", "--tokenizer", "t.json"], "--tokenizer is that of a --text-encoder"),
    ([*SWEEP, "--x", "seed=1", "--model", "m.pth", "--tokenizer", "t.json"], "--tokenizer is that of a --text-encoder"),
    ([*JUDGE, "--tokenizer", "t.json"], "--tokenizer is that of a --text-encoder"),
    (["generate", "a", "--model", "m.pth", "--tokenizer", "t.json"], "--tokenizer is that of a --text-encoder"),
    (["edit", SCENE, "--features", "f.pth:x", *OWN], "--text-encoder has nothing to read beside --features"),
    (["edit", SCENE, "--features", "f.pth:x", "--text-cache", "{tmp}"], "--text-cache has no text to keep"),
    ([*EDIT, "--text-cache", SCENE], "is a file; name a folder, which may be new"),
    (["generate", "a cat"], "name an Infinity transformer with --model"),
    ([*MAKE[:2], "--model", "m.safetensors"], "an instruction needs --text-encoder"),
    (["generate", "", *OWN], "give a prompt, or --region"),
    ([*MAKE, "--region", "a dog@{mask}"], "give a prompt or --region, not both"),
    (["generate", "", *OWN, "--region", "a dog@{mask}"], "add one without a mask, for everywhere"),
    ([*MAKE, "--image", SCENE], "--image and --mask go together"),
    ([*MAKE, *MASK], "--image and --mask go together"),
    ([*MAKE, *MASK, "--image", SCENE, "--ratio", "2:3"], "--image gives the shape; leave out --ratio"),
    ([*MAKE, "--best-of", "2", "--score", "near"], "the score near holds an edit to its source, but there is none"),
    ([*JUDGE, "--inside", "2"], "add --masked"),
    ([*JUDGE, "--show", "2"], "--show counts what --pictures shows"),
    (["train", "t.toml", "--check-data", "-o", "{tmp}/out"], "--check-data trains nothing; leave out --output"),
    (["train", "t.toml", "--check-data", "--resume"], "--check-data trains nothing"),
    (["train", "t.toml", "--check-data", "--stop-after", "9"], "--check-data trains nothing"),
    (["bench", "--models", "tiny", "--cases", "reroll", "--published", "{tmp}"], "--published is timed beside"),
    (["get", "--list", "--comfyui", "{tmp}"], "--list fetches nothing; name weights alone beside it"),
    (["get", "--list", "--text-precision", "fp8"], "--list fetches nothing"),
    (["get", "--check", "--revision", "a/b@c"], "--check fetches nothing"),
    (["get", "--check", "--keep-original"], "--check fetches nothing"),
    (["get", "--check", "--yes"], "--check fetches nothing"),
    (["convert", FOLDER / FILES[1], "{tmp}/x.safetensors", "--kind", "edit"], "--kind is a transformer's"),
    (["decode", "{begun}", "--scales", "4", "-o", "{tmp}/x.png"], "keep from 1 to 3 of them, not 4"),
    (["decode", "{begun}", "--image", SCENE, "-o", "{tmp}/x.png"], "nothing of --image would show"),
    # without a mask
    ([*EDIT, "--seam", "3"], "--seam fades an edit in at a mask's edge"),
    ([*EDIT[:2], *EDIT[3:], "--region", "a@{mask}", "--region", STAR, "--seam", "3"], "--seam fades an edit in"),
    ([*MAKE, "--seam", "3"], "--seam fades an edit in at a mask's edge"),
    ([*EDIT, "--feather", "2"], "--feather counts only beside a mask; give a mask, or leave --feather at 1"),
    ([*EDIT, "--feather", "2", "--auto-mask", "0.5"], "--feather counts only beside a mask"),
    ([*MAKE, "--feather", "0"], "--feather counts only beside a mask"),
    ([*EDIT, "--inside", "2"], "--inside counts only beside a mask"),
    ([*MAKE, "--inside", "2"], "--inside counts only beside a mask"),
    ([*SWEEP, "--x", "feather=0,1,2"], "feather counts only beside a mask"),
    # tokens have a size
    ([*TOKENS, "--size", "256"], "leave out --size and --fit"),
    ([*TOKENS, "--fit", "aspect"], "leave out --size and --fit"),
    ([*TOKENS, "--extend", "9"], "want a picture"),
    # what was begun
    ([*EDIT, *BEGUN, "--best-of", "2", "--best-at", "3"], "the best is chosen after 3; set --best-at"),
    ([*EDIT, *BEGUN, "--best-of", "2", "--best-at", "2"], "the best is chosen after 2; set --best-at"),
    ([*MAKE, *BEGUN, "--best-of", "2", "--best-at", "3"], "the best is chosen after 3; set --best-at"),
    ([*EDIT, *BEGUN, "--drafted", "3", "--drafter", REFINER], "but 3 are begun already; set --drafted"),
    ([*EDIT, "--begun", "{tokens}"], "give --from-scale from 2 to 7, not the whole edit"),
    # no guidance
    ([*EDIT, "--negative", "blurred", "--guidance", "1"], "--negative counts only with guidance, which is 1"),
    ([*EDIT, "--negative", "blurred", "--unguided", "7"], "--negative counts only with guidance, which is 1"),
    ([*MAKE, "--negative", "blurred", "--guidance", "1"], "--negative counts only with guidance, which is 1"),
    ([*SWEEP, "--negative", "b", "--x", "temperature=0,1", "--guidance", "1"], "negative counts only with guidance"),
    ([*EDIT, "--unguided", "2", "--guidance", "1"], "--unguided ends guidance, but none of the last 2"),
    ([*EDIT, "--unguided", "2", "--guidance", "3,3,3,3,3,1,1"], "--unguided ends guidance, but none of the last 2"),
    ([*JUDGE, "--unguided", "2", "--guidance", "1"], "--unguided ends guidance, but none of the last 2"),
    ([*EDIT, "--best-of", "2", "--score", "instruction", "--guidance", "1"], "use a guidance other than 1"),
    ([*EDIT, "--preset", "faithful", "--guidance", "1", *GREEDY], "--preset faithful bends guidance above 1"),
    ([*MAKE, "--preset", "creative", "--guidance", "1", *GREEDY], "--preset creative bends guidance above 1"),
    # nothing is drawn at random
    ([*EDIT, "--variations", "2", *GREEDY], "--variations draws with several seeds, but --temperature is 0"),
    ([*EDIT, "--variations", "2", "--temperature", "1,1,0,0,0,0,0", *BEGUN], "--variations draws with several seeds"),
    ([*MAKE, "--variations", "2", *GREEDY], "--variations draws with several seeds"),
    ([*EDIT, "--best-of", "2", *GREEDY], "--best-of begins with several seeds, but --temperature is 0 there"),
    ([*EDIT, "--best-of", "2", "--temperature", "0,0,0,0,1,1,1"], "--best-of begins with several seeds"),
    ([*MAKE, "--best-of", "2", *GREEDY], "--best-of begins with several seeds"),
    ([*EDIT, "--top-p", "0.9", *GREEDY], "--top-p counts only where temperature is above 0"),
    ([*MAKE, "--top-p", "0.9", *GREEDY], "--top-p counts only where temperature is above 0"),
    ([*SWEEP, "--x", "guidance=1,2", "--top-p", "0.9", *GREEDY], "--top-p counts only where temperature is above 0"),
    ([*JUDGE, "--top-p", "0.9", *GREEDY], "--top-p counts only where temperature is above 0"),
    ([*SWEEP, "--x", "seed=1,2", *GREEDY], "seed 1 and seed 2 give the same"),
    ([*SWEEP, "--x", "guidance=1,2", "--y", "top_p=0.8,0.9", *GREEDY], "top_p 0.8 and top_p 0.9 give the same"),
    # grids that a window sees whole
    ([*EDIT, "--window", "0.2"], "--window narrows grids of more than 16 rows"),
    ([*MAKE, "--window", "0.2"], "--window narrows grids of more than 16 rows"),
    ([*MAKE[:6], "--size", "512", "--window", "0.2", "--stop", "6"], "--window narrows grids of more than 16 rows"),
    ([*JUDGE, "--window", "0.2"], "--window narrows grids of more than 16 rows"),
    ([*EDIT, "--window", "0.2", "--source-attention", "0.5"], "--window and --source-attention do not go together"),
    # a sweep over what another option sets, or over what does not count
    ([*SWEEP, "--x", "guidance=1,2", "--guidance", "3"], "the sweep goes over guidance itself; leave --guidance out"),
    ([*SWEEP, "--x", "seed=1,2", "--y", "temperature=1,2", "--temperature", "3"], "leave --temperature out"),
    ([*SWEEP, "--x", "seed=1,2", "--y", "top_p=0.8,0.9", "--top-p", "0.7"], "leave --top-p out"),
    ([*SWEEP, "--x", "seed=1,2", "--seed", "3"], "leave --seed out"),
    ([*SWEEP, "--x", "best_at=2,3"], "best_at counts only with best_of"),
    ([*SWEEP, "--x", "score=near,far"], "score counts only with best_of"),
    ([*SWEEP, "--x", "preset=faithful,creative", "--temperature", "1,1,1,1,1,1,1"], "a preset bends one temperature"),
    ([*SWEEP, "--x", "preset=balanced,faithful", "--guidance", "1", *GREEDY], "give the same"),
    # what the list of scales is not
    ([*JUDGE, "--guidance", "3,1"], "guidance has 2 values but the edit runs 7 scales"),
    ([*JUDGE, "--dtype", "fp4"], "unknown dtype"),
]  # fmt: skip
"""A command, and a part of its sentence."""

COUNTS = [
    [*EDIT, *MASK, "--seam", "3", "--feather", "2"],
    [*EDIT, "--protect", "{mask}", "--seam", "3", "--feather", "2"],
    [*EDIT, "--extend", "16", "--seam", "3", "--fill", "white", "--feather", "0"],
    [*EDIT, *MASK, "--crop", "0.2", "--seam", "3"],
    [*EDIT, "--auto-mask", "0.5", "--seam", "3"],
    [*EDIT[:2], *EDIT[3:], "--region", f"{STAR}@{{mask}}", "--region", "make it sepia@{mask}", "--seam", "3"],
    [*MAKE, *MASK, "--image", SCENE, "--seam", "3", "--feather", "2", "--best-of", "2", "--score", "near"],
    [*EDIT, "--stop", "7"],
    [*EDIT, "--unguided", "7"],
    [*EDIT, "--best-of", "2", "--best-at", "7"],
    [*EDIT, "--drafted", "6", "--drafter", REFINER],
    [*EDIT, *BEGUN, "--best-of", "2", "--best-at", "4", "--score", "far"],
    [*EDIT, *BEGUN, "--from-scale", "2", "--stop", "3"],
    [*EDIT, "--auto-mask", "0.5", "--stop", "6"],
    [*EDIT, "--seed", "3", *GREEDY],
    [*EDIT, "--negative", "blurred", "--guidance", "1,1,1,1,1,1,2"],
    [*EDIT, "--variations", "2", "--temperature", "0:1"],
    [*EDIT, "--preset", "faithful", *GREEDY],
    [*MAKE[:6], "--size", "512", "--window", "0.2"],
    ["edit", SCENE, "--features", "{recorded}:in.text.0", "--model", "{recorded}", "--negative", "blurred",
     "--text-encoder", "t5", "-o", "{tmp}/x.png"],
    TOKENS,
    [*SWEEP, "--x", "feather=0,1,2", *MASK],
    [*SWEEP, "--x", "temperature=0,1", "--y", "seed=1,2"],
    [*SWEEP, "--x", "guidance=1,2", "--negative", "blurred"],
    [*SWEEP, "--x", "best_of=2,3", "--y", "best_at=2,3"],
    [*SWEEP, "--x", "temperature=0.5,1", "--top-p", "0.9"],
]  # fmt: skip
"""Their next of kin that do something."""


class Loaded(Exception):
    """What `Editor.load` raises here."""


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Files that commands name."""
    folder = tmp_path_factory.mktemp("named")
    mask = Image.new("L", (256, 256))
    mask.paste(255, (160, 0, 256, 90))
    mask.save(folder / "mask.png")
    schedule = schedule_for("0.06M")
    bits = tuple(torch.zeros(1, 16, 2 * h, 2 * w, dtype=torch.bool) for h, w in schedule.grids)
    Tokens(schedule, bits, (32, 32)).save(folder / "tokens.safetensors")
    Tokens(schedule, bits[:3], (32, 32)).save(folder / "begun.safetensors")
    recorded = GOLDEN / "patchify_256.safetensors"
    return {"mask": folder / "mask.png", "recorded": recorded} | {
        name: folder / f"{name}.safetensors" for name in ("tokens", "begun")
    }


@pytest.fixture
def started(monkeypatch, tmp_path, named):
    """Run a command as a user does, but that nothing can be loaded."""

    def load(*_, **__):
        raise Loaded

    def run(arguments):
        given = [str(a).format(tmp=tmp_path, **named) if "{" in str(a) else str(a) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["varedit", *given])
        main()

    monkeypatch.setattr(Editor, "load", load)
    for module in ("edit", "decode"):
        for name in ("load_transformer", "load_autoencoder"):
            monkeypatch.setattr(f"varedit_core.cli.{module}.{name}", load, raising=False)
    return run


def words(arguments) -> str:
    return " ".join(str(a).rpartition("/")[2] for a in arguments)


@pytest.mark.parametrize(("arguments", "said"), IDLE, ids=[words(arguments) for arguments, _ in IDLE])
def test_what_would_do_nothing_is_a_sentence(started, capsys, tmp_path, arguments, said):
    with pytest.raises(SystemExit) as stop:
        started(arguments)
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2) and "Traceback" not in error
    if stop.value.code == 1:
        assert error.startswith("error: ") and error.count("\n") == 1
    assert said in re.sub(r"[│\s]+", " ", error), error
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("arguments", COUNTS, ids=words)
def test_what_does_something_is_loaded_for(started, arguments):
    with pytest.raises(Loaded):
        started(arguments)


ALWAYS = {
    "what is worked on": {"image", "instruction", "prompt", "features", "region", "source", "target", "file", "files",
                          "model", "weights", "names", "lora", "config", "tokens", "x", "y", "folder"},
    "how it is loaded": {"device", "dtype", "linears", "kind", "text_cache"},
    "numbers that always count": {"guidance", "temperature", "precision", "split", "count", "batch", "repeats",
                                  "models", "sizes", "cases", "cell", "family", "changes"},
    "a seed does no harm where nothing is drawn": {"seed"},
    "where something may change": {"mask", "protect", "extend"},
    "what is written": {"output", "save_tokens", "maps", "preview_dir", "sheet", "report", "save", "pictures"},
    "leave to do something": {"overwrite", "resume"},
    "what is to be gone is gone where it never was": {"strip"},
    "refused beside other families than its own": {"style"},
    "needs nothing but samples, which all have regions": {"masked"},
    "of a decoding": {"vae"},
}  # fmt: skip
"""Options that are never idle, and why."""
HERE = {("sweep",): {"size", "fit"}, ("shapeedit", "evaluate"): {"text_encoder"}}
"""The same of one command."""


def commands():
    def walk(group, before=()):
        for name, one in group.commands.items():
            yield from walk(one, (*before, name)) if hasattr(one, "commands") else [((*before, name), one)]

    return list(walk(typer.main.get_command(app)))


@pytest.mark.parametrize(("name", "command"), commands(), ids=[" ".join(name) for name, _ in commands()])
def test_every_option_was_asked_when_it_does_nothing(name, command):
    """A new option has a command in IDLE that says so, or is never idle. So has a knob whose control has an `idle` of
    its own; of the others the tests below ask."""
    cases = [list(map(str, arguments)) for arguments, _ in IDLE if tuple(map(str, arguments))[: len(name)] == name]
    given = {word for arguments in cases for word in arguments}
    always = HERE.get(name, set()).union(*ALWAYS.values())
    for parameter in command.params:
        asked = any(option in given for option in (*parameter.opts, *parameter.secondary_opts))
        said = asked or parameter.name in always or parameter.name in BY_THEMSELVES
        assert said, f"when does {parameter.opts} of {name} do nothing?"


KNOBS = {knob.name: (kind, knob) for kind in registered() for knob in kind.knobs if kind.group != "curves"}
BY_THEMSELVES = {name for name, (kind, _) in KNOBS.items() if kind.idle.__func__ is Control.idle.__func__}
"""Knobs of which their `needs` and `scales` say all."""
NEEDING = [name for name, (_, knob) in KNOBS.items() if set(knob.needs.split()) - {"source"}]
COUNTING = [
    name
    for name, (_, knob) in KNOBS.items()
    if knob.scales and (knob.high or SCALES + 1) > SCALES and name != "drafted"
]
"""Without the drafter's, who leaves at least one scale, which is another sentence."""
APART = [name for name, (_, knob) in KNOBS.items() if knob.apart]


def set_to(name: str, value: object = None) -> list[object]:
    """A knob as an option, at a value that is not its default."""
    knob = KNOBS[name][1]
    others = [one for one in (*knob.choices, knob.high, knob.low) if one not in (None, knob.default)]
    if not others:  # without bounds on a side
        others = [knob.default + (1 if knob.high is None else -1)]
    return ["--" + name.replace("_", "-"), value or others[0]]


def alone(started, capsys, *more: object) -> str:
    """What `varedit edit` says to more options, before it loads anything."""
    with pytest.raises(SystemExit):
        started([*EDIT, *more])
    return capsys.readouterr().err


@pytest.mark.parametrize("name", NEEDING)
def test_a_knob_without_what_it_needs_is_a_sentence(started, capsys, name):
    option, value = set_to(name)
    assert f"{option} counts only " in alone(started, capsys, option, value)


@pytest.mark.parametrize("name", COUNTING)
def test_a_knob_beyond_the_scales_is_a_sentence(started, capsys, name):
    needs = KNOBS[name][1].needs.split()
    more = [*(MASK if "mask" in needs else []), *(part for need in needs if need in KNOBS for part in set_to(need))]
    option, value = set_to(name, SCALES + 1)
    assert f"{option} is 8 but the edit has 7 scales; give at most 7" in alone(started, capsys, *more, option, value)


@pytest.mark.parametrize("name", APART)
def test_knobs_that_do_not_go_together_are_a_sentence(started, capsys, name):
    other = KNOBS[name][1].apart
    said = alone(started, capsys, *MASK, *set_to(name), *set_to(other))
    assert said == f"error: {name} and {other} do not go together; choose one\n"


def test_what_knobs_name_is_there():
    assert {"inside"} <= {*APART} and {"feather", "best_at"} <= {*NEEDING} and {"stop"} <= {*COUNTING}
    for kind, knob in KNOBS.values():
        own = {one.name for one in knobs(kind.group)} - {knob.name}
        assert {*knob.needs.split()} <= {"source", "mask", *own} and {knob.apart} <= {"", *own}, knob.name


# --- the library says the same ---


@pytest.fixture(scope="module")
def editor():
    return Editor.load(*(FOLDER / name for name in FILES), device="cpu")


ONE = {"size": "0.06M"}
LIBRARY = [
    (dict(shortcuts=Shortcuts(stop=8)), "stop is 8 but the edit has 7 scales; give at most 7"),
    (dict(shortcuts=Shortcuts(unguided=8)), "unguided is 8 but the edit has 7 scales"),
    (dict(controls=Controls(best_of=2, best_at=8)), "best_at is 8 but the edit has 7 scales"),
    (dict(controls=Controls(best_at=2)), "best_at counts only with best_of; set that too, or leave best_at at 4"),
    (dict(controls=Controls(score="near")), "score counts only with best_of"),
    (dict(controls=Controls(feather=2)), "feather counts only beside a mask"),
    (dict(seam=3), "seam fades an edit in at a mask's edge"),
    (dict(variations=2, settings=SamplingSettings(temperature=0)), "variations draws with several seeds"),
    (dict(controls=Controls(best_of=2), settings=SamplingSettings(temperature=0)), "best_of begins with several seeds"),
    (dict(negatives="blurred", settings=SamplingSettings(guidance=1)), "negative counts only with guidance"),
    (dict(shortcuts=Shortcuts(unguided=1), settings=SamplingSettings(guidance=1)), "unguided ends guidance"),
    (dict(shortcuts=Shortcuts(window=0.2)), "window narrows grids of more than 16 rows"),
    (dict(controls=Controls(auto_mask=0.5), shortcuts=Shortcuts(stop=3)), "auto_mask counts at the last 2 scales"),
    (dict(controls=Controls(best_of=2), shortcuts=Shortcuts(stop=3)), "best_at is 4 but stop ends the edit after 3"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "said"), LIBRARY, ids=[said for _, said in LIBRARY])
def test_the_library_says_it_too(editor, monkeypatch, wrong, said):
    monkeypatch.setattr("varedit_core.editor.run", lambda *_, **__: pytest.fail("the edit began"))
    with pytest.raises(ValueError, match=re.escape(said)):
        editor.run(SCENE, STAR, **ONE, **wrong)


def test_tokens_and_texts_that_the_library_cannot_use(editor, named):
    tokens = Tokens.load(named["tokens"])
    for more in ({"size": "1M"}, {"size": "1M", "method": "aspect"}):
        with pytest.raises(ValueError, match="leave out size and method"):
            editor.run(tokens, STAR, **more)
    with pytest.raises(ValueError, match="leave out features"):
        editor.run(tokens, STAR, features=torch.zeros(1, 16, 32, 32))
    with pytest.raises(ValueError, match="1 picture but 2 instructions"):
        each([STAR, STAR], 1, "instruction")


def test_a_sweep_of_the_library_is_looked_at_before_it_runs():
    schedule, greedy = schedule_for("0.06M"), SamplingSettings(temperature=0)
    for axes, settings, said in (
        ([Axis("feather", (1, 2))], SamplingSettings(), "feather counts only beside a mask"),
        ([Axis("seed", (1, 2))], greedy, "seed 1 and seed 2 give the same"),
    ):
        with pytest.raises(ValueError, match=said):
            check_sweep(planned(*axes, settings=settings), schedule)
    check_sweep(planned(Axis("temperature", (0.0, 1.0)), Axis("seed", (1, 2))), schedule)


# --- previews and contact sheets however an edit runs ---


def varedit(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.fixture
def parts(monkeypatch):
    """Counts the parts in which results run, in memory for as many rows as one asks for."""
    counted, real = [], loop.sample

    def limited(rows: int) -> list:
        monkeypatch.setattr(
            TorchMemory, "free", lambda self, job: rows and job.needed("exact") * (rows + 0.5) / job.images
        )
        return counted

    def noted(engine, batch, controls=()):
        counted.append(len(batch.seeds))
        return real(engine, batch, controls)

    for module in ("driver", "beginnings"):
        monkeypatch.setattr(f"varedit_core.sampling.{module}.sample", noted)
    return limited


def width(pictures: int) -> int:
    """Pixels of a contact sheet of so many columns."""
    return contact_sheet([Row("", [Image.open(SCENE)] * pictures)], [""] * pictures).width


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--drafter", FOLDER / FILES[0], "--drafted", "3"], [1]),
        (["--variations", "3", "--temperature", "1"], [1, 1, 1]),
        (["--variations", "2", "--temperature", "1", "--best-of", "2", "--best-at", "2"], [1, 1, 1, 1]),
    ],
    ids=["a drafter", "variations one by one", "the best of two one by one"],
)
def test_previews_and_the_sheet_however_an_edit_runs(parts, tmp_path, more, wanted):
    counted = parts(1)
    varedit(
        *EDIT[:3],
        "-o",
        tmp_path / "x.png",
        "--preview-dir",
        tmp_path / "p",
        "--contact-sheet",
        tmp_path / "s.png",
        *more,
    )
    assert counted == wanted
    results = sorted(path.name for path in tmp_path.glob("x*.png"))
    assert len(results) == max(1, len(wanted) if "--best-of" not in more else 2)
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    stem = results[0].removesuffix(".png")
    grids = [f"{h}x{w}" for h, w in schedule_for("0.06M").grids]
    assert names == [f"{stem}-scale-{k + 1:02d}-{grid}.png" for k, grid in enumerate(grids)]
    last = Image.open(tmp_path / "p" / names[-1])
    assert last.tobytes() == Image.open(tmp_path / results[0]).convert(last.mode).tobytes()
    assert Image.open(tmp_path / "s.png").width == width(SCALES + 2) != width(SCALES + 1)
    assert len({Image.open(tmp_path / "p" / name).tobytes() for name in names}) > 1


def test_variations_are_the_same_however_memory_splits_them(parts, tmp_path):
    for rows in (1, 3):
        counted = parts(rows)
        varedit(*EDIT[:3], "-o", tmp_path / f"{rows}.png", "--variations", "3", "--temperature", "1")
    assert counted == [1, 1, 1, 3]
    one, whole = ([Image.open(tmp_path / f"{rows}-{n}.png").tobytes() for n in (1, 2, 3)] for rows in (1, 3))
    assert one == whole and len(set(one)) == 3


# --- pictures of text have all that needs no source ---


@pytest.fixture(scope="module")
def infinity(tmp_path_factory):
    """A small text-to-image checkpoint of random weights, with the demo's text encoder and VAE sizes."""
    transformer, vae, text = (FOLDER / name for name in FILES)
    width = Editor.load(transformer, vae, text, device="cpu").transformer.config.text_width
    torch.manual_seed(3)
    shapes = published_shapes(depth=8, width=128, heads=2, token_bits=64, text=width)
    path = tmp_path_factory.mktemp("infinity") / "infinity_8b.pth"
    torch.save({key: random_tensor(key, shape, "cpu") for key, shape in shapes.items()}, path)
    return ["--model", path, "--vae", vae, "--text-encoder", text, "--size", "256"]


def test_generate_has_every_control_that_needs_no_source():
    names = {option for name, one in commands() if name == ("generate",) for p in one.params for option in p.opts}
    for knob in knobs("controls"):
        assert (f"--{knob.name.replace('_', '-')}" in names) == ("source" not in knob.needs.split()), knob.name
    assert names >= {"--region", "--begun", "--from-scale", "--save-tokens", "--seam", "--preset", "--variations"}


def test_generate_with_controls_regions_begun_and_tokens(infinity, named, tmp_path):
    make = ("generate", "a cat", *infinity, "--temperature", "1")
    varedit(*make, "-o", tmp_path / "a.png", "--save-tokens", tmp_path / "a.safetensors")
    tokens = Tokens.load(tmp_path / "a.safetensors")
    assert tokens.complete and len(tokens) == SCALES
    begun = ("--begun", tmp_path / "a.safetensors", "--from-scale", "4")
    varedit(*make, "-o", tmp_path / "again.png", *begun)
    assert Image.open(tmp_path / "again.png").tobytes() == Image.open(tmp_path / "a.png").tobytes()
    varedit(*make, "-o", tmp_path / "b.png", *begun, "--seed", "9", "--save-tokens", tmp_path / "b.safetensors")
    other = Tokens.load(tmp_path / "b.safetensors")
    same = [torch.equal(a, b) for a, b in zip(tokens.bits, other.bits)]
    assert same[:3] == [True] * 3 and not all(same)
    best = ("--best-of", "3", "--best-at", "2", "--score", "instruction")
    varedit(*make, "-o", tmp_path / "c.png", *best, "--save-tokens", tmp_path / "c.safetensors")
    chosen = [Tokens.load(tmp_path / "c.safetensors").bits[1]]
    for seed in range(3):
        varedit(
            *make,
            "-o",
            tmp_path / f"{seed}.png",
            "--seed",
            seed,
            "--stop",
            "2",
            "--save-tokens",
            tmp_path / f"{seed}.safetensors",
        )
        chosen.append(Tokens.load(tmp_path / f"{seed}.safetensors").bits[1])
    assert any(torch.equal(chosen[0], candidate) for candidate in chosen[1:])
    regions = ("--region", "a dog", "--region", f"a cat@{named['mask']}")
    varedit("generate", "", *infinity, *regions, "-o", tmp_path / "d.png", "--variations", "2")
    assert Image.open(tmp_path / "d-1.png").tobytes() != Image.open(tmp_path / "d-2.png").tobytes()


def test_a_margin_counts_where_a_picture_is_repainted(infinity, named, tmp_path):
    repaint = ("generate", "a cat", *infinity, "--image", SCENE, "--mask", named["mask"], "--temperature", "0")
    for margin in ("0", "4"):
        varedit(
            *repaint,
            "--feather",
            margin,
            "-o",
            tmp_path / f"{margin}.png",
            "--save-tokens",
            tmp_path / f"{margin}.safetensors",
        )
    narrow, wide = (Tokens.load(tmp_path / f"{margin}.safetensors").free for margin in ("0", "4"))
    assert narrow.any() and (narrow & ~wide).sum() == 0 and wide.sum() > narrow.sum()


def test_regions_of_pictures_from_text_need_a_rest(infinity, named):
    editor = Editor.load(*infinity[1:6:2], device="cpu")
    mask = Image.open(named["mask"])
    with pytest.raises(ValueError, match="add one without a mask, for everywhere"):
        editor.make((), "0.06M", regions=[Region("a dog", mask)])
    with pytest.raises(ValueError, match="leave out ratio"):
        editor.make("a dog", "0.06M", 1.5, picture=SCENE, mask=mask)
    assert set(PRESETS) >= {"faithful", "creative"}
