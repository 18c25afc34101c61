"""Fill the tables of README, docs and the nodes' help pages: `python benchmarks/render.py` rewrites them in place.

`python dev.py render` does so. Tables stand between `<!-- name -->` and `<!-- /name -->`. Those of measurements come
from the JSON files beside this one, those of options (`<!-- options edit -->`) from the command line itself, those of
knobs and controls (`<!-- knobs controls -->`) from the registry of controls, as do the nodes' texts in `locales`. Last
it writes `tests/schemas.json`, the inputs that nodes have; where a released one changed it says so, and leaves the file
as it is. A test fails where a file is out of date.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import FOLDER, ROOT, finish, parsed, parser

SPEED = FOLDER / "h100.json"
MARKER = re.compile(r"<!-- ([\w ]+) -->\n(.*?)<!-- /\1 -->", re.DOTALL)
HELP = sorted((ROOT / "web" / "docs").rglob("*.md"))
"""The nodes' help pages, NAME.md in English and NAME/zh.md in Chinese."""
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *HELP)
    if MARKER.search(page.read_text(encoding="utf-8"))
]
"""Every page that has a table to fill."""


def training_cost() -> str:
    """Costs of trainings, of every device that was measured."""
    rows, device = [], ""
    for path in sorted(FOLDER.glob("training_cost_*.json")):
        facts = json.loads(path.read_text())
        device = facts["device"]
        for case in (case for case in facts["cases"] if "failed" not in case):
            within = f" (held to {case['limit_gib']:g} GiB)" if case["limit_gib"] else ""
            rows.append(
                [
                    f"{case['name']}, {case['blocks']} blocks",
                    f"{case['gpus']}",
                    f"{case['seconds_a_step']:.2f} s",
                    f"{case['gpu_peak_gb']:.1f} GB{within}",
                    f"{case['state_gb']:.1f} GB, {case['save_seconds']:.0f} s",
                    f"{case['result_gb']:.1f} GB, {case['export_seconds']:.0f} s",
                ]
            )
    head = [f"8B at 512 pixels, one pair a GPU, {device}", "GPUs", "step", "peak of a GPU", "checkpoint", "result"]
    return table(head, rows) if rows else "Not measured yet."


def precisions() -> str:
    """What each precision of the 8B size takes and keeps, and ShapeEdit of the demo model in it."""
    facts = json.loads((FOLDER / "precisions_h200.json").read_text())
    found = {(case["size"], case["precision"]): case for case in facts["cases"] if case["model"] == "8B"}
    rows = []
    for name, score in facts["shapeedit"].items():
        small, large = found["512", name], found["1024", name]
        equal = f"{sum(small['equal']) / len(small['equal']):.1f}%" if small["equal"] else "all"
        way = name.replace(" 8-bit", ", multiplied in 8 bits")
        sizes = [f"{case['seconds']:.2f} s, {case['peak_gb']:.1f} GB" for case in (small, large)]
        rows.append(
            [way, f"{small['file_gb']:.1f} GB", *sizes, equal, f"{score['success']:.3f}", f"{score['psnr']:.1f} dB"]
        )
    head = ["file", "edit at 512, peak", "edit at 1024, peak", "bits as in bf16", "demo: success", "background"]
    return table([f"8B, {facts['device']}", *head], rows)


def cards() -> str:
    """What runs whole on a card of some memory, and how it was seen."""
    facts = json.loads((FOLDER / "cards_h200.json").read_text())
    by = {(case["limit_gb"], case["model"], case["size"]): case for case in facts["cases"]}
    limits = sorted({limit for limit, *_ in by})
    kinds = [("2B", "512"), ("8B", "512"), ("8B", "1024")]
    rows = [[f"{limit:g} GB", *(_card(by[(limit, *kind)], by) for kind in kinds)] for limit in limits]
    return table([f"free, {facts['device']}", *(f"{model}-{size}" for model, size in kinds)], rows)


def _card(case: dict, by: dict) -> str:
    if "precision" not in case:
        return "-"
    found = case.get("measured") or by[case["as_with_gb"], case["model"], case["size"]]["measured"]
    if "failed" in found:
        return "-"
    host = ", KV cache in host memory" if case["store"] == "host" else ""
    host += ", text on the processor" if case["text_on_host"] else ""
    peak = f", peak {found['peak_gb']:.1f} GB"
    return f"{case['precision']}{host}: {found['seconds'][-1]:.2f} s{peak}"


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parity() -> str:
    rows = []
    for result in json.loads((FOLDER / "parity_cpu.json").read_text()):
        errors = [scale["logit_error"] for scale in result["scales"] if scale["logit_error"] is not None]
        name = Path(result["file"]).stem
        rows.append(
            [
                name,
                f"{max(errors):.1e}",
                f"{min(s['forced'] for s in result['scales']):.2%}",
                f"{result['free_bits']:.2%}",
                f"{result['errors']['vae_features']:.1e}",
            ]
        )
    return table(
        [
            "recorded run",
            "largest logit error",
            "equal bits, recorded history",
            "equal bits, own run",
            "VAE features",
        ],
        rows,
    )


def real_size() -> str:
    facts = json.loads((FOLDER / "real_size_h100.json").read_text())
    rows = []
    for name, key in (
        ("convert 33.5 GB of fp32 to bf16", "convert_bf16"),
        ("convert it to fp8", "convert_fp8"),
        ("load bf16", "load_bf16"),
        ("load fp8", "load_fp8"),
    ):
        step = facts[key]
        gpu = f"{step['gpu_peak_gb']:.1f} GB" if step.get("gpu_peak_gb") else "-"
        rows.append([name, f"{step.get('load_seconds', step['seconds']):.1f} s", f"{step['host_peak_gb']:.1f} GB", gpu])
    return table([f"8B, {facts['device']}", "time", "host peak", "GPU peak"], rows)


def demo() -> str:
    facts = json.loads((FOLDER / "demo_cpu.json").read_text())
    seconds = facts["seconds"]
    imports = seconds["import_torch"] + seconds["import_varedit"]
    rows = [
        ["import PyTorch and the library", f"{imports:.1f} s"],
        ["load the demo model", f"{seconds['load']:.1f} s"],
        ["edit one picture at 256 pixels", f"{seconds['edit']:.1f} s"],
        ["of which encoding the source, decoding", f"{seconds['encode_source']:.1f} s, {seconds['decode']:.1f} s"],
        ["peak memory of the process", f"{facts['peak_gb']:.2f} GB"],
    ]
    return table([f"demo model, {facts['threads']} CPU threads", "cost"], rows)


def shapeedit() -> str:
    facts = json.loads((FOLDER / "shapeedit_demo.json").read_text())
    rows = [
        [
            row["family"],
            str(row["count"]),
            f"{row['success']:.2f} ({row['ceiling_success']:.2f})",
            f"{row['s']:.2f}",
            f"{row['balance']:.2f}",
            "-" if row["psnr"] is None else f"{row['psnr']:.1f} dB ({row['ceiling_psnr']:.1f})",
            "-" if row["ssim"] is None else f"{row['ssim']:.3f} ({row['ceiling_ssim']:.3f})",
        ]
        for row in facts["families"]
    ]
    return table(["family", "samples", "success", "S", "balance", "background PSNR", "background SSIM"], rows)


STORED = {"in 8 bits": "8 bits", "in host memory": "exact, in host memory"}


def comfyui() -> str:
    facts = json.loads((FOLDER / "comfyui_memory_h100.json").read_text())
    names = {"static": "static", "dynamic": "dynamic", "lowvram": "`--lowvram`", "novram": "`--novram`"}
    rows = []
    for case in facts["cases"]:
        first, last = case["seconds"][0], case["seconds"][-1]
        again = f"{last['all']:.1f} s" if len(case["seconds"]) > 1 else "-"
        limit = f"{case['limit_gb']:.0f} GB" if case["limit_gb"] else "all"
        way = " ".join(case["said"]).rpartition("running")[2]
        stored = next((text for words, text in STORED.items() if re.search(f"(values|cache) {words}", way)), "exact")
        rows.append([names[case["kind"]], limit, f"{case['peak_gb']:.1f} GB", stored, f"{first['all']:.1f} s", again])
    head = [
        f"8B bf16 at 1024, {facts['device']}",
        "free",
        "most taken in the last edit",
        "KV cache",
        "first edit",
        "again",
    ]
    return table(head, rows)


COMFYUI_SPEED = FOLDER / "comfyui_speed_h200.json"


def comfyui_speed() -> str:
    """What `comfyui_speed.py` measured: a graph as ComfyUI starts by itself, beside the library's whole edit."""
    facts, rows = json.loads(COMFYUI_SPEED.read_text()), []
    ways = {"library": "library", "default": "ComfyUI", "static": "ComfyUI, static weights"}
    for case in facts["cases"]:
        over = case.get("over", {"all": 1, "other_seed": 1})
        parts = [f"{case[name]:.3f} s" if name in case else "-" for name in ("source", "sampler", "decode")]
        ratios = [f"{case[name]:.3f} s ({over[name]:.2f})" for name in ("all", "other_seed")]
        edit = "" if case["edit"] == "plain" else f", {case['edit']}"
        way = ways[case["way"]] + (f", {case['limit_gb']:.0f} GB free" if case.get("limit_gb") else "")
        first = f"{case['first'][0]['all']:.1f} s" if "first" in case else "-"
        rows.append([f"{case['model']} {case['size']}{edit}", way, *parts, *ratios, first])
    head = ["way", "Source Encode", "Sampler", "Decode", "whole edit", "another seed", "first edit"]
    return table([facts["device"], *head], rows)


def comfyui_summary() -> str:
    """The README's share of it: plain edits of published sizes with all of the GPU."""
    facts, rows, published = json.loads(COMFYUI_SPEED.read_text()), [], {}
    for case in facts["cases"]:
        name = f"{case['model']} {case['size']}"
        if case["way"] == "library":
            published[name] = case
        if case["way"] == "default" and case["edit"] == "plain" and not case["limit_gb"]:
            base = published[name]
            seconds = [f"{x:.2f} s" for x in (case["all"], base["all"], base["published"])]
            rows.append([name, *seconds, f"{case['faster_than_published']:.1f} x", f"{case['other_seed']:.2f} s"])
    head = ["ComfyUI", "library", "published code", "ComfyUI is faster by", "another seed in ComfyUI"]
    return table([facts["device"], *head], rows)


def speed(file: Path = SPEED) -> str:
    """What `varedit bench --save` measured of exact edits."""
    facts = json.loads(file.read_text())
    rows, beside = [], any("published" in case for case in facts["cases"])
    for case in facts["cases"]:
        if case["kind"] not in EXACT:
            continue
        published, phases = case.get("published"), {name: f"{s:.3f}" for name, s in case["phases"].items()}
        rows.append(
            [
                case["name"],
                f"{_spread(case['seconds'])} s",
                f"{phases['loop']} s" + (f" ({case['share']:.0%})" if case["share"] else ""),
                f"{phases['encode']} / {phases['decode']} s" if "encode" in phases else f"- / {phases['decode']} s",
                f"{phases['text']} s" if "text" in phases else "-",
                _memory(case),
                str(case["repeats"]),
            ]
        )
        if published:
            rows[-1] += [f"{_spread(published['seconds'])} s", _memory(published), f"{published['ratio']:.1f} x"]
        elif beside:
            rows[-1] += ["-"] * 3
    head = ["whole edit", "loop", "VAE encode / decode", "text", "GPU peak", "edits"]
    return table([facts["device"], *head, *(["published", "its peak", "ratio"] if beside else [])], rows)


EXACT = ("edit", "reroll", "variations")
SHORTCUTS = {
    "edit": ("exact", "exact"),
    "unguided-3": ("unguided 3", "unguided 3"),
    "window": ("window 0.125", None),
    "inside": ("inside 3", "inside 3"),
    "draft": ("stop after 10 of 13 scales; 5 of 7", "draft"),
    "drafted": ("drafted 9 of 13 scales; 5 of 7", "drafted 5"),
    "8-bit": ("8-bit linears", "8-bit linears"),
    "8-bit-kv": ("8-bit KV cache", "8-bit keys and values"),
    "8-bit-all": ("8-bit linears and KV cache", "8-bit all"),
    "fast": ("unguided 3, 8-bit linears", "unguided 3, 8-bit linears"),
    "fast-inside": ("unguided 3, 8-bit linears, inside 3", "unguided 3, 8-bit linears, inside 3"),
    "fast-inside-6": ("unguided 3, 8-bit linears, inside 6", "unguided 3, 8-bit linears, inside 6"),
    "fast-inside-6-new": ("the same, with a new mask every time", None),
}
"""A kind of case of `varedit bench` -> what the page calls it, and the run of `shortcuts.py` that does the same to the
demo model, where that has the scales for it."""


def shortcuts() -> str:
    """Seconds at the published size beside what ShapeEdit says of the demo model."""
    cases = {case["name"]: case for case in json.loads(SPEED.read_text())["cases"]}
    runs, rows = json.loads((FOLDER / "shortcuts.json").read_text())["runs"], []
    for kind, (name, same) in SHORTCUTS.items():
        case, run = cases["8B 1024" + ("" if kind == "edit" else f" {kind}")], runs.get(same)
        figures = [f"{run['success']:.2f}", f"{run['s']:.3f}", f"{run['psnr']:.1f} dB"] if run else ["-"] * 3
        rows.append([name, f"{case['seconds']['median']:.2f} s", f"{case['peak_gib']:.1f} GiB", *figures])
    return table(["what is left out", "8B 1024", "GPU peak", "success", "S", "background"], rows)


def fits() -> str:
    """What each fit does to pictures that are not square."""
    facts, rows = json.loads((FOLDER / "fits.json").read_text()), []
    for name, run in facts["runs"].items():
        off = [f"{run[f'{kind}border']:.1f} / {run[f'{kind}inner']:.1f}" for kind in ("", "grey ")]
        rows.append(
            [f"`{name}`", f"{run['success']:.2f}", f"{run['in the middle']:.2f}", f"{run['psnr']:.1f} dB", *off]
        )
    edits = f"{facts['count']} edits: success", f"{facts['in the middle']} in the middle", "background"
    return table(["fit", *edits, "off", f"grey ({facts['photographs']} photographs)"], rows)


def library_memory() -> str:
    facts = json.loads((FOLDER / "library_memory_h100.json").read_text())
    stores = {"DeviceCache": "on the GPU", "HostCache": "in host memory", "EightBitCache": "in 8 bits"}
    # As older records name them.
    stores |= {"KeyValueStore": "on the GPU", "HostStore": "in host memory", "EightBitStore": "in 8 bits"}
    rows = []
    for case in facts["cases"]:
        moved = case["moved_gb"]
        rows.append(
            [
                f"{case['limit_gib']:.0f} GiB" if case["limit_gib"] else "all",
                case["linears"],
                stores[case["store"]],
                f"{case['seconds'][-1]:.2f} s",
                f"{case['seconds'][0]:.1f} s",
                f"{case['peak_gib']:.1f} GiB",
                f"{moved['to device']:.0f} / {moved['to host']:.0f} GB" if moved else "-",
            ]
        )
    head = ["linear layers", "KV cache", "edit", "first edit", "GPU peak", "copied to / from the GPU"]
    return table([f"8B 1024, {facts['device']}, free", *head], rows)


def _controls(section: str) -> dict:
    return json.loads((FOLDER / "controls.json").read_text())["sections"][section]


def masks() -> str:
    rows = [
        [name.replace("feather", "margin"), f"{run['success']:.2f}", f"{run['s']:.3f}", _background(run["psnr"]),
         f"{run['seam_of_targets']:.2f}", f"{run['colour_drift_levels']:.1f}"]
        for name, run in _controls("masks").items()
    ]  # fmt: skip
    return table(["edit", "success", "S", "background", "edge", "colour inside"], rows)


def dials() -> str:
    rows = []
    for name in ("strength", "preserve", "source_attention"):
        for value, run in _controls(name).items():
            same = "the free edit" if run["is_free"] else "the source" if run["is_source"] else ""
            figures = [f"{run['success_without_keep']:.2f}", f"{run['s']:.2f}", f"{run['psnr']:.1f} dB"]
            rows.append([f"{name.replace('_', ' ')} {float(value):g}", *figures, f"{run['distance']:.1f}", same])
    return table(["value", "success", "S", "background", "distance to the source", "bit for bit"], rows)


def auto_masks() -> str:
    rows = []
    for name, run in _controls("auto").items():
        found = [f"{run['iou']:.2f}", f"{run['locked']:.0%}"] if "iou" in run else ["-", "-"]
        rows.append([name, *found, f"{run['success']:.2f}", f"{run['s']:.3f}", f"{run['psnr']:.1f} dB"])
    return table(["auto mask", "IoU with the true region", "locked", "success", "S", "background"], rows)


def chains() -> str:
    rows = []
    for name, run in _controls("chains").items():
        steps = [_background(run[f"after {k}"]) for k in (1, 2, 4, 8)]
        rows.append([name, *steps, f"{run['done']:.2f}"])
    return table(["chain", "after 1", "2", "4", "8 edits", "edits done"], rows)


def presets() -> str:
    rows = [
        [name, f"{run['success']:.2f}", f"{run['s']:.3f}", f"{run['psnr']:.1f} dB",
         f"{run['between_seeds']:.1f} levels"]
        for name, run in _controls("presets").items()
    ]  # fmt: skip
    return table(["preset", "success", "S", "background", "between two seeds"], rows)


def _background(psnr: float) -> str:
    return "exact" if psnr >= 100 else f"{psnr:.1f} dB"


def _memory(row: dict) -> str:
    """Of live tensors, and what was taken from the device for all."""
    if not row["peak_gib"]:
        return "-"
    reserved = row.get("reserved_gib")
    return f"{row['peak_gib']:.1f}" + (f" / {reserved:.1f}" if reserved else "") + " GiB"


def _spread(seconds: dict) -> str:
    digits = 3 if seconds["median"] < 0.3 else 2
    return f"{seconds['median']:.{digits}f} ({seconds['min']:.{digits}f}-{seconds['max']:.{digits}f})"


def headlines() -> str:
    """The three figures that the README begins with: speed, exactness, quality."""
    cases = {case["name"]: case for case in json.loads(SPEED.read_text())["cases"]}
    large, small = cases["8B 1024"], cases["8B 512"]
    seconds = " and ".join(f"{case['seconds']['median']:.2f} s" for case in (large, small))
    ratios = " and ".join(f"{case['published']['ratio']:.1f}" for case in (large, small))
    runs = json.loads((FOLDER / "parity_cpu.json").read_text())
    errors = [scale["logit_error"] for run in runs for scale in run["scales"] if scale["logit_error"] is not None]
    equal = min(run["free_bits"] for run in runs)
    whole = json.loads((FOLDER / "shapeedit_demo.json").read_text())["families"][-1]
    return "\n".join(
        [
            f"- **Fast:** on an H100 an edit of the 8B size (random weights) takes {seconds} at 1024 and 512 pixels, "
            f"{ratios} times as fast as the published implementation: [SPEED](docs/SPEED.md).",
            f"- **Exact:** logits of recorded small networks differ from the published implementation's by at most "
            f"{max(errors):.1e} in fp32, and {equal:.0%} of the bits are equal: [EXACTNESS](docs/EXACTNESS.md).",
            f"- **Measured:** the demo model does {whole['success']:.0%} of {whole['count']} held-out edits of drawn "
            f"scenes as told; the background stays at {whole['psnr']:.1f} dB, where its VAE alone allows "
            f"{whole['ceiling_psnr']:.1f}: [SHAPEEDIT](docs/SHAPEEDIT.md).",
        ]
    )


def options(name: str) -> str:
    """Arguments and options of a command. Those that are exactly `varedit edit`'s are only named."""
    own, edit = command(name), command("edit")
    known = set() if own is edit else {_row(option) for option in edit.params}
    rows, same = [], []
    for parameter in own.params:
        row = _row(parameter)
        (same if row in known else rows).append(row)
    parts = [f"`varedit {name}`: {_first_paragraph(own.help)}"]
    if rows:
        parts.append(table(["option", "default", "what it does"], [list(row) for row in rows]))
    if same:
        parts.append(f"As for `varedit edit`: {', '.join(row[0] for row in same)}.")
    return "\n\n".join(parts)


@functools.cache
def _commands():
    import typer

    from varedit_core.cli.app import app

    return typer.main.get_command(app)


def command(name: str):
    """A command by its words, such as `shapeedit make`."""
    return functools.reduce(lambda group, word: group.commands[word], name.split(), _commands())


def command_names(group=None, before: str = "") -> list[str]:
    """The words of every command."""
    names = []
    for word, one in (group or _commands()).commands.items():
        names += command_names(one, f"{before}{word} ") if hasattr(one, "commands") else [before + word]
    return names


def _row(parameter) -> tuple[str, str, str]:
    """Name, default and help of an argument or option. A default that is a text is said as on the help page."""
    argument = parameter.param_type_name == "argument"
    said = getattr(parameter, "show_default", None)
    value = said if isinstance(said, str) else parameter.default
    if parameter.required:
        value = "required"
    elif value is None or value == "" or value == ():
        value = "none"
    elif isinstance(value, bool):
        value = "on" if value else "off"
    name = f"`{parameter.name.upper()}`" if argument else ", ".join(f"`{option}`" for option in parameter.opts)
    text = parameter.help.replace("<", "&lt;")
    return name, f"{value:g}" if isinstance(value, float) else str(value), text


def _first_paragraph(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


TABLES = {
    "headlines": headlines,
    "comfyui": comfyui,
    "comfyui speed": comfyui_speed,
    "comfyui summary": comfyui_summary,
    "demo": demo,
    "shapeedit": shapeedit,
    "parity": parity,
}
TABLES |= {
    "real size": real_size,
    "training cost": training_cost,
    "precisions": precisions,
    "cards": cards,
    "speed": speed,
    "shortcuts": shortcuts,
    "fits": fits,
    "library memory": library_memory,
}
TABLES |= {"masks": masks, "dials": dials, "auto masks": auto_masks, "chains": chains, "presets": presets}


NODES = {"VAREditControls": "controls", "VAREditShortcuts": "shortcuts", "VAREditCurves": "curves"}
"""Nodes whose inputs are the knobs of a group."""
LOCALES = {language: ROOT / "locales" / language / "nodeDefs.json" for language in ("en", "zh")}


def knob_table(group: str) -> str:
    """The knobs of a group of controls: option and input, values, default, and what each does."""
    from varedit_core.controls.registry import knobs

    rows = []
    for knob in knobs(group):
        default = f"`{knob.default}`" if knob.choices else f"{knob.default:g}"
        name = f"`--{knob.name.replace('_', '-')}`, `{knob.name}`"
        rows.append([name, values_of(knob), default, knob.option or knob.help])
    return table(["option, input", "values", "default", "what it does"], rows)


WORDS = {
    "en": {
        "head": ("Input", "Meaning"), "colon": ": ", "comma": ", ", "between": " ", "named": "{name}",
        "range": "{low:g} to {high:g}", "from": "from {low:g}", "up to": "up to {high:g}", "any": "any number",
        "choices": "One of {}.", "sampler": "as on VAREdit Sampler",
    },
    "zh": {
        "head": ("输入", "含义"), "colon": "：", "comma": "、", "between": "", "named": "{name}（{label}）",
        "range": "{low:g} 到 {high:g}", "from": "不小于 {low:g}", "up to": "不大于 {high:g}", "any": "任意数",
        "choices": "可选 {}。", "sampler": "与 VAREdit 采样器相同",
    },
}  # fmt: skip
"""The words of the help pages' tables in each language."""


def values_of(knob, language: str = "en", choices: Sequence[str] | None = None) -> str:
    """What a knob may be. choices: in place of its own."""
    words = WORDS[language]
    if knob.choices:
        return words["comma"].join(f"`{choice}`" for choice in choices or knob.choices)
    kinds = {(True, True): "range", (True, False): "from", (False, True): "up to", (False, False): "any"}
    kind = kinds[knob.low is not None, knob.high is not None]
    return words[kind].format(low=knob.low, high=knob.high)


def input_table(group: str, language: str) -> str:
    """The same knobs as inputs, for a help page in a language: all that their controls say of them."""
    from varedit_core.controls.registry import knobs

    words, rows = WORDS[language], []
    for knob in knobs(group):
        about, more = (knob.help, knob.more) if language == "en" else (knob.help_zh or knob.help, knob.more_zh)
        choices = words["choices"].format(values_of(knob, language)) if knob.choices else ""
        said = words["between"].join(filter(None, (about, choices, more)))
        rows.append([f"`{knob.name}`", naming_nodes(said, language)])
    return table([*words["head"]], rows)


def settings_list(language: str) -> str:
    """The settings that a sweep goes over, with their values, for its help page."""
    from varedit_core.controls.curves import PRESETS
    from varedit_core.controls.registry import SWEPT, knob, knobs

    words, known = WORDS[language], {knob.name: knob for knob in knobs("controls")}
    known["preset"] = knob("curves", "preset")
    own = words["comma"].join(f"`{name}`" for name in SWEPT if name not in known)
    lines = [f"- {own}{words['colon']}{words['sampler']}"]
    for name in (name for name in SWEPT if name in known):
        values = values_of(known[name], language, PRESETS if name == "preset" else None)
        named = words["named"].format(name=f"`{name}`", label=known[name].label_zh or name)
        lines.append(f"- {named}{words['colon']}{values}")
    return naming_nodes("\n".join(lines), language)


def naming_nodes(text: str, language: str) -> str:
    """A text with the nodes' names in bold."""
    names = [node["display_name"] for node in json.loads(LOCALES[language].read_text(encoding="utf-8")).values()]
    return re.sub("|".join(map(re.escape, sorted(names, key=len, reverse=True))), r"**\g<0>**", text)


def control_table() -> str:
    """Every control: its place among the inputs, when it acts on a scale, and what it is, as its file begins."""
    from varedit_core.controls.base import Control
    from varedit_core.controls.registry import registered

    rows = []
    for kind in registered():
        said = _first_paragraph(sys.modules[kind.__module__].__doc__)
        title, _, rest = said.partition(": ")
        said = rest if title.replace(" ", "").lower() == kind.__name__.lower() else said
        file = kind.__module__.rpartition(".")[2]
        link = f"[`{kind.__name__}`](../varedit_core/controls/{file}.py)"
        acts = kind.__call__ is not Control.__call__
        order = str(kind.order) if kind.knobs else "-"
        says = said[:1].upper() + said[1:].partition(". ")[0].rstrip(".") + "."
        rows.append([link, order, str(kind.stage) if acts else "-", says])
    return table(["control", "`order`", "`stage`", "what it does"], rows)


TABLES |= {"controls": control_table}


def locale(language: str) -> str:
    """A language's texts of the nodes, those of knobs as their controls state them."""
    from varedit_core.controls.registry import knobs

    texts = json.loads(LOCALES[language].read_text(encoding="utf-8"))
    for node, group in NODES.items():
        texts[node]["inputs"] = {
            knob.name: {"name": knob.name, "tooltip": knob.help}
            if language == "en"
            else {"name": knob.label_zh or knob.name, "tooltip": knob.help_zh or knob.help}
            for knob in knobs(group)
        }
    return json.dumps(texts, ensure_ascii=False, indent=2) + "\n"


def outputs() -> dict[Path, str]:
    """All that is made of records, options and controls: every file with the text it should have."""
    pages = {page: rendered(page.read_text(encoding="utf-8"), language_of(page)) for page in PAGES}
    return pages | {path: locale(language) for language, path in LOCALES.items()}


def language_of(page: Path) -> str:
    return "zh" if page.name == "zh.md" else "en"


def rendered(text: str, language: str = "en") -> str:
    """A page with its tables filled. KeyError for a marker that no table has."""
    return MARKER.sub(lambda found: f"<!-- {found[1]} -->\n{_filled(found[1], language)}\n<!-- /{found[1]} -->", text)


def _filled(name: str, language: str) -> str:
    kind, _, rest = name.partition(" ")
    made = {"options": options, "knobs": knob_table}.get(kind)
    if made and rest:
        return made(rest)
    if kind == "inputs":
        return input_table(rest, language)
    return settings_list(language) if name == "settings" else TABLES[name]()


def check_controls() -> None:
    """Raise ValueError, naming the control, for what would be missing or wrong in all that is made of the registry."""
    from varedit_core.controls.registry import registered
    from varedit_core.sampling.settings import DEFAULT_SETTINGS

    groups, orders = {"controls", "shortcuts", "curves"}, {}
    taken = dict.fromkeys(vars(DEFAULT_SETTINGS), "the settings of an edit")
    names = {knob.name for kind in registered() for knob in kind.knobs}
    for kind in registered():
        said = []
        if not (sys.modules[kind.__module__].__doc__ or "").strip():
            said.append("its file has no docstring, `Name: what it does.`")
        if kind.group not in groups:
            said.append(f"its group is {kind.group!r}; choose one of {', '.join(sorted(groups))}")
        other = orders.setdefault(kind.order, kind) if kind.knobs else kind
        if other is not kind:
            said.append(f"its order {kind.order} is that of {other.__name__}; give the next one")
        for knob in kind.knobs:
            if not re.fullmatch("[a-z][a-z0-9_]*", knob.name) or knob.name in taken:
                said.append(f"the name {knob.name!r} is that of {taken.get(knob.name, 'no field')}; choose another")
            taken[knob.name] = kind.__name__
            if not (knob.help and knob.help_zh and knob.label_zh):
                said.append(f"{knob.name} lacks help, help_zh or label_zh")
            strange = {*knob.needs.split(), *knob.apart.split()} - names - {"source", "mask"}
            if strange:
                said.append(f"{knob.name} names {', '.join(sorted(strange))}, which is no knob")
            knob.checked(knob.default)
        if said:
            raise ValueError(f"{kind.__name__}: {'; '.join(said)}")


def main() -> None:
    known = parser(__doc__)
    known.add_argument("--folder", type=Path, help="write the files there, and not in place")
    given = parsed(known)
    try:
        check_controls()
    except ValueError as error:
        sys.exit(f"error: {error}")
    made, refused = outputs(), ""
    sys.path.insert(0, str(ROOT / "tests"))
    import schemas

    try:
        made[schemas.FILE] = schemas.written(schemas.read(), schemas.declared())
    except ValueError as error:
        refused = str(error)
    changed = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in made if given.folder else changed:
        target = given.folder / path.relative_to(ROOT) if given.folder else path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(made[path], encoding="utf-8")
    finish({"changed": [path.relative_to(ROOT).as_posix() for path in changed]}, given.save)
    if refused:
        sys.exit(f"error: {refused}")


if __name__ == "__main__":
    main()
