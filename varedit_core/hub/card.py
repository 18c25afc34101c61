"""A model card for a weight file: Markdown, headed by what the hub reads of it.

All of it is read off the file and its manifest. What neither tells, such as a licence, is left to be filled in.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from ..cards import beside
from ..defaults import TEXT_TO_IMAGE
from ..files.checkpoints import TEXT_ENCODER, TOKENIZER, TRANSFORMER, part_of, told_kind
from ..files.info import inspect
from ..files.reading import printable
from ..files.weights import WeightError, Weights, open_weights
from .catalogue import FOLDERS, PRECISION, SETS
from .manifest import Manifest, Source, Watch, sum_of

_ADDRESS = "https://huggingface.co"
_PAPERS = {"edit": "https://arxiv.org/abs/2508.15772", TEXT_TO_IMAGE: "https://arxiv.org/abs/2412.04431"}
_PROJECT = "https://github.com/varedit/varedit"
_TAGS = {TRANSFORMER: ["varedit", "image-editing", "autoregressive"], TOKENIZER: ["varedit", "vae"],
         TEXT_ENCODER: ["varedit", "t5", "text-encoder"]}  # fmt: skip
_FILL_IN = "**Fill this in before the card is published**"


def card_path(weights: Path) -> Path:
    """Where a weight file's card lies: beside it, with its name."""
    return weights.with_suffix(".md")


def write_up(weights: Path, watch: Watch = lambda *_: None) -> str:
    """The card of a converted file: what its header says, and its manifest where it has one.

    WeightError for a file that is no transformer, VAE or text encoder, ValueError for a damaged manifest, or where the
    file is no longer the one that its manifest describes.
    """
    part, _ = part_of(open_weights(weights))
    if part is None or weights.is_dir():
        raise WeightError(f"{weights} is no converted transformer, VAE or text encoder; name a .safetensors file")
    made = Manifest.read(weights)
    if made is None:
        return card_of(weights, Manifest(weights.stem, "", Source("", ""), {weights.name: sum_of(weights, watch)}, ""))
    if faults := list(made.faults(weights.parent, watch)):
        raise ValueError(f"{faults[0]}; delete {weights} and fetch it again")
    return card_of(weights, made)


def card_of(weights: Path, made: Manifest) -> str:
    """The card of a file with this manifest, whose source and command are empty where they are not known."""
    facts, opened = inspect(weights), open_weights(weights)
    part = part_of(opened)[0]
    paragraphs = [
        _head(opened, part, made.source), f"# {weights.stem}", _what(facts), "## Source", _source(made.source),
        "## Licence", _licence(made.source), "## Types", _types(opened), "## Files", _files(made),
        "## How it was made", _made(facts, made), "## How to use it", _use(opened, part, made),
    ]  # fmt: skip
    return "\n\n".join(paragraphs) + "\n"


def _head(weights: Weights, part: str, source: Source) -> str:
    """What the hub reads: in YAML, whose strings JSON writes, too."""
    lines = [f"{name}: {_quoted(text)}" for name, text in source.licence.items()]
    lines += [f"base_model: {_quoted(source.repo)}"] if source.repo else []
    lines += ["tags:", *(f"- {tag}" for tag in _TAGS[part])]
    if part == TRANSFORMER:
        lines.append(f"pipeline_tag: {'text-to-image' if _of_text_alone(weights) else 'image-to-image'}")
    return "\n".join(["---", *lines, "---"])


def _quoted(text: str) -> str:
    """A text in YAML."""
    return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else json.dumps(text)


def _of_text_alone(weights: Weights) -> bool:
    return told_kind(weights) == TEXT_TO_IMAGE


def _what(facts: dict) -> str:
    text = facts["is"][:1].upper() + facts["is"][1:]
    return (
        f"{text}, {facts['parameters']:,} numbers in {facts['tensors']:,} tensors, for [varedit]({_PROJECT}): ComfyUI "
        f"nodes and a command line for [VAREdit]({_PAPERS['edit']}) and [Infinity]({_PAPERS[TEXT_TO_IMAGE]})."
    )


def _source(source: Source) -> str:
    if not source.repo:
        return f"{_FILL_IN}: the file does not tell which repository it comes from, nor who trained it."
    address = f"{_ADDRESS}/{source.repo}"
    read = "\n".join(f"- `{name}`, {one.bytes:,} bytes, SHA-256 `{one.sha256}`" for name, one in source.files.items())
    return (
        f"The weights were made and published by {source.owner}: [{source.repo}]({address}), revision "
        f"[`{source.revision}`]({address}/tree/{source.revision}). This file holds the same weights in another "
        f"format. It was made of:\n\n{read}"
    )


def _licence(source: Source) -> str:
    if not source.licence:
        return f"{_FILL_IN}: nothing here tells the licence of the weights. It is that of those who published them."
    names = [source.licence[name] for name in ("license_name", "license") if name in source.licence][:1]
    link = source.licence.get("license_link")
    return f"{names[0]}{f' ({link})' if link else ''}, as the card of {source.repo} says."


def _types(weights: Weights) -> str:
    kinds: dict[str, list[str]] = {}
    for key, tensor in weights.meta.items():
        kinds.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(key)
    numbers = {name: sum(math.prod(weights.shapes[key]) for key in keys) for name, keys in kinds.items()}
    largest = {name: max(keys, key=lambda key: weights.meta[key].numel()) for name, keys in kinds.items()}
    rows = [
        f"| {name} | {len(kinds[name]):,} | {numbers[name]:,} | `{printable(largest[name])}` |"
        for name in sorted(kinds, key=lambda name: -numbers[name])
    ]
    told = weights.metadata.get("varedit.precision")
    precision = f"Converted with the precision {printable(told)}. " if told else ""
    head = ["| type | tensors | numbers | the largest one |", "| --- | --- | --- | --- |"]
    return (
        f"{precision}A precision is that of the blocks' matrices; what the model computes in fp32 stays in fp32.\n\n"
        + "\n".join([*head, *rows])
    )


def _files(made: Manifest) -> str:
    rows = [f"| {name} | {one.bytes:,} | `{one.sha256}` |" for name, one in made.files.items()]
    return "\n".join(["| file | bytes | SHA-256 |", "| --- | --- | --- |", *rows])


def _made(facts: dict, made: Manifest) -> str:
    if made.made_by:
        return f"```\n{made.made_by}\n```"
    source, precision = (facts["metadata"].get(f"varedit.{name}", "") for name in ("converted_from", "precision"))
    if not source:
        return f"{_FILL_IN}: the file does not tell what it was made of."
    return f"Converted from `{printable(source)}` by `varedit convert --precision {printable(precision)}`."


def _use(weights: Weights, part: str, made: Manifest) -> str:
    """Command lines with this file, and with the others of its set, by the names that `varedit get` gives them."""
    names = _set_of(made.part, made.precision)
    names[part] = weights.path.parent.name if part == TEXT_ENCODER and len(made.files) > 1 else weights.path.name
    options = ((TRANSFORMER, "model"), (TOKENIZER, "vae"), (TEXT_ENCODER, "text-encoder"))
    command = 'generate "a red fox"' if _of_text_alone(weights) else 'edit photo.jpg "make it a rainy night"'
    lines = " \\\n    ".join([f"varedit {command}", *(f"--{option} {names[of]}" for of, option in options)])
    return (
        f"With the command line of [varedit]({_PROJECT}):\n\n```\n{lines}\n```\n\n"
        f"In ComfyUI, with its nodes, the file belongs into `models/{FOLDERS[part]}`."
    )


def _set_of(name: str, precision: str) -> dict[str, str]:
    """What to name for each part in the first set that has a part of this name; what is not known is in capitals."""
    found = next((parts for parts in SETS.values() if any(part.name == name for part in parts)), None)
    if found is None:
        return {TRANSFORMER: "TRANSFORMER", TOKENIZER: "ITS-VAE", TEXT_ENCODER: "ITS-TEXT-ENCODER"}
    chosen = {part.what: part.precision(PRECISION) for part in found} | {TEXT_ENCODER: beside(precision or PRECISION)}
    stems = {part.what: part.stem(chosen[part.what]) for part in found}
    return {what: stem if what == TEXT_ENCODER else f"{stem}.safetensors" for what, stem in stems.items()}
