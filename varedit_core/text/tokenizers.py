"""Tokenizers of files: prompt -> token ids, by `tokenizer.json` or `spiece.model`.

A tokenizer's file may rewrite the text before it is cut, and could make gigabytes of a word: what it may add is asked
before it is used.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from ..files.reading import MAX_JSON, check_file, read_json
from ..files.weights import WeightError

END = 1
"""T5's end token."""
FILES = ("tokenizer.json", "spiece.model")
MAX_GROWTH = 64
"""How many letters a tokenizer may make of one before it cuts the text; T5's makes 33 of a rare Arabic one."""
_GROWING = {"Replace": "content", "Prepend": "prepend", "Append": "append"}
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix", "unk_token")


def load_tokenizer(path: str | Path) -> Callable[[str], list[int]]:
    """Prompt -> ids from `tokenizer.json` or `spiece.model` (the file itself, its folder, or beside a file)."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not path.is_dir():
        try:
            check_file(path, "tokenizer", WeightError)
        except FileNotFoundError as error:
            raise WeightError(str(error)) from None
    for file in (path, *(folder / name for name in FILES)):
        if file.is_dir() or not file.exists():
            continue
        if file.name.endswith("tokenizer.json"):
            return _from_json(file)
        if file.suffix == ".model":
            return _from_pieces(file)
    raise WeightError(
        f"no tokenizer.json or spiece.model in {folder}; copy one from the text encoder's repository or name it with "
        "the tokenizer option"
    )


def _from_json(file: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    facts = read_json(file, "tokenizer", WeightError)
    try:
        growth = _growth(facts)
    except (AttributeError, TypeError, ValueError) as error:  # a rule that is none
        raise _unreadable(file) from error
    if growth > MAX_GROWTH:
        raise WeightError(f"{file} makes {growth} letters or tokens of one; download the tokenizer again")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise _unreadable(file) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda prompt: tokenizer.encode(prompt).ids


def _from_pieces(file: Path) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    check_file(file, "tokenizer", WeightError)
    if file.stat().st_size > MAX_JSON:
        raise WeightError(f"{file} is too large for a tokenizer ({file.stat().st_size >> 20} MB); check the path")
    try:
        rules = [rule for spec in _fields(file.read_bytes(), 3) for rule in _fields(spec, 2)]
        growth = max(map(_longest, rules), default=1)
        pieces = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, IndexError) as error:
        raise _unreadable(file) from error
    if growth > MAX_GROWTH:
        raise WeightError(f"{file} makes {growth} letters of one; download the tokenizer again")
    return lambda prompt: [*pieces.encode(prompt), END]


def _unreadable(file: Path) -> WeightError:
    return WeightError(f"{file} is not a readable tokenizer; download it again")


def _growth(facts: object) -> int:
    """How many letters, or tokens, the rules of a tokenizer.json make of one at most."""
    facts = facts if isinstance(facts, dict) else {}
    model = facts.get("model") if isinstance(facts.get("model"), dict) else {}
    growth = max((len(str(model.get(name) or "")) for name in _AFFIXES), default=1)
    letters = [1]
    for part in _parts(facts.get("normalizer")):
        added = part.get(_GROWING.get(part.get("type"), ""))
        letters.append(len(added) if isinstance(added, str) else 1)
        rules = part.get("precompiled_charsmap")
        if isinstance(rules, str):
            letters.append(_longest(base64.b64decode(rules)))
    tokens = sum(
        len(one.get("ids") or ())
        for part in _parts(facts.get("post_processor"))
        for one in _parts(list((part.get("special_tokens") or {}).values()))
    )
    return max(growth, math.prod(max(1, count) for count in letters), tokens)


def _parts(tree: object) -> Iterator[dict]:
    """A rule of a tokenizer.json, and those that it is a sequence of."""
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting.extend(part)
        elif isinstance(part, dict):
            yield part
            waiting.extend(part[name] for name in ("normalizers", "processors") if name in part)


def _longest(rules: bytes) -> int:
    """The longest text in SentencePiece's compiled rules: the bytes of an index, the index, texts that end in 0."""
    return max(map(len, rules[4 + int.from_bytes(rules[:4], "little") :].split(b"\0")))


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    """The fields of that number in a protocol buffer. IndexError where it is cut."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position, value, shift = position + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
            if shift > 63:
                raise IndexError(shift)

    while position < len(message):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}.get(kind)
        if length is None or position + length > len(message):
            raise IndexError(position)
        if kind == 2 and tag >> 3 == number:
            yield message[position : position + length]
        position += length
