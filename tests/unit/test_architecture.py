"""docs/architecture.md and docstrings agree with the code: every file, function, room and module they name exists."""

import ast
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text()
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
WORKER = ROOT / "worker" / "keepstream_worker"
GATEWAY = ROOT / "gateway" / "keepstream_gateway"

#: `path.py` and `path.py: function` or `path.py: Class.method`.
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", DOCUMENT)))


def find(path: str) -> Path | None:
    """Return the file that the document means, or None."""
    bases = (WORKER, ROOT / "api_contracts", ROOT / "api_contracts" / "keepstream", ROOT / "gateway", GATEWAY)
    return next((base / path for base in bases if (base / path).exists()), None)


def definitions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> set[str]:
    """Return the names of all functions, classes and methods."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            found |= definitions(node, f"{prefix}{node.name}.")
    return found


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda part: part or "file")
def test_every_file_and_function_that_the_walk_names_exists(path: str, name: str) -> None:
    file = find(path)
    assert file is not None, f"{path} does not exist"
    if name:
        assert name in definitions(ast.parse(file.read_text())), f"{path} has no {name}"


def test_every_module_that_a_docstring_names_exists() -> None:
    named: dict[str, Path] = {}
    for directory in ("api_contracts", "worker", "gateway", "migrations", "benchmarks", "tests"):
        for file in (ROOT / directory).rglob("*.py"):
            found = re.findall(r"``(keepstream(?:_worker|_gateway)?(?:\.\w+)+)``", file.read_text())
            named |= dict.fromkeys(found, file.relative_to(ROOT))
    gone = {}
    for name, file in named.items():
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            gone[name] = str(file)
    assert named
    assert gone == {}


def test_the_walk_goes_through_the_rooms() -> None:
    walk = DOCUMENT.partition("## One job")[2]
    visited = {path.partition("/")[0] for path, name in NAMED if name and f"`{path}: {name}`" in walk}
    assert visited >= {"keepstream", "intake", "service.py", "jobs", "providers", "events", "store", "upkeep"}


@pytest.mark.parametrize(("package", "title"), [(WORKER, "The rooms"), (GATEWAY, "The gateway")])
def test_every_room_of_the_layers_is_described(package: Path, title: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == [package.name])
    there = {path.stem for path in package.iterdir() if (path / "__init__.py").is_file() or path.suffix == ".py"}
    rooms = {room for layer in layers for room in re.findall(r"\w+", layer)} & there
    table = DOCUMENT.partition(f"## {title}\n")[2].partition("\n## ")[0]
    described = {name.removesuffix(".py") for name in re.findall(r"^\| `(\w+)(?:/|\.py)` \|", table, re.MULTILINE)}
    assert described == rooms == there - {"__init__"}


def test_the_picture_fits_a_console() -> None:
    picture = DOCUMENT.split("```")[1]
    assert max(map(len, picture.splitlines())) < 100


def test_the_glossary_is_in_order_and_has_each_word_once() -> None:
    words = re.findall(r"^\| \*\*([^*]+)\*\* \|", GLOSSARY, re.MULTILINE)
    assert words == sorted(set(words))
