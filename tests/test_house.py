"""The layout of the code: who imports whom, how long the path to the algorithm is, how long functions and lines are.

Exceptions are named with their reason.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from support import ROOT

CORE = ROOT / "varedit_core"
NODES = ROOT / "nodes"
MODULES = sorted(path for path in CORE.rglob("*.py"))
PYTHON = sorted(
    path for path in ROOT.rglob("*.py") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)

NETWORKS = {"model", "tokenizer"}
ALGORITHM = {"defaults", "controls", "fitting", "replaceable", "sampling", *NETWORKS}
LIBRARY = {"coder", "editor", "files", "made_for", "pictures", "request", "runtime", "text", "wording", *ALGORITHM}
ANYTHING = {path.relative_to(CORE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__", "__main__"}
ALLOWED = {
    "__init__": set(),  # names are imported when they are first asked for
    "__main__": {"cli"},
    "defaults": set(),
    "fitting": {"tokenizer"},
    "quantizer": {"tokenizer"},
    "replaceable": set(),
    "model": {"replaceable", "tokenizer"},
    "tokenizer": {"defaults", "model", "replaceable"},
    "text": {"defaults", "files", "model", "runtime"},
    "sampling": ALGORITHM,
    "controls": ALGORITHM,
    "runtime": ALGORITHM,
    "pictures": {"controls", "defaults", "files", "fitting", "sampling", "tokenizer", "wording"},
    "hub": {"cards", "defaults", "files", "wording"},
    "cards": {"files", "model", "runtime", "text", "tokenizer"},
    "files": {"defaults", "fitting", "runtime", "sampling", "wording", *NETWORKS},
    "coder": {"defaults", "made_for", "pictures", "runtime", "text", "tokenizer"},
    "request": LIBRARY,
    "editor": LIBRARY,
    "parity": LIBRARY,
    "sweep": LIBRARY,
    "wording": set(),
    "demo": {"defaults", "files"},
    "made_for": {"defaults", "demo", "sampling", "tokenizer"},
    "shapeedit": LIBRARY | {"cli", "demo"},
    "training": LIBRARY | {"shapeedit"},
    "bench": ANYTHING,
    "cli": ANYTHING,
}
"""What the modules of every folder of `varedit_core` (or a module beside them) may import of it, beside their own."""
ALSO = {
    "sampling/driver.py": {"runtime"},
    "sampling/tokens.py": {"files"},
    "files/convert.py": {"text"},
    "files/info.py": {"text"},
    "cli/app.py": {"__version__"},
}
"""What single modules may, too: the driver brings loop and memory together, tokens are saved and loaded by methods, and
whether a text encoder is whole is asked of its network, the package knows its version."""


def imported(path: Path, package: tuple[str, ...], tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """The modules that a module imports relatively, as paths from the root of its package. package: where it lies.

    Not those whose names only type checkers read.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [tuple(node.module.split("."))] if node.module else [(alias.name,) for alias in node.names]
            yield from (base + name for name in names)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == CORE.name for name in names), f"{path} imports its package by name"


def test_every_folder_imports_what_it_may():
    stray = set()
    for path in MODULES:
        place = path.relative_to(CORE)
        own = place.parts[0].removesuffix(".py")
        assert own in ALLOWED, f"say in ALLOWED what {own} may import"
        for module in imported(path, place.parts[:-1], ast.parse(path.read_text())):
            assert module, f"{path} imports from outside the package"
            if module[0] not in {own} | ALLOWED[own] | ALSO.get(place.as_posix(), set()):
                stray.add((place.as_posix(), module[0]))
    assert not stray, "these imports break the layout"


def test_schemas_of_nodes_import_only_what_they_state():
    """ComfyUI reads every schema when it starts: networks and pictures are for `execute` and the adapters."""
    states = {"defaults", "controls", "fitting", "files.token_header", "sampling.settings"}
    for path in sorted(NODES.glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):  # what is imported within a function is imported when it runs
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                node.body = []
        for module in imported(path, ("nodes",), tree):
            assert module[0] != CORE.name or states & {module[1], ".".join(module[1:])}, (path.name, module)
            assert module[:2] != ("nodes", "adapters"), (path.name, module)


def test_the_runtime_is_there_wherever_networks_are_loaded_or_run():
    """Its forms of the networks' operations are in their place however one came to them; without it there are none."""
    code = """
import importlib, sys
for name in sys.argv[1].split():
    module, _, attribute = name.partition(":")
    getattr(importlib.import_module(module), attribute or "__name__")
from varedit_core.replaceable import REPLACEMENTS
print(*sorted(REPLACEMENTS))
"""
    marked = set()
    for path in (*CORE.glob("model/*.py"), *CORE.glob("tokenizer/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            children = node.body if isinstance(node, ast.ClassDef | ast.Module) else []
            for child in children:
                if isinstance(child, ast.FunctionDef) and any(
                    isinstance(d, ast.Name) and d.id == "replaceable" for d in child.decorator_list
                ):
                    marked.add(f"{node.name}.{child.name}" if isinstance(node, ast.ClassDef) else child.name)
    plain = "varedit_core.model.transformer varedit_core.tokenizer.vae"
    ways = [f"varedit_core:{name}" for name in ("Editor", "load_transformer", "load_autoencoder", "load_text_encoder")]
    ways += ["varedit_core.runtime.workspace", "varedit_core.bench.models", "varedit_core.shapeedit.evaluate"]
    for way, wanted in [(plain, set()), *((way, marked) for way in ways)]:
        done = subprocess.run([sys.executable, "-c", code, way], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert set(done.stdout.split()) == wanted, (way, done.stderr)
    assert len(marked) == 7


def code_lines(path: Path) -> int:
    """Lines of code: no docstrings, comments, blanks."""
    text = path.read_text()
    documentation, lines = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documentation.update(range(node.lineno, node.end_lineno + 1))
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documentation)


def test_the_networks_are_short():
    beside = ("engine.py",)  # around the networks, not in them
    files = [path for folder in sorted(NETWORKS) for path in (CORE / folder).glob("*.py")]
    assert sum(code_lines(path) for path in files if path.name not in beside) <= 620


def test_the_algorithm_is_short():
    """All that has to be read to understand it: the networks, and the loop with what it is given. 900 lines are wanted;
    docs/LOG.md says where the rest lies. The bound only goes down."""
    loop = [CORE / "sampling" / f"{name}.py" for name in ("loop", "scale", "settings", "batch")]
    files = [path for folder in sorted(NETWORKS) for path in (CORE / folder).glob("*.py")]
    assert sum(map(code_lines, [*files, *loop])) <= 941


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT).as_posix()}:{node.name}", node


def test_functions_are_short():
    files = [*MODULES, *NODES.rglob("*.py")]
    every = [pair for path in files for pair in functions(path) if pair[1].name != "define_schema"]
    long = {name for name, node in every if node.end_lineno - node.lineno + 1 > 70}
    assert not long, "no function is longer than 70 lines"


def test_signatures_are_narrow():
    wide = set()
    for name, node in (pair for path in MODULES for pair in functions(path)):
        if any(re.match("triton.jit|kernel\\b", ast.unparse(decorator)) for decorator in node.decorator_list):
            continue  # pointers and strides: Triton takes no structures
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if len([argument for argument in named if argument.arg not in ("self", "cls")]) > 10:
            wide.add(name)
    assert not wide, "no function has more than 10 parameters"


def test_lines_are_short():
    long = {p.relative_to(ROOT).as_posix() for p in PYTHON if any(len(x) > 120 for x in p.read_text().splitlines())}
    assert not long, "no line is longer than 120 characters"
