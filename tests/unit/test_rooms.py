"""Rooms of megatron/sft import only from those below them, and stay small; [tool.importlinter] has their order."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import megatron.sft

PACKAGE = Path(megatron.sft.__file__).parent
ROOT = PACKAGE.parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
COMMANDS, *ROOMS = next(contract["layers"] for contract in CONTRACTS if contract["id"] == "rooms")
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """The room of a module named from megatron.sft on; "commands" for one at the top."""
    return module.split(".")[0] if "." in module else "commands"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_of(path) for path in TREES}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere: inside functions and under TYPE_CHECKING as well."""
    found: set[str] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.sft"):
            source = (node.module or "").removeprefix("megatron.sft").lstrip(".")
            inside = {f"{source}.{alias.name}".lstrip(".") for alias in node.names} & MODULES
            found |= inside or {source}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("megatron.sft.") for alias in node.names if alias.name.startswith("megatron.sft.")
            }
    return found - {"", module_of(path)}


IMPORTS = {module_of(path): imported(path) for path in TREES}


def circle(modules: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or none: what is left after those that import nothing that is left."""
    left = dict(modules)
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def test_every_import_goes_to_a_room_below() -> None:
    order = ["commands", *ROOMS]
    backward = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        if room_of(target) == "commands" or order.index(room_of(module)) > order.index(room_of(target))
    ]
    assert not backward


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(IMPORTS) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]


def test_at_most_45_pairs_of_a_room_and_one_that_it_imports() -> None:
    pairs = {(room_of(module), room_of(target)) for module, targets in IMPORTS.items() for target in targets}
    assert len([pair for pair in pairs if pair[0] not in ("commands", pair[1])]) <= 45


def test_a_room_and_a_folder_in_it_have_at_most_20_files() -> None:
    assert {room_of(module) for module in MODULES} == {"commands", *ROOMS}
    sizes = Counter(path.parent for path in TREES if path.parent.name != "sft")
    assert {str(folder): size for folder, size in sizes.items() if size > 20} == {}


def test_a_file_has_at_most_320_lines() -> None:
    assert {str(path): lines for path in TREES if (lines := len(path.read_text().splitlines())) > 320} == {}


def test_a_function_has_at_most_60_lines() -> None:
    long = {
        f"{module_of(path)}.{node.name}": lines
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert long == {}


def test_every_command_is_in_the_contract_and_has_a_main_of_its_arguments() -> None:
    commands = {command.strip() for command in COMMANDS.split("|")}
    assert commands == {module for module in MODULES if room_of(module) == "commands"} - {"__init__"}
    for command in commands:
        mains = [n for n in TREES[PACKAGE / f"{command}.py"].body if isinstance(n, ast.FunctionDef) and n.name == "main"]
        assert [ast.unparse(main.args) for main in mains] == ["argv: Sequence[str] | None=None"], command
        assert [ast.unparse(main.returns) for main in mains if main.returns] == ["int"], command


def test_rooms_hold_a_rule_and_re_export_nothing() -> None:
    for room in ROOMS:
        body = TREES[PACKAGE / room / "__init__.py"].body
        assert len(body) == 1, f"{room}/__init__.py holds more than its docstring"
        assert isinstance(body[0], ast.Expr), room


def test_contributing_shows_the_rooms_in_their_order_and_files_that_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.split("## The rooms")[1].split("|---|---|---|\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert [room for room, *_ in rows] == ["commands", *ROOMS]
    files = [(room, name) for room, *cells in rows for name in re.findall(r"`(\w+\.py)`", " ".join(cells))]
    folders = {"commands": PACKAGE, **{room: PACKAGE / room for room in ROOMS}}
    assert [name for room, name in files if not (folders[room] / name).is_file()] == []


@pytest.mark.parametrize(
    "file, planted, named",
    [
        ("data/packing.py", "from megatron.sft.training import loop\n", "data is not allowed to import megatron.sft.training"),
        (
            "data/packing.py",
            "def late():\n    import megatron.sft.training.loop\n",
            "data is not allowed to import megatron.sft.training",
        ),
        (
            "hf/hub.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from megatron.sft import train\n",
            "hf is not allowed to import megatron.sft.train",
        ),
        ("plan.py", "from megatron.sft import download\n", "megatron.sft.plan is not allowed to import megatron.sft.download"),
        ("families/rules.py", "from megatron.sft.families import decoder\n", ".rules -> .decoder"),
        ("fresh/__init__.py", "", "fresh"),
    ],
)
def test_the_contract_fails_on_a_planted_import(tmp_path: Path, file: str, planted: str, named: str) -> None:
    copy = tmp_path / "megatron" / "sft"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert lint_imports(tmp_path).returncode == 0
    (copy / file).parent.mkdir(exist_ok=True)
    with (copy / file).open("a") as appended:
        appended.write("\n" + planted)
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert named in " ".join(result.stdout.split())


def lint_imports(folder: Path) -> "subprocess.CompletedProcess[str]":
    start = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", start, "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
