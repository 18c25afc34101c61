"""The measuring scripts run: each at a tiny size, in a process of its own, without touching records and pages."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from support import ROOT

FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "comfyui"))
IN_COMFYUI = ("comfyui_memory", "comfyui_soak", "comfyui_speed")
"""Scripts that ComfyUI's Python runs."""
FOLDERS = {
    "cards": "--folder", "comfyui_memory": "--folder", "comfyui_soak": "--folder", "comfyui_speed": "--folder",
    "control_pictures": "--folder", "library_memory": "--pictures", "real_size": "--folder", "render": "--folder",
    "training_cost": "--folder",
}  # fmt: skip
"""Where scripts take a folder for what they write beside their result."""
RECORDS = {
    "ablations": "ablations", "cards": "cards_h200", "precisions": "precisions_h200",
    "training_cost": "training_cost_h200", "comfyui_memory": "comfyui_memory_h100",
    "comfyui_speed": "comfyui_speed_h200",
    "controls": "controls", "demo": "demo_cpu", "fits": "fits", "library_memory": "library_memory_h100",
    "real_size": "real_size_h100", "shortcuts": "shortcuts",
}  # fmt: skip
"""The shipped record of each script that has one."""
NOT_TINY = {
    "taken_gb", "allocator", "ballast_gb", "peak_gb", "peak_gib", "note", "convert_bf16", "load_bf16",
    "eight_bit", "published", "agreement_0.25M", "agreement_1M", *(f"after {k}" for k in (2, 4, 8)), "plain 8",
}  # fmt: skip
"""What only a GPU or a full run tells."""


def digests() -> dict[str, str]:
    """Of all that the scripts make for the repository: records, tables and pictures."""
    docs = ROOT / "docs"
    made = [*FOLDER.glob("*.json"), ROOT / "README.md", *docs.glob("*.md"), *(docs / "images").glob("*")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in made}


@pytest.fixture(scope="module")
def ran(request, tmp_path_factory):
    """Runs a script once and gives its result. Without ComfyUI, a test of a script that needs it is skipped."""
    results = {}

    def run(name: str) -> dict:
        if name in results:
            return results[name]
        python, variables, folder = sys.executable, dict(os.environ), tmp_path_factory.mktemp(name)
        arguments = ["--tiny", "--save", folder / "result.json"]
        if name in FOLDERS:
            (folder / "more").mkdir()
            arguments += [FOLDERS[name], folder / "more"]
        if name in IN_COMFYUI:
            comfyui = request.getfixturevalue("comfyui")
            python, variables = comfyui.python, dict(comfyui.environment)
            arguments += ["--comfyui", comfyui.folder]
        before, command = digests(), [python, FOLDER / f"{name}.py", *arguments]
        variables["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(
            [*map(str, command)], cwd=folder, env=variables, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert digests() == before, "records and pages stay"
        result = json.loads(done.stdout.splitlines()[-1])
        assert result == json.loads((folder / "result.json").read_text()), "printed last, and written"
        results[name] = result
        return result

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_at_a_tiny_size(ran, name):
    assert ran(name)


def columns(result: dict) -> dict[str, set[str]]:
    """What a result says, and what its cases, runs, or the rows of each of its sections say."""
    found = {"": set(result), "cases": set(result.get("cases", [{}])[0]), "runs": _of_a_row(result.get("runs", {}))}
    return found | {name: _of_a_row(rows) for name, rows in result.get("sections", {}).items()}


def _of_a_row(rows: dict[str, dict]) -> set[str]:
    return set(next(iter(rows.values()), {}))


@pytest.mark.parametrize("name", RECORDS)
def test_a_tiny_result_says_what_the_record_says(ran, name):
    """So that `render.py` finds what it reads when the record is made anew."""
    record, result = columns(json.loads((FOLDER / f"{RECORDS[name]}.json").read_text())), columns(ran(name))
    lacking = {part: sorted(known - result.get(part, set()) - NOT_TINY) for part, known in record.items()}
    assert not any(lacking.values()), lacking


@pytest.mark.parametrize("name", ["comfyui_memory", "comfyui_speed", "library_memory"])
def test_no_case_of_a_tiny_run_failed(ran, name):
    cases = ran(name)["cases"]
    assert cases and not [case["failed"] for case in cases if "failed" in case]
    assert all(case.get("seconds") or case["all"] for case in cases)


def test_a_case_that_fails_says_why(tmp_path):
    command = [sys.executable, FOLDER / "library_memory.py", "--tiny", "--model", "none", "--pictures", tmp_path]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    (case,) = json.loads(done.stdout.splitlines()[-1])["cases"]
    assert done.returncode == 0 and case == {"limit_gib": 0, "linears": "exact", "failed": "KeyError: 'none'"}


def test_masks_and_dials_keep_what_they_promise(ran):
    """Of one sample, but exactly: masks keep latents and pixels, dials end at the free edit and at the source."""
    sections = ran("controls")["sections"]
    masked = sections["random_masks"]["all"]
    assert masked["latents_outside"] > 0 and masked["latents_changed"] == masked["pixels_changed"] == 0
    for dial, free, source in (("strength", "1.0", "0.0"), ("preserve", "0.0", "1.0")):
        assert sections[dial][free]["is_free"] and not sections[dial][free]["is_source"]
        assert sections[dial][source]["is_source"]


def test_both_engines_draw_the_same_bits(ran):
    rows = ran("engines")["rows"]
    assert rows and all(row["bits"] > 0 and row["beyond"] == 0 for row in rows)


def test_no_edit_of_many_is_a_wrong_one(ran):
    result = ran("comfyui_soak")
    assert result["edits"] == 6 and not result["wrong"] and result["least"] == 1
    assert result["other_kinds"] < 0.9, "else the comparison says nothing"
