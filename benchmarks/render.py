"""Fill the tables of README and docs from measurements: `python benchmarks/render.py` rewrites them in place.

Tables stand between `<!-- name -->` and `<!-- /name -->`; a test fails where page and JSON disagree.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGES = [FOLDER.parent / name for name in ("README.md", "docs/CONTROLS.md")]
SPEED = FOLDER / "h100.json"


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
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
            "tokenizer features",
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
        stored = next((text for words, text in STORED.items() if f"keys and values {words}" in way), "exact")
        rows.append([names[case["kind"]], limit, f"{case['peak_gb']:.1f} GB", stored, f"{first['all']:.1f} s", again])
    head = [
        f"8B bf16 at 1024, {facts['device']}",
        "free",
        "most taken in the last edit",
        "keys and values",
        "first edit",
        "again",
    ]
    return table(head, rows)


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
    "8-bit-kv": ("8-bit keys and values", "8-bit keys and values"),
    "8-bit-all": ("8-bit linears, keys and values", "8-bit all"),
    "fast": ("unguided 3, 8-bit linears", "unguided 3, 8-bit linears"),
    "fast-inside": ("unguided 3, 8-bit linears, inside 3", "unguided 3, 8-bit linears, inside 3"),
    "fast-inside-6": ("unguided 3, 8-bit linears, inside 6", "unguided 3, 8-bit linears, inside 6"),
    "fast-inside-6-new": ("the same, with a new mask every time", None),
}
"""A kind of case of `varedit bench` -> what the README calls it, and the run of `shortcuts.py` that does the same to the
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
    head = ["linear layers", "keys and values", "edit", "first edit", "GPU peak", "copied to / from the GPU"]
    return table([f"8B 1024, {facts['device']}, free", *head], rows)


def _controls(section: str) -> dict:
    return json.loads((FOLDER / "controls.json").read_text())["sections"][section]


def masks() -> str:
    rows = [
        [name, f"{run['success']:.2f}", f"{run['s']:.3f}", "exact" if run["psnr"] >= 100 else f"{run['psnr']:.1f} dB",
         f"{run['seam_of_targets']:.2f}", f"{run['colour_drift_levels']:.1f}"]
        for name, run in _controls("masks").items()
    ]  # fmt: skip
    return table(["edit", "success", "S", "background", "seam", "colour inside"], rows)


def dials() -> str:
    rows = []
    for name in ("strength", "preserve", "source_attention"):
        for value, run in _controls(name).items():
            same = "the free edit" if run["is_free"] else "the source" if run["is_source"] else ""
            figures = [f"{run['success_without_keep']:.2f}", f"{run['s']:.2f}", f"{run['psnr']:.1f} dB", f"{run['distance']:.1f}"]
            rows.append([f"{name.replace('_', ' ')} {float(value):g}", *figures, same])
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
        steps = ["exact" if run[f"after {k}"] >= 100 else f"{run[f'after {k}']:.1f} dB" for k in (1, 2, 4, 8)]
        rows.append([name, *steps, f"{run['done']:.2f}"])
    return table(["chain", "after 1", "2", "4", "8 edits", "edits done"], rows)


def presets() -> str:
    rows = [
        [name, f"{run['success']:.2f}", f"{run['s']:.3f}", f"{run['psnr']:.1f} dB", f"{run['between_seeds']:.1f} levels"]
        for name, run in _controls("presets").items()
    ]
    return table(["preset", "success", "S", "background", "between two seeds"], rows)


def _memory(row: dict) -> str:
    """Of live tensors, and what was taken from the device for all."""
    if not row["peak_gib"]:
        return "-"
    reserved = row.get("reserved_gib")
    return f"{row['peak_gib']:.1f}" + (f" / {reserved:.1f}" if reserved else "") + " GiB"


def _spread(seconds: dict) -> str:
    digits = 3 if seconds["median"] < 0.3 else 2
    return f"{seconds['median']:.{digits}f} ({seconds['min']:.{digits}f}-{seconds['max']:.{digits}f})"


TABLES = {"comfyui": comfyui, "demo": demo, "shapeedit": shapeedit, "parity": parity, "real size": real_size}
TABLES |= {"speed": speed, "shortcuts": shortcuts, "library memory": library_memory}
TABLES |= {"masks": masks, "dials": dials, "auto masks": auto_masks, "chains": chains, "presets": presets}


def rendered(text: str) -> str:
    for name, make in TABLES.items():
        if f"<!-- {name} -->" not in text:
            continue
        before, _, rest = text.partition(f"<!-- {name} -->")
        after = rest.partition(f"<!-- /{name} -->")[2]
        text = f"{before}<!-- {name} -->\n{make()}\n<!-- /{name} -->{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
