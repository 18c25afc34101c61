"""Published weights by their name, from a hub on this machine: fetched, interrupted, damaged, found, and used."""

import ast
import multiprocessing
import os
import re
import shlex
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.file_download
import pytest
import typer
from hub import INFINITY, T5, VAREDIT, Hub, kept, repositories
from PIL import Image
from safetensors import safe_open
from support import ROOT
from typer.testing import CliRunner

from varedit_core import Editor
from varedit_core.cards import Card
from varedit_core.cli.app import app, main
from varedit_core.hub import fetching, find, get, plan, remote
from varedit_core.hub.catalogue import SETS
from varedit_core.hub.manifest import Manifest, path_of
from varedit_core.hub.places import Place, home
from varedit_core.made_for import MadeFor

COMMAND = typer.main.get_command(app)
LORAS = ROOT / "demo" / "loras"
VAE = "infinity_vae_d56_f8_14_patchify"


@pytest.fixture(scope="module")
def published():
    return repositories()


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """The hub as this process sees it, and an empty folder of our own."""
    every = {name: type(one)(dict(one.files), one.card, one.revision) for name, one in published.items()}
    with Hub(every) as hub:
        constants = huggingface_hub.constants
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
        monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setenv("VAREDIT_HOME", str(tmp_path / "home"))
        # The commands are put together once: typer takes a tenth of a second each time.
        monkeypatch.setattr("typer.testing._get_command", lambda app: COMMAND)
        monkeypatch.setattr("varedit_core.cli.app.app", COMMAND)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub


def run(*arguments, answer: str = "", terminal: bool = False):
    """A command in this process. answer: what is typed on a terminal."""
    with pytest.MonkeyPatch.context() as patch:
        if terminal:
            patch.setattr("varedit_core.cli.get.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
        return CliRunner().invoke(app, [str(one) for one in arguments], input=answer)


def fetched(*arguments):
    done = run("get", *arguments, "--yes")
    assert done.exit_code == 0, (done.output, done.exception)
    return " ".join(done.output.split())


@pytest.fixture
def failed(monkeypatch, capsys):
    """The sentence of a command that fails as a user runs it."""

    def fail(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["varedit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr().err.splitlines()
        assert stop.value.code == 1 and said[-1].startswith("error: "), said
        assert sum(line.startswith(("error", "Traceback")) for line in said) == 1
        return said[-1].removeprefix("error: ")

    return fail


def place() -> Place:
    return Place(home() / "models")


def test_a_whole_run(hub):
    said = fetched("8B-512")
    wanted = {"diffusion_models/8B-512-bf16", f"vae/{VAE}-fp32", "text_encoders/flan-t5-xl-bf16/flan-t5-xl-bf16"}
    beside = {f"text_encoders/flan-t5-xl-bf16/{name}" for name in ("config.json", "tokenizer.json", "spiece.model")}
    files = {f"{name}{end}" for name in wanted for end in (".safetensors", ".manifest.json", ".md")}
    assert kept(home() / "models") == files | beside
    assert not (home() / "originals").exists() or not kept(home() / "originals"), "the downloads are gone"
    for told in (
        "HiDream-ai/VAREdit at 111111111111 (licence mit;", "licence a licence of its own", "8B-512.pth (",
        "google/flan-t5-xl at 333333333333 (its page tells no licence;", "to download: ", "in between",
    ):  # fmt: skip
        assert told in said, told
    assert "tf_model" not in said and not any("tf_model" in path for _, path, _ in hub.asked)
    transformer, vae, text = find("8B-512")
    assert MadeFor.of(transformer).size == "0.25M" and text.is_dir()
    with safe_open(transformer, "pt") as file:
        assert file.metadata()["varedit.converted_from"] == "8B-512.pth"
        assert file.metadata()["varedit.kind"] == "edit"
    made = Manifest.read(transformer)
    assert made.source.revision == "1" * 40 and made.source.licence == {"license": "mit"}
    assert made.made_by == "varedit get 8B-512 --precision bf16 --text-precision bf16"
    (original,) = made.source.files.items()
    assert original[0] == "8B-512.pth" and original[1].bytes == len(hub.repositories[VAREDIT].files["8B-512.pth"])
    editor = Editor.load(transformer, vae, text, device="cpu")
    assert editor.transformer.config.source and editor.made_for.side == "512"
    before = len(hub.asked)
    assert "8B-512 is here; there is nothing to download" in fetched("8B-512") and len(hub.asked) == before


def test_sets_share_their_parts(hub):
    fetched("8B-512")
    before, again = kept(home() / "models"), len(hub.asked)
    said = fetched("8B-1024", "8B-512")
    assert {path.partition(".")[0] for path in kept(home() / "models") - before} == {"diffusion_models/8B-1024-bf16"}
    assert said.count("here: ") == 3 and not any(T5 in path for _, path, _ in hub.asked[again:])


@pytest.mark.parametrize(("name", "stem"), [("infinity-8b", "infinity_8b"), ("infinity-2b", "infinity_2b_reg")])
def test_infinity_makes_pictures_of_text(hub, name, stem):
    fetched(name, "--precision", "fp8")
    transformer, vae, text = find(name)
    assert (transformer.name, text.name) == (f"{stem}-fp8.safetensors", "flan-t5-xl-int8")
    assert not Editor.load(transformer, vae, text, device="cpu").transformer.config.source
    assert "pipeline_tag: text-to-image" in transformer.with_suffix(".md").read_text()


def test_the_precision_that_is_asked_for(hub, failed):
    fetched("8B-512", "--precision", "fp8", "--text-precision", "fp32")
    assert "not here in bf16, but in fp8; fetch it with: varedit get 8B-512 --precision bf16" in failed(
        "edit", ROOT / "samples" / "cat.jpg", "x", "--weights", "8B-512", "--precision", "bf16"
    )
    fetched("8B-512")
    assert [path.name for path in find("8B-512")] == [
        "8B-512-bf16.safetensors", f"{VAE}-fp32.safetensors", "flan-t5-xl-bf16"
    ]  # fmt: skip
    assert [path.name for path in find("8B-512", "fp8", "fp32")][::2] == ["8B-512-fp8.safetensors", "flan-t5-xl-fp32"]


def test_the_precision_that_a_card_takes(hub, monkeypatch):
    assert "precision bf16: no GPU is found here" in fetched("2B-512")
    for free, eight, names, precision in (
        (24e9, "fp8", ["8B-512"], "bf16"), (12e9, "int8", ["8B-512"], "int8"), (16e9, "fp8", ["8B-1024"], "fp8"),
        (24e9, "fp8", ["8B-512", "8B-1024"], "fp8"), (8e9, "fp8", ["8B-512"], "nvfp4"),
        (3e9, "fp8", ["8B-512"], "nvfp4"),
    ):  # fmt: skip
        card = Card("a card", free, eight)
        monkeypatch.setattr(Card, "here", lambda card=card: card)
        said = " ".join(run("get", *names).output.split())
        assert f"precision {precision}: a card has" in said and "--precision takes another" in said
        assert ("has to stream the weights" in said) == (free == 3e9)


def test_into_a_comfyui(hub, tmp_path, failed):
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "models").mkdir(parents=True)
    assert "is no ComfyUI folder" in failed("get", "8B-512", "--yes", "--comfyui", comfyui)
    assert "does not exist" in failed("get", "8B-512", "--yes", "--comfyui", tmp_path / "nowhere")
    (comfyui / "main.py").touch()
    assert f"name the folder above it, {comfyui}" in failed("get", "8B-512", "--yes", "--comfyui", comfyui / "models")
    assert not hub.asked, "said before anything is asked"
    fetched("8B-512", "--comfyui", comfyui)
    assert (comfyui / "models" / "diffusion_models" / "8B-512-bf16.safetensors").is_file()
    assert find("8B-512")[2] == comfyui / "models" / "text_encoders" / "flan-t5-xl-bf16"
    assert run("get", "--check").exit_code == 0
    (comfyui / "models" / "vae" / f"{VAE}-fp32.safetensors").unlink()
    checked = run("get", "--check")
    assert checked.exit_code == 1 and f"run: varedit get 8B-512 --comfyui {comfyui}" in checked.output
    fetched("8B-512", "--comfyui", comfyui)
    assert run("get", "--check").exit_code == 0


# --- interrupted ---


def test_a_cut_connection_goes_on_within_a_run(hub):
    hub.cut["8B-512.pth"] = [20000, 30000]
    fetched("8B-512")
    ranges = hub.ranges("8B-512.pth")
    assert ranges[0] == "" and len(ranges) == 3 and all(0 < int(one[6:-1]) <= 50000 for one in ranges[1:])


def test_a_network_that_fails_for_good_goes_on_at_the_next_run(hub, failed):
    hub.cut["8B-512.pth"] = [20000] + [0] * 20
    assert "it goes on from here" in failed("get", "8B-512", "--yes")
    (part,) = (home() / "originals").rglob("8B-512.pth.*")
    begun = part.stat().st_size
    assert 0 < begun <= 20000
    assert "not yet converted" in run("get", "--list").output
    hub.cut.clear()
    hub.asked.clear()
    fetched("8B-512")
    assert hub.ranges("8B-512.pth") == [f"bytes={begun}-"]
    assert run("get", "--check").exit_code == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that ends without a word is a fork of this one")
def test_a_killed_process_goes_on(hub):
    """In a process of its own: nothing of Python's cleans up."""
    begun = threading.Event()
    hub.cut["8B-512.pth"], hub.waiting = [60000], lambda: (begun.set(), threading.Event().wait(60))
    process = multiprocessing.get_context("fork").Process(target=get, args=("8B-512",))
    process.start()
    try:
        assert begun.wait(60)
        while not (found := [one for one in (home() / "originals").rglob("*.part") if one.stat().st_size > 50000]):
            assert process.is_alive()
    finally:
        process.kill()
        process.join()
    size, hub.waiting = found[0].stat().st_size, None
    hub.asked.clear()
    fetched("8B-512")
    assert hub.ranges("8B-512.pth") == [f"bytes={size}-"] and run("get", "--check").exit_code == 0


STAGES = {
    "converting": "fetching.convert",
    "copying": "fetching.write_bytes",
    "the checksums": "fetching.sum_of",
    "the card": "fetching.write_text",
    "the manifest": "manifest.write_json",
    "deleting": "fetching._discard",
}


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_after_the_downloads(hub, monkeypatch, stage):
    """At every later step: what was downloaded is not downloaded again, what was converted not converted again."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def downloads() -> list[str]:
        return sorted(path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path)

    with monkeypatch.context() as patch:
        patch.setattr(f"varedit_core.hub.{STAGES[stage]}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get("8B-512")
    before, true, converted = downloads(), fetching.convert, []
    assert any(path.endswith("/8B-512.pth") for path in before)
    with pytest.raises(ValueError, match="fetch it with: varedit get 8B-512$|^$"):
        find("8B-512")
    monkeypatch.setattr(fetching, "convert", lambda source, *rest: converted.append(source.name) or true(source, *rest))
    get("8B-512")
    assert len(downloads()) == len(set(downloads())), "each file once"
    assert ("8B-512.pth" in converted) == (stage == "converting")
    assert ("flan-t5-xl" in converted) == (stage != "copying")
    assert not kept(home() / "originals"), "the downloads are gone"
    assert run("get", "--check").exit_code == 0


def test_two_at_once(hub, failed):
    with fetching._alone():
        assert "another varedit get is at work" in failed("get", "8B-512", "--yes")


# --- wrong ---


def test_a_download_that_is_not_what_the_hub_has(hub, failed):
    whole = len(hub.repositories[VAREDIT].files["8B-512.pth"])
    hub.short = {"8B-512.pth"}
    assert "cannot be reached, or ended the transfer (Consistency check failed" in failed("get", "8B-512", "--yes")
    hub.short.clear()
    hub.asked.clear()
    for name in ("8B-512.pth", "config.json"):
        hub.wrong = {name}
        assert f"{name} of " in (said := failed("get", "8B-512", "--yes")) and "its checksum is another" in said
        hub.wrong = set()
        assert not [file for file in kept(home()) if name in file], "nothing of it is left to go on from"
    fetched("8B-512")
    assert hub.ranges("8B-512.pth") == [f"bytes={whole - 99}-", ""]
    assert run("get", "--check").exit_code == 0


REFUSED = [
    ((403, "GatedRepo"), f"{T5} is only for those who accept its terms; do so at {{hub}}/{T5}, then set HF_TOKEN"),
    ((401, "GatedRepo"), f"{T5} is only for those who accept its terms"),
    ((401, "RepoNotFound"), f"{{hub}} does not give {T5} to you (it is not there, or closed); check HF_ENDPOINT"),
    ((403, ""), f"{{hub}} does not give {T5} to you"),
    ((503, ""), "{hub} cannot be reached, or ended the transfer"),
]


@pytest.mark.parametrize(("refused", "said"), REFUSED, ids=[f"{one} {two}" for (one, two), _ in REFUSED])
def test_a_hub_that_refuses(hub, failed, refused, said):
    hub.repositories[T5].refused = refused
    assert said.format(hub=hub.address) in failed("get", "8B-512", "--yes")
    assert not kept(home()), "said before anything is downloaded"


def test_no_network(hub, failed):
    hub.server.shutdown()
    hub.server.server_close()
    assert f"{hub.address} cannot be reached" in failed("get", "8B-512", "--yes")


def test_offline(hub, failed, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids downloads" in failed("get", "8B-512", "--yes")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    fetched("8B-512")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "there is nothing to download" in fetched("8B-512") and len(find("8B-512")) == 3


def test_a_token_is_for_the_hub_alone(hub, monkeypatch):
    """Not for the address to which it sends for large files."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetched("8B-512")
    assert hub.tokens == {"hub": {"Bearer hf_secret"}, "cdn": {""}}


def test_the_library_is_imported_when_it_is_needed():
    for path in sorted((ROOT / "varedit_core").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "huggingface_hub" not in ast.unparse(node), path


def test_without_the_library(hub, failed, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'install it with: pip install "huggingface_hub>=0.30"' in failed("get", "8B-512", "--yes")


def test_a_repository_that_lacks_a_file(hub, failed):
    del hub.repositories[T5].files["tokenizer.json"]
    assert f"{T5} has no tokenizer.json at the revision {'3' * 40}" in failed("get", "8B-512", "--yes")
    hub.repositories[VAREDIT].files["../8B-512.pth"] = hub.repositories[VAREDIT].files.pop("8B-512.pth")
    assert f"{VAREDIT} has no 8B-512.pth" in failed("get", "8B-512", "--yes")


def test_revisions(hub, failed):
    for given in ("v1", f"{VAREDIT}@v1", f"{T5}@"):
        said = failed("get", "infinity-2b", "--yes", "--revision", given)
        assert said == f"--revision takes OWNER/NAME@REVISION of {INFINITY}, {T5}, not {given!r}"
    assert f"{VAREDIT} has no revision v9" in failed("get", "8B-512", "--yes", "--revision", f"{VAREDIT}@v9")
    fetched("8B-512", "--revision", f"{VAREDIT}@v1")
    assert f"/api/models/{VAREDIT}/revision/v1" in [path for _, path, _ in hub.asked]
    assert f"is of the revision {'1' * 40}; delete it to fetch v9" in failed(
        "get", "8B-512", "--yes", "--revision", f"{VAREDIT}@v9"
    )


@pytest.mark.parametrize(("arguments", "said"), [
    (["8b-512"], "there are no weights '8b-512', but 8B-512, 8B-1024, 2B-512, infinity-2b, infinity-8b; write 8B-512"),
    (["infinty-2B"], "write infinity-2b"),
    (["xyz"], "choose another"),
    (["8B-512", "--precision", "fp4"], "unknown precision 'fp4'; choose one of fp32, bf16"),
    (["8B-512", "--text-precision", "fp4"], "unknown precision 'fp4'; choose one of fp32, bf16"),
    ([], "name the weights to fetch; varedit get --list says which there are"),
    (["--list", "--check"], "ask one of them"),
    (["--list", "--yes"], "--list fetches nothing"),
    (["--check", "--precision", "fp8"], "--check fetches nothing"),
    (["--check"], "nothing of any set is here"),
    (["8B-512"], "there is no terminal to answer on; add --yes"),
])  # fmt: skip
def test_what_cannot_be_done_is_a_sentence(hub, failed, arguments, said):
    assert said in failed("get", *arguments)
    assert not kept(home()) and not [path for _, path, _ in hub.asked if "resolve" in path]


def test_no_is_an_answer(hub):
    for answer, code in (("n\n", 1), ("\n", 1), ("y\n", 0)):
        done = run("get", "2B-512", answer=answer, terminal=True)
        assert done.exit_code == code and "Download them?" in done.output, done.output
        assert ("nothing was downloaded" in done.output) == bool(code) == (not kept(home()))


def test_a_full_disk_is_told_beforehand(hub, failed, monkeypatch):
    sizes = plan(["8B-512"])
    assert sizes.missing == sum(step.remote.bytes for step in sizes.steps) and sizes.result < sizes.most
    kept_too = plan(["8B-512"], keep_original=True)
    assert kept_too.result == sizes.result + sizes.missing == kept_too.most
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: SimpleNamespace(free=sizes.most - 1))
    assert "free, and this takes about" in failed("get", "8B-512", "--yes")
    monkeypatch.setattr(fetching, "_disk", str)  # each folder on one of its own
    fetched("8B-512")


def test_a_disk_that_fills_up(hub, failed):
    resource = pytest.importorskip("resource", reason="a full disk is simulated by a limit on files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50000, limits[1]))
        said = failed("get", "8B-512", "--yes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"cannot write \S*8B-512.pth\S* \(File too large\); make room, or choose another place$", said)
    hub.asked.clear()
    fetched("8B-512")
    assert hub.ranges("8B-512.pth") == ["bytes=50000-"]


def test_what_is_in_the_way(hub, failed):
    weights = place().weights(SETS["8B-512"][0], "bf16")
    fetched("8B-512")
    path_of(weights).unlink()
    assert "was not made by varedit get, as 8B-512-bf16.manifest.json is missing beside it" in failed("get", "8B-512")
    path_of(weights).write_text("[]")
    assert "is not a readable manifest; delete it and 8B-512-bf16.safetensors" in failed("get", "8B-512")
    weights.unlink()
    path_of(weights).unlink()
    fetched("8B-512")
    assert run("get", "--check").exit_code == 0


def test_damage_is_found_and_mended(hub, failed):
    fetched("8B-512")
    transformer, _, text = find("8B-512")
    whole = transformer.read_bytes()
    for content, said in ((whole[:-1] + b"x", "its SHA-256 is not that of its manifest"), (whole[:-9], "in place of")):
        transformer.write_bytes(content)
        checked = run("get", "--check", "8B-512")
        assert checked.exit_code == 1 and f"{transformer} is damaged: " in checked.output and said in checked.output
        assert "delete what is left of it and run: varedit get 8B-512" in checked.output
    assert "is damaged: it has" in failed("get", "8B-512", "--yes")
    assert "NOT WHOLE" in run("get", "--list").output
    with pytest.raises(
        ValueError, match="is damaged: it has .*; delete what is left of it and run: varedit get 8B-512"
    ):
        find("8B-512")
    transformer.unlink()
    fetched("8B-512")
    assert transformer.read_bytes() == whole
    (text / "tokenizer.json").unlink()
    assert f"{text / 'tokenizer.json'} is gone" in run("get", "--check").output


def test_downloads_are_kept_where_that_is_asked_for(hub, failed):
    fetched("8B-512", "--keep-original")
    folder = home() / "originals" / "HiDream-ai" / "111111111111" / "VAREdit"
    assert (folder / "8B-512.pth").read_bytes() == hub.repositories[VAREDIT].files["8B-512.pth"]
    assert "no download to keep" in failed("get", "8B-512", "--yes", "--keep-original")
    fetched("8B-512")
    assert (folder / "8B-512.pth").is_file()
    hub.asked.clear()
    fetched("8B-512", "--precision", "fp32")
    assert not hub.ranges("8B-512.pth"), "converted of the download that was kept"
    assert not (folder / "8B-512.pth").exists(), "which this time was not to be kept"


def test_a_kept_download_that_was_damaged_is_not_converted(hub, failed):
    fetched("8B-512", "--keep-original")
    original = home() / "originals" / "HiDream-ai" / "111111111111" / "VAREdit" / "8B-512.pth"
    original.write_bytes(original.read_bytes()[:-1] + b"x")
    assert f"{original} is damaged" in failed("get", "8B-512", "--yes", "--precision", "fp32")
    original.unlink()
    fetched("8B-512", "--precision", "fp32")
    assert run("get", "--check").exit_code == 0


def test_a_place_that_may_not_be_written_is_told_before_the_download(hub, failed, tmp_path):
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "models").mkdir(parents=True)
    (comfyui / "main.py").touch()
    (comfyui / "models" / "vae").write_text("no folder")
    assert "cannot make the folder" in failed("get", "8B-512", "--yes", "--comfyui", comfyui)
    assert not hub.ranges("8B-512.pth")


def test_the_list(hub):
    assert run("get", "--list").output.count("not here") == 15
    fetched("8B-512")
    said = run("get", "--list", "8B-1024").output
    assert said.startswith("8B-1024\n  8B-1024: not here; of HiDream-ai/VAREdit\n")
    assert "  flan-t5-xl: bf16, " in said and str(find("8B-512")[2]) in said


# --- used ---


def test_weights_on_the_command_line(hub, tmp_path, failed):
    photo = tmp_path / "photo.png"
    Image.open(ROOT / "samples" / "cat.jpg").resize((60, 45)).save(photo)
    assert "varedit get 2B-512" in failed("edit", photo, "a hat", "--weights", "2B-512")
    fetched("2B-512", "infinity-2b")
    tokens = tmp_path / "t.safetensors"
    small = ("--size", "256", "--device", "cpu")
    for arguments in (
        ("edit", photo, "a hat", "--weights", "2B-512", *small, "--save-tokens", tokens, "-o", tmp_path / "a.png"),
        ("sweep", photo, "a hat", "--x", "seed=1,2", "--weights", "2B-512", *small, "-o", tmp_path / "b.png"),
        ("decode", tokens, "--weights", "2B-512", "--device", "cpu", "-o", tmp_path / "c.png"),
        ("generate", "a hat", "--weights", "infinity-2b", *small, "-o", tmp_path / "d.png"),
    ):  # fmt: skip
        done = run(*arguments)
        assert done.exit_code == 0, (done.output, done.exception)
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "c.png").tobytes()
    for more, said in (
        (("--vae", "x"), "--weights names all files of a model; leave out --model"),
        (("--precision", "fp8"), "is not here in fp8, but in bf16; fetch it with: varedit get 2B-512 --precision fp8"),
        (("--text-precision", "fp8"), "fetch it with: varedit get 2B-512 --text-precision fp8"),
    ):
        assert said in failed("edit", photo, "a hat", "--weights", "2B-512", *more)
    assert "--weights has a VAE of its own" in failed("decode", tokens, "--weights", "2B-512", "--vae", "x")


def test_the_readmes_two_commands(hub, tmp_path, monkeypatch):
    """As they are written, from nothing to an edit."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## With the published weights")[2]
    block = re.search(r"```\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", " ")
    lines = [shlex.split(line) for line in block.splitlines()]
    assert [line[:2] for line in lines] == [["pip", "install"], ["varedit", "get"], ["varedit", "edit"]]
    monkeypatch.chdir(tmp_path)
    Image.open(ROOT / "samples" / "cat.jpg").resize((96, 60)).save("photo.jpg")
    for line in lines[1:]:
        done = run(*line[1:], answer="y\n", terminal=True)
        assert done.exit_code == 0, (done.output, done.exception)
    assert Image.open("photo-edited.png").size == (96, 60)


def test_the_readmes_table_of_sets(hub):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|.*huggingface", text, re.MULTILINE) == list(SETS)


# --- cards ---


def test_a_card_of_what_was_fetched(hub):
    yaml = pytest.importorskip("yaml")
    fetched("8B-512", "--precision", "fp8")
    transformer, vae, text = find("8B-512")
    card = transformer.with_suffix(".md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {
        "license": "mit", "base_model": VAREDIT, "tags": ["varedit", "image-editing", "autoregressive"],
        "pipeline_tag": "image-to-image",
    }  # fmt: skip
    made = Manifest.read(transformer)
    for said in (
        made.files[transformer.name].sha256, made.source.files["8B-512.pth"].sha256, "1" * 40, "float8_e4m3fn",
        "published by HiDream-ai", "varedit get 8B-512 --precision fp8 --text-precision int8",
        f"--model {transformer.name}", f"--vae {vae.name}", f"--text-encoder {text.name}", "mit, as the card of",
    ):  # fmt: skip
        assert said in card, said
    words = (text / "flan-t5-xl-int8.md").read_text(encoding="utf-8")
    assert "license" not in yaml.safe_load(words.split("---\n")[1]) and "nothing here tells the licence" in words
    other = yaml.safe_load(vae.with_suffix(".md").read_text().split("---\n")[1])
    assert (other["license"], other["license_name"]) == (
        "other",
        "a licence of its own",
    ) and "pipeline_tag" not in other


def test_a_card_of_any_file(published_file, tmp_path, failed):
    target = tmp_path / "mine.safetensors"
    assert run("convert", published_file, target).exit_code == 0
    assert run("card", target).exit_code == 0
    card = (tmp_path / "mine.md").read_text(encoding="utf-8")
    assert card.count("**Fill this in before the card is published**") == 2, "source and licence"
    assert "Converted from `8B-512.pth` by `varedit convert --precision bf16`" in card
    assert "exists; choose another name or allow overwriting" in failed("card", target)
    assert run("card", target, "-o", tmp_path / "README.md").exit_code == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == card
    assert "--model mine.safetensors" in card and "--vae ITS-VAE" in card, "which VAE that is the file does not tell"
    assert "would replace" in failed("card", target, "-o", target, "--overwrite")
    assert "is no converted transformer, VAE or text encoder" in failed(
        "card", LORAS / "varedit_demo_duotone.safetensors"
    )


def test_a_card_is_of_the_file_as_it_is(hub, failed):
    fetched("8B-512")
    transformer = find("8B-512")[0]
    transformer.write_bytes(transformer.read_bytes()[:-1] + b"x")
    assert "its SHA-256 is not that of its manifest; delete" in failed("card", transformer, "--overwrite")


def test_names_that_no_repository_may_have(hub, monkeypatch):
    """A hub that is none of ours could name any place."""
    monkeypatch.setattr(SETS["8B-512"][0].__class__, "wanted", lambda part, files: (files, []))
    hub.repositories[VAREDIT].files["../../x.pth"] = b"x"
    with pytest.raises(ValueError, match="lists ../../x.pth without a name, size or checksum that is one"):
        remote.look_up(SETS["8B-512"][0])
    hub.repositories[VAREDIT].revision = "../../../x"
    with pytest.raises(ValueError, match="has no commit that is one"):
        remote.look_up(SETS["8B-512"][0])


def test_where_the_folder_of_our_own_is(monkeypatch, tmp_path):
    monkeypatch.delenv("VAREDIT_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert home() == tmp_path / "varedit"
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert home() == Path.home() / ".cache" / "varedit", "which has to be absolute to count"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert home() == Path.home() / "Library" / "Caches" / "varedit"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert home() == tmp_path / "local" / "varedit"
    monkeypatch.setenv("VAREDIT_HOME", "~/weights")
    assert home() == Path.home() / "weights"
