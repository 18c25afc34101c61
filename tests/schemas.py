"""What the nodes' inputs and outputs are, on which saved graphs depend: `schemas.json`, and how it may change.

`python dev.py render` writes it, where nothing but what the rule allows has changed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from math import inf
from pathlib import Path

from stand_in import Schema, Slot, load_pack, modules, nodes_of, unload_pack

FILE = Path(__file__).with_name("schemas.json")
RULE = (
    "released inputs and outputs are only ever appended, inputs as optional ones, since saved graphs and scripts "
    "depend on their order, ids, kinds and values"
)


def lists_files(slot: Slot) -> bool:
    """Whether an input's choices are files: those have no default."""
    return slot.kind == "COMBO" and slot.default is None


def recorded(slot: Slot) -> dict:
    """What saved graphs and scripts depend on."""
    facts = {"id": slot.id, "kind": slot.kind}
    for name in ("optional", "is_output_list", "control_after_generate"):
        facts |= {name: True} if getattr(slot, name, None) else {}
    for name in ("default", "min", "max", "options"):
        value = getattr(slot, name, None)
        facts |= {} if value is None or (name == "options" and lists_files(slot)) else {name: value}
    return facts


def facts_of(schemas: dict[str, Schema]) -> dict:
    """The same of every input and output of these nodes."""
    return {
        name: {"inputs": [*map(recorded, schema.inputs)], "outputs": [*map(recorded, schema.outputs)]}
        for name, schema in schemas.items()
    }


def declared() -> dict:
    """`facts_of` the pack as it is now, in a stand-in for ComfyUI."""
    with tempfile.TemporaryDirectory() as folder:
        made = modules(Path(folder))
        before = {name: sys.modules.get(name) for name in made}
        sys.modules.update(made)
        try:
            schemas = (node.define_schema() for node in nodes_of(load_pack()))
            return facts_of({schema.node_id: schema for schema in schemas})
        finally:
            unload_pack()
            for name, module in before.items():
                sys.modules.pop(name)
                sys.modules.update({name: module} if module else {})


def broken(known: dict, found: dict) -> list[str]:
    """What breaks the rule, a few words each. known: what was released. found: what is there now. Nodes may come, and
    outputs, and inputs that are optional, each behind the others; a choice may gain options, and a range may widen."""
    wrong = []
    for name, sides in known.items():
        if name not in found:
            wrong.append(f"{name} is gone")
            continue
        for side, slots in sides.items():
            now = found[name][side]
            for index, slot in enumerate(slots):
                if index >= len(now) or not _keeps(slot, now[index]):
                    wrong.append(f"{name}: {slot['id']} of the {side} is not what it was")
        late = found[name]["inputs"][len(sides["inputs"]) :]
        wrong += [
            f"{name}: {slot['id']} must be optional, as graphs lack it" for slot in late if not slot.get("optional")
        ]
    return wrong


def _keeps(was: dict, now: dict) -> bool:
    """Whether an input or output takes all that it took, and stands for the same."""
    free = {"options", "min", "max"}
    return (
        {key: value for key, value in was.items() if key not in free}
        == {key: value for key, value in now.items() if key not in free}
        and set(was.get("options", ())) <= set(now.get("options", ()))
        and now.get("min", -inf) <= was.get("min", -inf)
        and now.get("max", inf) >= was.get("max", inf)
    )


def written(known: dict, found: dict) -> str:
    """The file's text for what is there now, the nodes in the order that they have there. ValueError where the rule is
    broken."""
    wrong = broken(known, found)
    if wrong:
        raise ValueError(f"schemas.json stays as it is ({RULE}): {'; '.join(wrong)}")
    nodes = [
        f'  "{name}": {{\n' + ",\n".join(_rows(side, slots) for side, slots in found[name].items()) + "\n  }"
        for name in {**known, **found}
    ]
    return "{\n" + ",\n".join(nodes) + "\n}\n"


def _rows(side: str, slots: list[dict]) -> str:
    """A line a slot."""
    rows = ",\n".join(f"      {json.dumps(slot, ensure_ascii=False)}" for slot in slots)
    return f'    "{side}": [\n{rows}\n    ]' if slots else f'    "{side}": []'


def read() -> dict:
    """What was released."""
    return json.loads(FILE.read_text(encoding="utf-8"))
