"""Data as the published training scripts read it: members of shards, lists of shards, lines of captioned pictures.

VAREdit's own reader takes `KEY.src.jpg`, `KEY.tgt.jpg` and `KEY.txt` of the shards that a list names; Infinity's takes
lines with one picture each.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..files.reading import check_file

MEMBERS = {"source": "src", "target": "tgt"}
"""What the pictures of a pair are named there, beside our names."""
PICTURE = "image_path"
"""What a line of Infinity's names its picture: one with captions, no pair."""
LIST = ".txt"
MAX_LIST, MAX_SHARDS = 1 << 20, 1_000_000


def listed_shards(path: Path, error: type[ValueError]) -> list[Path]:
    """The shards of a list, beside it: a line `NAME`, samples and number of shards, with tabs between, stands for
    wds_NAME_0000.tar and on. `error`, one sentence, where a line is none of these."""
    if check_file(path, "list of shards", error).stat().st_size > MAX_LIST:
        raise error(f"{path} is too large for a list of shards; check the path")
    shards: list[Path] = []
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig", "replace").splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"([^\t/\\]{1,200})\t([0-9]{1,15})\t([0-9]{1,9})", line.strip())
        if not match or len(shards) + int(match[3]) > MAX_SHARDS:
            raise error(
                f"{path} line {number} names no shards; write NAME, samples and number of shards with tabs between"
            )
        shards += [path.with_name(f"wds_{match[1]}_{i:04}.tar") for i in range(int(match[3]))]
    if not shards:
        raise error(f"{path} names no shards; write NAME, samples and number of shards with tabs between")
    lost = next((shard for shard in shards if not shard.exists()), None)
    if lost:
        raise error(f"{path} lists {lost.name}, which is not beside it; put the list into the folder of its shards")
    return shards
