"""Edit pairs: the same samples in the same order whoever reads them, and a sentence for every bad one."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import sys
import tarfile
import tracemalloc
import zlib
from io import BytesIO
from itertools import islice
from operator import attrgetter
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from varedit_core.training import containers
from varedit_core.training.data import Pair, PairError, PairStream, check_pairs, open_pairs

COUNT = 7


def picture(level: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", size, (level, level, level)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def row(index: int, **changes) -> dict:
    return {"source": f"s{index}.png", "target": f"t{index}.png", "instruction": f"edit {index}"} | changes


def folder_of(folder: Path, rows: list) -> Path:
    """A folder with COUNT pairs of pictures and the rows (dicts, or text as it is) in metadata.jsonl."""
    for index in range(COUNT):
        picture(10 * index).save(folder / f"s{index}.png")
        picture(10 * index + 5).save(folder / f"t{index}.png")
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def saved(folder: Path, columns: dict[str, list], pictures: tuple[str, ...]) -> Path:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(columns)
    for column in pictures:
        table = table.cast_column(column, datasets.Image())
    table.save_to_disk(folder / "saved")
    return folder / "saved"


def saved_pairs(folder: Path) -> Path:
    columns = {
        "input_image": [{"bytes": encoded(picture(10 * i)), "path": None} for i in range(COUNT)],
        "edited": [{"bytes": encoded(picture(10 * i + 5)), "path": None} for i in range(COUNT)],
        "words": [f"edit {i}" for i in range(COUNT)],
        "unused": list(range(COUNT)),
    }
    return saved(folder, columns, ("input_image", "edited"))


SAVED_COLUMNS = {"source": "input_image", "target": "edited", "instruction": "words"}


def members(index: int) -> dict[str, bytes]:
    return {
        "source.png": encoded(picture(10 * index)),
        "target.webp": encoded(picture(10 * index + 5), "WEBP"),
        "txt": f"edit {index}\n".encode(),
    }


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for suffix, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    return path


def shards_of(folder: Path, changes: dict[int, dict[str, bytes]] | None = None) -> str:
    """COUNT samples in three shards."""
    pytest.importorskip("webdataset")
    samples = {index: (changes or {}).get(index, members(index)) for index in range(COUNT)}
    for number, part in enumerate((range(0, 3), range(3, 5), range(5, COUNT))):
        shard(folder / f"part-{number:03d}.tar", {f"k{index}": samples[index] for index in part})
    return str(folder / "part-{000..002}.tar")


def opened(kind: str, folder: Path, **options):
    if kind == "lines":
        return open_pairs(folder_of(folder, [row(index) for index in range(COUNT)]), **options)
    if kind == "table":
        return open_pairs(saved_pairs(folder), columns=SAVED_COLUMNS, **options)
    return open_pairs(shards_of(folder), **options)


def words(source, number: int, *where: int) -> list[str]:
    return [pair.instruction for pair in islice(source.stream(*where), number)]


def sentence_of(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and not text.endswith(".") and ";" in text
    return text


kinds = pytest.mark.parametrize("kind", ["lines", "table", "shards"])


# The order


@kinds
def test_every_epoch_holds_every_pair_once_in_an_order_of_its_own(kind, tmp_path):
    pairs = list(islice(opened(kind, tmp_path, seed=1).stream(), 3 * COUNT))
    epochs = [[pair.instruction for pair in pairs[i : i + COUNT]] for i in range(0, len(pairs), COUNT)]
    assert all(sorted(epoch) == [f"edit {index}" for index in range(COUNT)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    for pair in pairs:
        index = int(pair.instruction.split()[1])
        assert pair.source.getpixel((0, 0)) == (10 * index,) * 3 and pair.source.mode == "RGB"
        assert abs(pair.target.getpixel((0, 0))[0] - (10 * index + 5)) <= 2  # WebP is lossy
        assert pair.mask is None and pair.name


@kinds
def test_order_is_the_seeds(kind, tmp_path):
    first = words(opened(kind, tmp_path, seed=1), 20)
    (tmp_path / "again").mkdir()
    assert words(opened(kind, tmp_path / "again", seed=1), 20) == first
    (tmp_path / "other").mkdir()
    assert words(opened(kind, tmp_path / "other", seed=2), 20) != first


def test_the_order_of_a_seed_never_changes(tmp_path):
    source = opened("lines", tmp_path, seed=5)
    assert "".join(word[-1] for word in words(source, 2 * COUNT)) == "63541021325064"


@kinds
@pytest.mark.parametrize("start", [1, COUNT - 1, COUNT, 2 * COUNT + 3, 5 * COUNT])
def test_resumed_reads_what_an_unbroken_stream_reads(kind, start, tmp_path):
    source = opened(kind, tmp_path, seed=3)
    assert words(source, COUNT, start) == words(source, start + COUNT)[start:]


@kinds
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_partition_the_stream(kind, world, tmp_path):
    source = opened(kind, tmp_path, seed=3)
    start, number = 4, 10
    shares = [words(source, number, start, rank, world) for rank in range(world)]
    together = [share[step] for step in range(number) for share in shares]
    assert together == words(source, number * world, start)


@kinds
def test_workers_keep_the_order(kind, tmp_path):
    stream = PairStream(opened(kind, tmp_path, seed=3), start=2, rank=1, world=2, transform=attrgetter("name"))
    alone = list(islice(DataLoader(stream, batch_size=None), 20))
    shared = list(islice(DataLoader(stream, batch_size=None, num_workers=2), 20))
    assert alone == shared and len(set(alone)) > 1


def test_a_stream_without_transform_gives_pairs(tmp_path):
    first = next(iter(PairStream(opened("lines", tmp_path, seed=3))))
    assert isinstance(first, Pair) and first.source.size == (6, 4)


@kinds
def test_sources_reach_workers_that_share_no_memory(kind, tmp_path):
    source = opened(kind, tmp_path, seed=3)
    assert source.skipped == 0
    assert words(pickle.loads(pickle.dumps(source)), 10, 4) == words(source, 10, 4)


def test_a_workers_error_is_still_one_sentence(tmp_path):
    stream = PairStream(open_pairs(folder_of(tmp_path, [row(0, source="none.png")]), seed=0))
    with pytest.raises(PairError) as error:
        next(iter(DataLoader(stream, batch_size=None, num_workers=1)))
    assert sentence_of(error).startswith(f"{tmp_path / 'metadata.jsonl'} line 1, source: there is no image at")


@pytest.mark.parametrize("where", [(-1, 0, 1), (0, 1, 1), (0, -1, 2), (0, 0, 0)])
def test_impossible_shares_are_refused_at_once(where, tmp_path):
    source = opened("lines", tmp_path)
    with pytest.raises(ValueError, match="is impossible; start from 0"):
        source.stream(*where)
    with pytest.raises(ValueError, match="is impossible; start from 0"):
        PairStream(source, *where)


# What is read


def test_wordings_are_picked_by_seed_and_number(tmp_path):
    folder = folder_of(tmp_path, [row(0, instruction=["one", "two", " three "])])
    texts = words(open_pairs(folder, seed=1), 30)
    assert set(texts) == {"one", "two", "three"}
    assert words(open_pairs(folder, seed=1), 5, 25) == texts[25:]
    assert words(open_pairs(folder, seed=2), 30) != texts


def test_lines_name_files_of_their_folder_or_anywhere(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    picture(80).save(tmp_path / "outside.png")
    paths = row(0, source="../outside.png", target=str(tmp_path / "outside.png"), mask=None)
    folder = folder_of(inner, ["", json.dumps(paths), "  "])
    (folder / "metadata.jsonl").rename(folder / "other.jsonl")
    pair = next(open_pairs(folder / "other.jsonl").stream())
    assert pair.source.getpixel((0, 0)) == pair.target.getpixel((0, 0)) == (80, 80, 80)
    assert pair.name == f"{folder / 'other.jsonl'} line 2"


def test_columns_name_the_keys_of_lines(tmp_path):
    folder = folder_of(tmp_path, [{"before": "s1.png", "after": "t1.png", "how": "edit 1", "where": "s2.png"}])
    columns = {"source": "before", "target": "after", "instruction": "how", "mask": "where"}
    pair = next(open_pairs(folder, columns=columns).stream())
    assert (pair.source.getpixel((0, 0))[0], pair.target.getpixel((0, 0))[0]) == (10, 15)
    assert (pair.mask.mode, pair.mask.size, pair.mask.getpixel((0, 0))) == ("L", (6, 4), 20)


def test_columns_name_the_members_of_shards(tmp_path):
    pytest.importorskip("webdataset")
    parts = {
        "before.png": encoded(picture(10)),
        "after.jpg": encoded(picture(40), "JPEG"),
        "mask.png": encoded(picture(255, mode="1")),
        "json": json.dumps({"how": ["edit 1"]}).encode(),
    }
    shard(tmp_path / "a.tar", {"x/y": parts})
    columns = {"source": "before", "target": "after", "instruction": "how"}
    pair = next(open_pairs(tmp_path / "*.tar", columns=columns).stream())
    assert pair.instruction == "edit 1" and pair.name == f"{tmp_path / 'a.tar'} sample x/y"
    assert (pair.mask.mode, pair.mask.getpixel((0, 0))) == ("L", 255)
    assert (pair.source.getpixel((0, 0))[0], pair.target.getpixel((0, 0))[0]) == (10, 40)


@kinds
def test_pictures_stand_upright_and_lose_their_alpha_to_white(kind, tmp_path):
    turned, exif = Image.new("RGBA", (4, 6), (9, 9, 9, 0)), Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    target = encoded(picture(7))
    if kind == "lines":
        folder_of(tmp_path, [row(0)])
        (tmp_path / "s0.png").write_bytes(buffer.getvalue())
        source = open_pairs(tmp_path)
    elif kind == "table":
        columns = {"source": [buffer.getvalue()], "target": [{"bytes": target, "path": None}], "instruction": ["turn"]}
        source = open_pairs(saved(tmp_path, columns, ("target",)))
    else:
        pytest.importorskip("webdataset")
        parts = {"source.png": buffer.getvalue(), "target.png": target, "txt": b"turn"}
        source = open_pairs(shard(tmp_path / "a.tar", {"k": parts}))
    pair = next(source.stream())
    assert pair.source.size == (6, 4) and pair.source.getpixel((0, 0)) == (255, 255, 255)


def test_a_table_may_name_files_and_have_masks(tmp_path):
    folder_of(tmp_path, [row(0)])
    columns = {name: [str(tmp_path / f"{name[0]}0.png")] for name in ("source", "target")}
    where = saved(tmp_path, columns | {"instruction": [["edit"]], "mask": [str(tmp_path / "s3.png")]}, ("target",))
    pair = next(open_pairs(where).stream())
    assert (pair.source.getpixel((0, 0))[0], pair.target.getpixel((0, 0))[0]) == (0, 5)
    assert pair.mask.getpixel((0, 0)) == 30 and pair.instruction == "edit"


def test_a_hub_dataset_is_asked_for_by_name_and_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.load_from_disk(saved_pairs(tmp_path))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    assert next(open_pairs("hf:owner/name:test[:5]", columns=SAVED_COLUMNS).stream()).name.startswith("hf:owner/name")
    open_pairs("hf:owner/name", columns=SAVED_COLUMNS)
    assert asked == [("owner/name", "test[:5]"), ("owner/name", "train")]

    def fail(name, split):
        raise FileNotFoundError("no such\ndataset")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(PairError) as error:
        open_pairs("hf:owner/name")
    assert sentence_of(error).startswith("cannot open hf:owner/name (no such dataset); check its name")


# What cannot be opened


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "is not JSON in UTF-8"),
        ("[1]", "is not a JSON object"),
        (row(1, instruction=""), "has an empty 'instruction'"),
        (row(1, instruction=["good", " "]), "has an empty 'instruction'"),
        (row(1, instruction=[]), "has an empty list of instructions"),
        (row(1, instruction=5), "has 'instruction' of type int"),
        (row(1, instruction=["good", None]), "has 'instruction' of type NoneType"),
        (row(1, source=["s1.png"]), "has 'source' of type list"),
        (row(1, mask=""), "has an empty 'mask'"),
        ({"source": "s1.png", "instruction": "edit"}, "has no target (under the name 'target')"),
    ],
)
def test_bad_lines_are_found_when_opening(line, message, tmp_path, caplog):
    folder = folder_of(tmp_path, [row(0), "", line, row(2)])
    with pytest.raises(PairError) as error:
        open_pairs(folder)
    assert sentence_of(error).startswith(f"{folder / 'metadata.jsonl'} line 3 {message}")
    with caplog.at_level(logging.WARNING):
        source = open_pairs(folder, on_error="skip")
    assert source.skipped == 1 and caplog.messages == [f"skipped {error.value}"]
    assert sorted(words(source, 2)) == ["edit 0", "edit 2"]


def test_lines_in_another_encoding_are_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes('{"source": "ä"}'.encode("latin-1"))
    with pytest.raises(PairError, match="line 1 is not JSON in UTF-8"):
        open_pairs(tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("none", "there is no "),
        ("none.jsonl", "there is no "),
        ("none-{00..01}.tar", "there is no shard "),
        ("none-*.tar", "there is no shard "),
        ("", "is no set of pairs; pass a .jsonl"),
    ],
)
def test_a_place_without_pairs_is_named(name, message, tmp_path):
    if name.endswith(".tar"):
        pytest.importorskip("webdataset")
    for use in (open_pairs, check_pairs):
        with pytest.raises(PairError) as error:
            use(tmp_path / name)
        assert message in sentence_of(error) and str(tmp_path / name[:5]) in str(error.value)


def test_sets_without_samples_are_refused(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(PairError, match="holds no samples; write one JSON object a line"):
        open_pairs(tmp_path)


def test_empty_datasets_are_refused(monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"source": [], "target": [], "instruction": []})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    with pytest.raises(PairError, match="holds no samples; choose another dataset or split"):
        open_pairs("hf:owner/name")


def test_a_shard_without_samples_is_refused(tmp_path):
    pytest.importorskip("webdataset")
    source = open_pairs(shard(tmp_path / "a.tar", {}))
    with pytest.raises(PairError, match="holds no samples; name shards"):
        next(source.stream())


def test_missing_columns_are_named_with_those_there(tmp_path):
    where = saved_pairs(tmp_path)
    with pytest.raises(PairError) as error:
        open_pairs(where, columns={"source": "input_image"})
    assert "has no column 'target' for the target; choose one of input_image, edited, words" in sentence_of(error)
    with pytest.raises(PairError, match="has no column 'area' for the mask"):
        open_pairs(where, columns=SAVED_COLUMNS | {"mask": "area"})


def test_saved_splits_are_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"source": ["a"]})
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "both")
    with pytest.raises(PairError) as error:
        open_pairs(tmp_path / "both")
    assert f"pass one of {tmp_path / 'both' / 'train'}, {tmp_path / 'both' / 'test'}" in sentence_of(error)


def test_a_damaged_saved_dataset_is_named(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(PairError, match="cannot open .*; check its name, split and files"):
        open_pairs(tmp_path)


@pytest.mark.parametrize("name, where", [("datasets", "hf:owner/name"), ("webdataset", "a.tar")])
def test_a_missing_library_is_named_with_its_extra(name, where, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PairError) as error:
        open_pairs(where)
    assert (
        str(error.value)
        == f'the library {name} is missing; install it: pip install -e ".[train]" in the folder of the project'
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"on_error": "ignore"}, "unknown on_error 'ignore'; choose one of stop, skip"),
        ({"seed": -1}, "the seed is -1; choose"),
        ({"seed": 2**32}, "the seed is 4294967296; choose"),
        ({"columns": {"picture": "image"}}, "unknown field 'picture' in columns; choose from source"),
    ],
)
def test_impossible_settings_are_refused(options, message, tmp_path):
    folder = folder_of(tmp_path, [row(0)])
    with pytest.raises(ValueError, match=message):
        open_pairs(folder, **options)


# Data of the published training scripts


def published_shards(folder: Path, change=lambda index, parts: parts) -> Path:
    """COUNT samples as VAREdit's own reader takes them, in three shards, and their list."""
    pytest.importorskip("webdataset")
    for number, part in enumerate((range(0, 3), range(3, 5), range(5, COUNT))):
        named = {"x": part} if number < 2 else {"y": part}
        for name, indices in named.items():
            samples = {
                f"{index:06}": change(
                    index,
                    {
                        "src.jpg": encoded(picture(10 * index), "JPEG"),
                        "tgt.jpg": encoded(picture(10 * index + 5), "JPEG"),
                        "txt": f"edit {index}".encode(),
                    },
                )
                for index in indices
            }
            shard(folder / f"wds_{name}_{number % 2:04}.tar", samples)
    (folder / "list.txt").write_text("x\t5\t2\ny\t2\t1\n")
    return folder / "list.txt"


def pixels_of(source, count: int) -> list[tuple]:
    return [(p.instruction, p.source.tobytes(), p.target.tobytes()) for p in islice(source.stream(), count)]


def test_lists_and_members_of_the_published_training(tmp_path):
    path = published_shards(tmp_path)
    assert check_pairs(path).good == COUNT
    whole = open_pairs(path, seed=3)
    assert set(words(whole, COUNT)) == {f"edit {index}" for index in range(COUNT)}
    assert words(whole, COUNT, 11) == words(whole, 2 * COUNT + 4)[11:]
    ours = tmp_path / "ours"
    ours.mkdir()
    published_shards(
        ours, lambda i, parts: {f"{k.replace('src', 'source').replace('tgt', 'target')}": v for k, v in parts.items()}
    )
    assert pixels_of(open_pairs(str(tmp_path / "wds_*.tar"), seed=3), 20) == pixels_of(whole, 20)
    assert pixels_of(open_pairs(ours / "list.txt", seed=3), 20) == pixels_of(whole, 20)


def test_both_names_of_a_member_are_one_too_many(tmp_path):
    path = published_shards(tmp_path, lambda i, parts: parts | ({"source.jpg": parts["src.jpg"]} if i == 3 else {}))
    (sentence,) = check_pairs(path).bad
    assert "sample 000003 has src.jpg and source.jpg; keep one of them" in sentence
    assert check_pairs(path, {"source": "src"}).bad == ()
    assert len(check_pairs(path, {"source": "source"}).bad) == COUNT - 1


def test_targets_of_another_size_are_resized_where_that_is_asked_for(tmp_path):
    larger = {"tgt.jpg": encoded(picture(90, (12, 8)), "JPEG")}
    path = published_shards(tmp_path, lambda index, parts: parts | (larger if index == 2 else {}))
    (sentence,) = check_pairs(path).bad
    assert "the source is 6x4 but the target 12x8; make them the same size, or set resize_targets = true" in sentence
    assert check_pairs(path, resize_targets=True).good == COUNT
    pairs = islice(open_pairs(path, resize_targets=True).stream(), COUNT)
    (pair,) = (pair for pair in pairs if pair.instruction == "edit 2")
    assert pair.target.size == pair.source.size == (6, 4) and pair.target.getpixel((3, 2)) == (90, 90, 90)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "names no shards; write NAME, samples"),
        ("x 5 2", "line 1 names no shards; write NAME"),
        ("x\t5\t2\n\n../x\t5\t1", "line 3 names no shards; write NAME"),
        ("x\t5\t9999999", "line 1 names no shards; write NAME"),
        ("x\t5\t3", "lists wds_x_0002.tar, which is not beside it; put the list"),
        ("a photograph of a cat", "line 1 names no shards; write NAME"),
    ],
)
def test_lists_that_do_not_fit_are_told(text, message, tmp_path):
    path = published_shards(tmp_path)
    path.write_text(text)
    with pytest.raises(PairError) as error:
        open_pairs(path)
    assert message in sentence_of(error)


def test_infinitys_splits_are_pictures_and_no_pairs(tmp_path):
    """A folder of `RATIO_COUNT.jsonl`, a line a picture with its captions."""
    for number, ratio in enumerate(("0.500_000000002", "1.000_000000001")):
        lines = [
            {"image_path": f"s{n}.png", "h_div_w": 1.0, "long_caption": "a", "text": "b"}
            for n in range(2 * number, 2 * number + 2 - number)
        ]
        (tmp_path / f"{ratio}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for n in range(3):
        picture(10 * n).save(tmp_path / f"s{n}.png")
    report = check_pairs(tmp_path)
    assert report.good == 0 and len(report.bad) == 3
    assert "0.500_000000002.jsonl line 2 has one picture with captions, as Infinity trains on, but an" in report.bad[1]
    assert check_pairs(tmp_path, pictures=True).good == 3
    shown = {pair.source.getpixel((0, 0))[0] for pair in islice(open_pairs(tmp_path, pictures=True).stream(), 3)}
    assert shown == {0, 10, 20}


# What is found on the way


def broken_lines(folder: Path) -> str:
    """Seven pairs of which four are bad, each in its own way."""
    folder_of(folder, [row(index) for index in range(4)] + [row(4, mask="m4.png"), row(5, mask="m5.png"), row(6)])
    (folder / "s1.png").write_bytes((folder / "s1.png").read_bytes()[:50])
    (folder / "t2.png").unlink()
    picture(0, (5, 4)).save(folder / "t3.png")
    picture(0, (6, 5)).save(folder / "m4.png")
    Image.new("RGBA", (6, 4)).save(folder / "m5.png")
    return str(folder)


def broken_table(folder: Path) -> str:
    cells = [{"bytes": encoded(picture(10 * i)), "path": None} for i in range(COUNT)]
    targets, texts = list(cells), [f"edit {index}" for index in range(COUNT)]
    cells[1] = {"bytes": cells[1]["bytes"][:50], "path": None}
    targets[2] = None
    targets[3] = {"bytes": encoded(picture(0, (5, 4))), "path": None}
    texts[4], texts[5] = None, "  "
    columns = {"source": cells, "target": targets, "instruction": texts}
    return str(saved(folder, columns, ("source", "target")))


def broken_shards(folder: Path) -> str:
    good, texts = members(1), {"txt": b"edit"}
    changes = {
        1: good | {"source.png": good["source.png"][:50]},
        2: {"source.png": good["source.png"]} | texts,
        3: good | {"target.webp": encoded(picture(0, (5, 4)), "WEBP")},
        4: good | {"source.jpg": b"again"},
        5: {name: good[name] for name in ("source.png", "target.webp")} | {"json": b"{"},
    }
    return shards_of(folder, changes)


BROKEN = {
    "lines": (
        broken_lines,
        ["cannot read", "there is no image at", "5x4", "but the mask 6x5; make", "the mask has transparency"],
    ),
    "table": (
        broken_table,
        ["source: cannot read the picture", "has no target", "5x4", "has no instruction", "empty 'instruction'"],
    ),
    "shards": (
        broken_shards,
        [
            "source: cannot read the picture",
            "has no target",
            "5x4",
            "has source.png and source.jpg",
            "not UTF-8 or not JSON",
        ],
    ),
}
NAMES = {"lines": "line {}", "table": "row {}", "shards": "sample k{}"}


@kinds
def test_check_lists_every_bad_sample_by_name(kind, tmp_path):
    make, messages = BROKEN[kind]
    report = check_pairs(make(tmp_path))
    assert (report.count, report.good, len(report.bad)) == (7, 2, 5)
    for index, (sentence, message) in enumerate(zip(report.bad, messages), 1):
        assert message in sentence and ";" in sentence and "\n" not in sentence
        assert NAMES[kind].format(index + (kind == "lines")) in sentence
    assert "the source is 6x4 but the target 5x4; make them the same size" in report.bad[2]


@kinds
def test_stop_raises_what_check_lists(kind, tmp_path):
    where = BROKEN[kind][0](tmp_path)
    with pytest.raises(PairError) as error:
        list(islice(open_pairs(where, seed=0).stream(), COUNT))
    assert sentence_of(error) in check_pairs(where).bad


@kinds
def test_skipping_warns_once_counts_and_keeps_every_share(kind, tmp_path, caplog):
    where = BROKEN[kind][0](tmp_path)
    source = open_pairs(where, on_error="skip", seed=3)
    with caplog.at_level(logging.WARNING):
        whole = words(source, 3 * COUNT)
    assert set(whole) == {"edit 0", "edit 6"} and source.skipped == 5
    assert sorted(caplog.messages) == sorted(f"skipped {sentence}" for sentence in check_pairs(where).bad)
    again = open_pairs(where, on_error="skip", seed=3)
    assert words(again, COUNT, 11) == whole[11 : 11 + COUNT]
    shares = [words(again, 7, 0, rank, 3) for rank in range(3)]
    assert [share[step] for step in range(7) for share in shares] == whole


@pytest.mark.parametrize("kind", ["lines", "bad lines", "shards"])
def test_an_epoch_of_bad_samples_is_an_error(kind, tmp_path):
    with pytest.raises(PairError) as error:
        if kind == "shards":
            where = shards_of(tmp_path, {index: {"txt": b"edit"} for index in range(COUNT)})
        else:
            bad = row(0, source="none.png") if kind == "lines" else "{"
            where = folder_of(tmp_path, [bad] * 2)
        next(open_pairs(where, on_error="skip").stream())
    assert sentence_of(error).startswith(f"no sample of {tmp_path}") and "mend them first: " in str(error.value)


def test_a_shard_that_breaks_off_is_one_bad_sample(tmp_path):
    where = shards_of(tmp_path)
    path = tmp_path / "part-000.tar"
    with tarfile.open(path) as tar:
        cut = tar.getmember("k2.source.png").offset_data + 10
    path.write_bytes(path.read_bytes()[:cut])
    report = check_pairs(where)
    # webdataset hands a sample over when the next one begins, so the whole one before the cut is lost too.
    assert (report.count, report.good) == (COUNT - 1, COUNT - 2)
    assert report.bad[0].startswith(f"{path} cannot be read to its end (unexpected end of data); write or download")
    source = open_pairs(where, on_error="skip", seed=1)
    assert set(words(source, 3 * COUNT)) == {f"edit {index}" for index in (0, 3, 4, 5, 6)} and source.skipped == 1
    assert words(source, COUNT, 9) == words(source, 9 + COUNT)[9:]
    with pytest.raises(PairError, match="cannot be read to its end"):
        words(open_pairs(where, seed=1), COUNT)


def test_shards_are_shuffled_within_a_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "SHUFFLE_BUFFER", 2)
    source = open_pairs(shards_of(tmp_path), seed=1)
    assert sorted(words(source, COUNT)) == [f"edit {index}" for index in range(COUNT)]
    assert words(source, COUNT, 9) == words(source, 9 + COUNT)[9:]


# Hostile files


HUGE, LARGE = 1 << 40, bytes(65 << 20)


def tar_of(path: Path, members: list[tuple[str, bytes | str | int]], mode: str = "w") -> Path:
    """A shard of members: bytes, a link to a name, or a size that is claimed."""
    with tarfile.open(path, mode) as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                shard.addfile(member)
            elif isinstance(content, int):
                member.size = content
                shard.fileobj.write(member.tobuf(shard.format))
                shard.offset += tarfile.BLOCKSIZE
            else:
                member.size = len(content)
                shard.addfile(member, BytesIO(content))
    return path


def good_sample(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{side}.png", encoded(picture(9))) for side in ("source", "target")] + [(f"{key}.txt", b"edit")]


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 60,000 squared pixels."""
    data = bytearray(encoded(picture(1)))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


MEMBERS = {
    "a member that claims a terabyte": ([("k1.source.png", HUGE)], "cannot be read to its end"),
    "a member that inflates": ([("k1.source.png", LARGE), *good_sample("k1")[1:]], "source.png of more than 64 MB"),
    "a link out of the shard": ([("k1.source.png", "/etc/passwd"), *good_sample("k1")[1:]], "has no source"),
    "a picture that is a bomb": ([("k1.source.png", bomb()), *good_sample("k1")[1:]], "source: .*pixels"),
    "a member twice": ([*good_sample("k1"), *good_sample("k1")], "cannot be read to its end"),
    "JSON nested for ever": ([*good_sample("k1")[:2], ("k1.json", b"[" * 10**6)], "not UTF-8 or not JSON"),
    "an endless instruction": ([*good_sample("k1")[:2], ("k1.txt", b"x" * 10**6)], "of 1000000 letters; write at most"),
}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("case", MEMBERS)
def test_hostile_members_of_shards_are_one_bad_sample_each(tmp_path, case, mode):
    members, message = MEMBERS[case]
    path = tar_of(tmp_path / ("a.tar" if mode == "w" else "a.tar.gz"), [*good_sample("k0"), *members], mode)
    report = check_pairs(path)
    assert len(report.bad) == 1 and re.search(message, report.bad[0]), report
    assert report.good >= ("to its end" not in message) and "\n" not in report.bad[0]


def test_names_in_shards_are_never_paths(tmp_path):
    """Nothing is unpacked: a name may climb out of any folder, and only names a sample."""
    (tmp_path / "inner").mkdir()
    path = tar_of(tmp_path / "inner" / "a.tar", good_sample("../../escaped"))
    assert check_pairs(path).good == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "inner"]


LINES = {
    "longer than any": '{"source": "' + "x" * (3 << 20) + '"}',
    "nested for ever": "[" * 10**5,
    "a null in a name": json.dumps(row(0, source="a\0b.png")),
    "a folder": json.dumps(row(0, source=".")),
    "a pipe": json.dumps(row(0, source="pipe.png")),
    "a device": json.dumps(row(0, source="/dev/zero")),
    "a link to a device": json.dumps(row(0, target="zero.png")),
    "a name of a megabyte": json.dumps(row(0, source="x" * 10**6)),
    "a number of thousands of digits": '{"source": ' + "9" * 5000 + "}",
    "an instruction without end": json.dumps(row(0, instruction="x" * 30_000)),
}


@pytest.mark.parametrize("case", LINES)
def test_hostile_lines_are_one_bad_sample_each(tmp_path, case):
    folder_of(tmp_path, [row(0), LINES[case], row(1)])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    report = check_pairs(tmp_path)
    assert report.good == 2 and len(report.bad) == 1
    assert "metadata.jsonl line 2" in report.bad[0] and len(report.bad[0]) < 600 and "\n" not in report.bad[0]


def test_a_line_without_end_takes_no_memory(tmp_path):
    folder_of(tmp_path, [row(0)])
    with open(tmp_path / "metadata.jsonl", "ab") as file:
        file.truncate(file.tell() + (64 << 20))
    tracemalloc.start()
    report = check_pairs(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20 and (report.good, len(report.bad)) == (1, 1)
    tracemalloc.stop()


def test_pipes_and_folders_in_the_place_of_sets(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.tar").mkdir()
    (tmp_path / "c.png").mkdir()
    os.mkfifo(tmp_path / "c.png" / "d.png")
    for name, message in (
        ("a.tar", "a pipe"),
        ("*.tar", "a pipe"),
        ("a.jsonl", "no set of pairs"),
        ("b.tar", "folder"),
    ):
        with pytest.raises(PairError, match=message):
            open_pairs(tmp_path / name)
    report = check_pairs(tmp_path, pictures=True)
    assert report.good == 0 and len(report.bad) == 1 and "d.png is a pipe" in report.bad[0]


@pytest.mark.parametrize("span", ["{0..9999999}", "{0..99999}-{0..99999}", "{0..99999999999}"])
def test_too_many_shards_are_refused_before_their_names_are_made(tmp_path, span):
    with pytest.raises(PairError, match="names more than 1000000 shards; check the range in braces"):
        open_pairs(tmp_path / f"a-{span}.tar")
