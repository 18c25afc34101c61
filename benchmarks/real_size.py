"""Real-size checkpoints of random weights: writing, converting, loading, and how far bf16 agrees with fp32.

    python benchmarks/real_size.py --folder /scratch --save benchmarks/real_size_<gpu>.json

Writes a `.pth` in fp32 in the published key style, converts it to bf16 and to 8 bits and loads each result,
every step in a process of its own; then edits a random picture with fp32 and bf16 blocks. Prints a table and
one JSON line last. Needs a GPU for the 8B size (96 GB of disk, or 64 with --lean); `--tiny` runs on
anything.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import GB, ROOT, device_name, finish, parsed, parser

CHUNKS = 8


def published_shapes(depth: int, width: int, heads: int, token_bits: int, text: int) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a transformer in the published key style."""
    hidden = round(4 * width / 256) * 256
    block = {
        "ada_gss": (1, 1, 6, width),
        "sa.mat_qkv.weight": (3 * width, width), "sa.q_bias": (width,), "sa.v_bias": (width,),
        "sa.zero_k_bias": (width,), "sa.scale_mul_1H11": (1, heads, 1, 1),
        "sa.proj.weight": (width, width), "sa.proj.bias": (width,),
        "ca.mat_q.weight": (width, width), "ca.mat_q.bias": (width,), "ca.mat_kv.weight": (2 * width, width),
        "ca.v_bias": (width,), "ca.zero_k_bias": (width,), "ca.proj.weight": (width, width), "ca.proj.bias": (width,),
        "ca_norm.weight": (width,), "ca_norm.bias": (width,),
        "ffn.fc1.weight": (hidden, width), "ffn.fc1.bias": (hidden,),
        "ffn.fc2.weight": (width, hidden), "ffn.fc2.bias": (width,),
    }  # fmt: skip
    pool, pool_heads = "text_proj_for_sos.ca.", max(1, text // 128)
    shapes = {
        "cfg_uncond": (512, text), "text_norm.weight": (text,), pool + "mat_q": (1, pool_heads, width // pool_heads),
        pool + "mat_kv.weight": (2 * width, text), pool + "v_bias": (width,), pool + "zero_k_bias": (width,),
        pool + "proj.weight": (width, width), pool + "proj.bias": (width,),
        "text_proj_for_ca.0.weight": (width, text), "text_proj_for_ca.0.bias": (width,),
        "text_proj_for_ca.2.weight": (width, width), "text_proj_for_ca.2.bias": (width,),
        "pos_start": (1, 1, width), "lvl_embed.weight": (15, width),
        "word_embed.weight": (width, token_bits), "word_embed.bias": (width,),
        "shared_ada_lin.1.weight": (6 * width, width), "shared_ada_lin.1.bias": (6 * width,),
        "head_nm.ada_lin.1.weight": (2 * width, width), "head_nm.ada_lin.1.bias": (2 * width,),
        "head.weight": (2 * token_bits, width), "head.bias": (2 * token_bits,),
    }  # fmt: skip
    chunks = CHUNKS if depth % CHUNKS == 0 else 1
    for index in range(depth):
        chunk, place = divmod(index, depth // chunks)
        shapes.update({f"block_chunks.{chunk}.module.{place}.{key}": shape for key, shape in block.items()})
    return shapes


def random_tensor(key: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    if "zero_k_bias" in key:
        return torch.zeros(shape, device=device)
    if key.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    if key.endswith("scale_mul_1H11"):
        return torch.full(shape, math.log(4), device=device)
    if key.endswith("ada_gss"):
        gains = torch.tensor([0.5, 0.5, 0, 0, 0, 0], device=device)[:, None]
        return torch.randn(shape, device=device) * 0.1 + gains
    fan_in = shape[-1] if key.endswith(".weight") and len(shape) == 2 else 2500
    return torch.randn(shape, device=device) * (2.5 if key == "head.weight" else 1.0) * fan_in**-0.5


def write(path: Path, shapes: dict, device: str) -> None:
    torch.manual_seed(0)
    torch.save({key: random_tensor(key, shape, device).cpu() for key, shape in shapes.items()}, path)


def measured(command: list[str]) -> dict:
    """Run a command; seconds, peak resident memory, and the peak of its part that is not mapped files."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = {"RssAnon": 0, "VmHWM": 0}
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command} failed")
    seconds = time.perf_counter() - begin
    printed = json.loads(output.splitlines()[-1]) if output.strip() else {}
    return {
        "seconds": round(seconds, 1),
        "host_peak_gb": round(peak["VmHWM"] / GB, 2),
        "host_anonymous_gb": round(peak["RssAnon"] / GB, 2),
        **printed,
    }


def _watch(process: subprocess.Popen, peak: dict[str, int]) -> None:
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        for name, _, value in (line.partition(":") for line in lines):
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]) * 1024)
        time.sleep(0.05)


LOAD = """
import json, sys, time, torch
from varedit_core import load_transformer
device, cuda = sys.argv[2], sys.argv[2] == "cuda"
if cuda: torch.zeros(1, device="cuda")
begin = time.perf_counter()
network = load_transformer(sys.argv[1], dtype=torch.bfloat16, device=device)
if cuda: torch.cuda.synchronize()
seconds = time.perf_counter() - begin
weights = sum(t.nbytes for t in network.state_dict().values())
peak = torch.cuda.max_memory_allocated() if cuda else 0
sizes = {"weights_gb": round(weights / 1e9, 2), "gpu_peak_gb": round(peak / 1e9, 2)}
print(json.dumps({"load_seconds": round(seconds, 1), **sizes}))
"""


def load(path: Path, device: str) -> dict:
    return measured([sys.executable, "-c", LOAD, str(path), device])


def agreement(path: Path, area: str, device: str, text_width: int) -> dict:
    """Bits of bf16 blocks given the fp32 run's earlier bits, and of a free bf16 run, per scale; seconds and memory."""
    from varedit_core import SamplingSettings, load_transformer, sample, schedule_for

    schedule = schedule_for(area)
    torch.manual_seed(1)
    features = torch.randn(1, 14, 2 * schedule.grids[-1][0], 2 * schedule.grids[-1][1], device=device) * 0.5
    texts = [torch.randn(20, text_width, device=device) * 0.2]
    settings = SamplingSettings(temperature=0.0)

    def run(network, forced=None):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin, bits, equal = time.perf_counter(), [], []
        for scale in sample(network, features, texts, schedule, settings):
            bits.append(scale.bits.clone())
            if forced:
                equal.append((scale.bits == forced[scale.index]).float().mean().item())
                scale.bits = forced[scale.index]
        if device == "cuda":
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / GB if device == "cuda" else 0.0
        return bits, equal, round(time.perf_counter() - begin, 3), round(peak, 2)

    network = load_transformer(path, dtype=torch.float32, device=device)
    reference, _, seconds, peak = run(network)
    facts = {"fp32": {"seconds": seconds, "peak_gb": peak}}
    del network
    network = load_transformer(path, dtype=torch.bfloat16, device=device)
    run(network)
    free, _, seconds, peak = run(network)
    facts["bf16"] = {"seconds": seconds, "peak_gb": peak}
    facts["equal_given_fp32_history"] = [round(share, 5) for share in run(network, reference)[1]]
    facts["equal_free_run"] = [round((a == b).float().mean().item(), 5) for a, b in zip(free, reference)]
    return facts


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--depth", type=int, default=40)
    options.add_argument("--width", type=int, default=3584)
    options.add_argument("--text", type=int, default=2048)
    options.add_argument("--areas", nargs="*", default=["0.25M", "1M"])
    options.add_argument("--lean", action="store_true", help="delete every file as soon as it is not needed")
    options.add_argument("--precisions", nargs="*", default=["bf16", "fp8"])
    args = parsed(options, depth=2, width=256, text=256, areas=["0.06M"], precisions=["fp8"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["PYTHONPATH"] = str(ROOT)
    args.folder.mkdir(parents=True, exist_ok=True)
    original = args.folder / "8B-random.pth"
    results: dict = {
        "device": device_name(),
        "torch": torch.__version__,
        "depth": args.depth,
        "width": args.width,
    }

    begin = time.perf_counter()
    write(original, published_shapes(args.depth, args.width, args.width // 128, 56, args.text), device)
    results["write"] = {"seconds": round(time.perf_counter() - begin, 1), "gb": round(original.stat().st_size / GB, 2)}
    print("write", results["write"], flush=True)
    for precision in args.precisions:
        target = args.folder / f"{precision}.safetensors"
        results[f"convert_{precision}"] = measured(
            [sys.executable, "-m", "varedit_core", "convert", str(original), str(target), "--precision", precision]
        )
        results[f"convert_{precision}"]["gb"] = round(target.stat().st_size / GB, 2)
        print("convert", precision, results[f"convert_{precision}"], flush=True)
        results[f"load_{precision}"] = load(target, device)
        print("load", precision, results[f"load_{precision}"], flush=True)
        if args.lean:
            target.unlink()
    results["load_pth"] = load(original, device)
    print("load pth", results["load_pth"], flush=True)
    for area in args.areas:
        results[f"agreement_{area}"] = agreement(original, area, device, args.text)
        print(area, json.dumps(results[f"agreement_{area}"]), flush=True)
    original.unlink()
    results["writer_peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB, 2)
    finish(results, args.save)


if __name__ == "__main__":
    main()
