"""What training at the published 8B size costs: seconds a step and GPU memory, with random weights and pictures.

    python benchmarks/training_cost.py --folder /scratch --save benchmarks/training_cost_<gpu>.json

Cases: a LoRA on a base in bf16 and in 8 bits, the latter within 23 GiB, on one GPU; all weights, sharded over the
machine's GPUs, from loading to the exported result; the same with fewer blocks, stopped after a step and gone on with.
Every case is `varedit train` in processes of its own. --only NAME... runs some; they replace those of their names in
the file of --save. A table stands before the JSON line. The sharded cases need 170 GB of disk at 8B and GPUs that hold
34 GB of weights while they load; a case that does not get what it needs says so, and the others run. `--tiny` runs on
anything, unsharded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import GB, GIB, ROOT, device_name, finish, parsed, parser

PAIRS, SIDES = 8, (640, 512)
WEIGHTS, VAE, TEXT = "transformer.safetensors", "vae.safetensors", "text_encoder"
WORDS = 512  # of the vocabulary
LIMITED = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv.pop(1)) / torch.cuda.get_device_properties(0).total_memory)
from varedit_core.__main__ import main
main()
"""


@dataclass(frozen=True)
class Case:
    """One training. depth: share of the model's blocks. limit: GiB of one GPU. stopped: after its first step, then gone
    on with. changes: settings of the stage."""

    task: str
    changes: tuple[str, ...] = ()
    sharded: bool = False
    depth: float = 1.0
    limit: float = 0.0
    stopped: bool = False


CASES = {
    "LoRA": Case("lora"),
    "LoRA, 8-bit base": Case("lora", ("lora.base=8-bit",), limit=23),
    "all weights": Case("transformer", sharded=True),
    "all weights, stopped and gone on with": Case("transformer", sharded=True, depth=0.5, stopped=True),
}
STAGE = """[[stage]]
name = "cost"
task = "{task}"
steps = {steps}
batch = {batch}
precision = "bf16"
checkpointing = true
log_every = 1
sample_every = 0
transformer = "{folder}/weights-{depth}/{weights}"
autoencoder = "{folder}/{vae}"
text_encoder = "{folder}/{text}"
[stage.data]
source = "{folder}/pairs"
size = "{area}"
[stage.optimisation]
average = 0.0
rate = 1e-5
"""


def make_weights(folder: Path, model: str, depth: int) -> None:
    """Files of random weights: a transformer of that many blocks, and the VAE and text encoder where they are not."""
    import torch

    from varedit_core.bench.models import MODELS, fill, random_transformer
    from varedit_core.files.tensor_files import write_tensors
    from varedit_core.runtime.layers import Operations
    from varedit_core.text.t5 import T5Encoder
    from varedit_core.tokenizer.vae import Autoencoder
    from varedit_core.training.tasks import save_text
    from varedit_core.training.words import make_vocabulary

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, rounded = MODELS[model], {"format": "pt", "varedit.precision": "bf16"}
    path = folder / f"weights-{depth}" / WEIGHTS
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        network = random_transformer(dataclasses.replace(sizes.transformer, depth=depth), device)
        write_tensors(path, {key: t.bfloat16() for key, t in network.state_dict().items()}, rounded)
        del network
    if (folder / VAE).exists():
        return
    generator = torch.Generator(device).manual_seed(1)
    autoencoder = Autoencoder(sizes.autoencoder, Operations, device=device)
    fill(autoencoder, generator)
    write_tensors(folder / VAE, autoencoder.state_dict(), {"format": "pt"})
    text = T5Encoder(dataclasses.replace(sizes.text, vocabulary=max(sizes.text.vocabulary, WORDS)), device=device)
    fill(text, generator)
    make_vocabulary(folder / TEXT / "tokenizer.json", WORDS)
    save_text(folder / TEXT, text, folder / TEXT)


def make_pairs(folder: Path) -> None:
    """Pairs of noise, each a picture and a part of it in another colour."""
    from PIL import Image

    folder.mkdir()
    rows, draw = [], random.Random(0)
    for number in range(PAIRS):
        picture = Image.frombytes("RGB", (SIDES[0] // 8, SIDES[1] // 8), draw.randbytes(SIDES[0] * SIDES[1] * 3 // 64))
        picture = picture.resize(SIDES, Image.Resampling.BICUBIC)
        picture.save(folder / f"s{number}.png")
        picture.paste((200, 40 * (number % 6), 30), (100, 100, 300, 260))
        picture.save(folder / f"t{number}.png")
        text = f"recolour the square of number {number} in red"
        rows.append({"source": f"s{number}.png", "target": f"t{number}.png", "instruction": text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def watched(command: list[str]) -> float:
    """Run a command with its output as it comes; seconds. RuntimeError with its last line where it fails."""
    print("$", " ".join(part if "\n" not in part else "..." for part in command), file=sys.stderr, flush=True)
    begin, last = time.perf_counter(), ""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    for line in process.stdout:
        print(f"{time.perf_counter() - begin:6.1f}", line.rstrip(), file=sys.stderr, flush=True)
        last = line.strip() or last
    if process.wait():
        raise RuntimeError(last or f"exit code {process.returncode}")
    return round(time.perf_counter() - begin, 1)


def launcher(case: Case, options: Namespace) -> list[str]:
    """The command that trains, without its arguments."""
    if case.sharded and not options.tiny:
        config = str(ROOT / "samples" / "training" / "fsdp.yaml")
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        return [*launch, "--num_processes", str(options.gpus), "-m", "varedit_core"]
    if case.limit and not options.tiny:
        return [sys.executable, "-c", LIMITED, str(case.limit * GIB)]
    return [sys.executable, "-m", "varedit_core"]


def measured(case: Case, options: Namespace) -> dict:
    """Run one case and read what it left: its figures, the times at which its files appeared, and their sizes."""
    folder, depth = options.folder, max(1, round(case.depth * options.depth))
    if options.tiny:
        make_weights(folder, options.model, depth)
    elif not (folder / f"weights-{depth}" / WEIGHTS).exists():  # another process, whose memory goes with it
        where = ["--folder", str(folder), "--model", options.model]
        watched([sys.executable, __file__, *where, "--weights", str(depth)])
    settings = {"weights": WEIGHTS, "vae": VAE, "text": TEXT, "area": options.area, "depth": depth, "task": case.task}
    text = STAGE.format(folder=folder, steps=options.steps, batch=options.batch, **settings)
    (folder / "cost.toml").write_text(text)
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    arguments = ["train", str(folder / "cost.toml"), "--output", str(output)]
    arguments += [part for change in case.changes for part in ("--set", f"cost.{change}")]
    command, found = [*launcher(case, options), *arguments], {}
    if case.stopped:
        found["first_seconds"] = watched([*command, "--stop-after", "0"])
        command.append("--resume")
    found["wall_seconds"] = watched(command)
    found |= figures(output / "cost")
    shutil.rmtree(output)
    return found


def figures(stage: Path) -> dict:
    """What a finished stage's folder tells."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines]
    steps = [b - a for a, b in zip(seconds[1:], seconds[2:])] or [b - a for a, b in zip(seconds, seconds[1:])]
    results = [stage / name for name in json.loads((stage / "finished.json").read_text())["files"]]
    (state,) = stage.glob("state-*")
    written = [stage / "metrics.jsonl", state / "state.json", results[0]]
    trained, saved, exported = (path.stat().st_mtime for path in written)
    return {
        "seconds_a_step": round(statistics.median(steps), 3),
        "gpu_peak_gb": max(line.get("gpu_peak_gb", 0.0) for line in lines),
        "steps": lines[-1]["step"],
        "loss": [round(line["loss"], 4) for line in lines],
        "bit_accuracy": round(lines[-1]["bit_accuracy"], 1),
        "state_gb": round(sum(path.stat().st_size for path in state.iterdir()) / GB, 3),
        "save_seconds": round(saved - trained, 1),
        "export_seconds": round(exported - saved, 1),
        "result_gb": round(sum(path.stat().st_size for path in results) / GB, 3),
    }


def table(cases: list[dict]) -> str:
    head = f"{'case':40}{'GPUs':>5}{'blocks':>7}{'s a step':>10}{'GPU peak GB':>13}{'state GB':>10}{'saving s':>10}"
    rows = [
        f"{case['name']:40}{case['gpus']:5}{case['blocks']:7}"
        + (
            f"  failed: {case['failed']}"
            if "failed" in case
            else f"{case['seconds_a_step']:10.2f}{case['gpu_peak_gb']:13.1f}{case['state_gb']:10.2f}"
            f"{case['save_seconds']:10.1f}"
        )
        for case in cases
    ]
    return "\n".join([head, *rows])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, required=True, help="on the disk that has most room")
    options.add_argument("--model", default="8B", help="8B, 2B or tiny")
    options.add_argument("--area", default="0.25M")
    options.add_argument("--batch", type=int, default=1, help="pairs a GPU")
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--gpus", type=int, help="of the sharded cases; by default all")
    options.add_argument("--only", nargs="*", choices=CASES, help="cases to run")
    options.add_argument("--weights", type=int, help="write the files of a network of so many blocks, and end")
    args = parsed(options, model="tiny", area="0.06M", steps=2, only=["all weights"])
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.weights:
        make_weights(args.folder, args.model, args.weights)
        return
    import torch

    from varedit_core.bench.models import MODELS

    args.depth = MODELS[args.model].transformer.depth
    args.gpus = args.gpus or max(1, torch.cuda.device_count())
    if not (args.folder / "pairs").exists():
        make_pairs(args.folder / "pairs")
    facts = {"device": device_name(), "torch": torch.__version__, "model": args.model, "area": args.area}
    result: dict = facts | {"batch": args.batch, "cases": []}
    if args.save and args.save.exists():
        before = json.loads(args.save.read_text())
        result["cases"] = [case for case in before["cases"] if case["name"] not in (args.only or CASES)]
    for name in args.only or CASES:
        case = CASES[name]
        found = {"name": name, "gpus": args.gpus if case.sharded else 1, "limit_gib": case.limit}
        found["blocks"] = max(1, round(case.depth * args.depth))
        try:
            found |= measured(case, args)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            found["failed"] = f"{type(error).__name__}: {error}"[:300]
        result["cases"].append(found)
        if args.save:
            args.save.write_text(json.dumps(result, indent=1) + "\n")  # what there is, should time run out
        print(table(result["cases"]), flush=True)
    finish(result, args.save)


if __name__ == "__main__":
    main()
