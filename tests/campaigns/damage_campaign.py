"""Injects faults into checkpoints, trackers, manifests, tokenised data and model folders: each must be found before a step.

    python -m tests.campaigns.damage_campaign [N=1000] [--seed S=1] [--scripts K=48]

Prints a table of what was found, by class of file and kind of fault, and every fault that was not; the exit status is 0 if
there is none. The entry points' own checks run in one process; K faults more go through the scripts, as a user meets them.
A fault is found if one line names the file that was damaged (or its folder, where the file is missing): either the step is
refused, or, where a run has an older checkpoint that is whole, that one is taken and the line says why.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import damage_material, tiny
from tests.support.damage_material import Case, Material


@dataclass(frozen=True)
class Fault:
    """One fault: which class of input, which file of it, what was done to it, and from which random number."""

    case: str
    kind: str
    file: str
    seed: int


@dataclass(frozen=True)
class Result:
    """`found`: the fault was told of in one line that names the file; `said` is that line, or what happened instead."""

    fault: Fault
    found: bool
    said: str


def flip(path: Path, other: Path | None, choice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
    path.write_bytes(content)


def cut(path: Path, other: Path | None, choice: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: choice.randrange(len(content))])


def grow(path: Path, other: Path | None, choice: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(choice.randbytes(choice.randrange(1, 4096)))


def blank(path: Path, other: Path | None, choice: random.Random) -> None:
    """A block of zeros where a disk lost a write."""
    content = bytearray(path.read_bytes())
    start = choice.randrange(len(content))
    block = content[start : start + 512]
    content[start : start + 512] = b"\xff" * len(block) if not any(block) else bytes(len(block))
    path.write_bytes(content)


def remove(path: Path, other: Path | None, choice: random.Random) -> None:
    path.unlink()


def replace(path: Path, other: Path | None, choice: random.Random) -> None:
    """Another file of the same kind: of an older checkpoint, of other data, of another model."""
    assert other is not None
    shutil.copyfile(other, path)


def add(path: Path, other: Path | None, choice: random.Random) -> None:
    """A file that does not belong there, such as another save has left."""
    path.with_name(f"__{choice.randrange(1, 99)}_0.distcp").write_bytes(choice.randbytes(100))


KINDS: dict[str, Callable[[Path, Path | None, random.Random], None]] = {
    "flip": flip, "cut": cut, "grow": grow, "blank": blank, "remove": remove, "replace": replace, "add": add,
}  # fmt: skip


def faults(material: Material, number: int, seed: int) -> Iterator[Fault]:
    """As many faults, the classes and kinds in turn, the places in the files at random."""
    choice = random.Random(seed)
    kinds = [(case, kind) for case in material.cases for kind in case.kinds]
    for index in range(number):
        case, kind = kinds[index % len(kinds)]
        # A file of another checkpoint may have the same content.
        files = [name for name in case.files if kind != "replace" or case.differs(name)]
        file = choice.choice(files)
        yield Fault(case.name, kind, file, choice.randrange(1 << 30))


def inject(material: Material, case: Case, fault: Fault, folder: Path) -> Path:
    """A copy of the case's input with the fault in it; returns the damaged file."""
    shutil.copytree(case.source, folder, copy_function=os.link)
    path, other = folder / fault.file, case.others.get(fault.file)
    content = path.read_bytes()
    path.unlink()  # a link to the original
    path.write_bytes(content)
    KINDS[fault.kind](path, other, random.Random(fault.seed))
    return path


def tell(material: Material, fault: Fault, work: Path) -> Result:
    """Inject the fault and run the check that a user's command would make."""
    case = next(case for case in material.cases if case.name == fault.case)
    folder = work / "damaged"
    path = inject(material, case, fault, folder)
    said = case.check(folder, work / "out")
    # A file beside the damaged one may be named where both contradict each other.
    names = {path.name, path.stem, *(case.also_named)}
    found = said.startswith("error: ") and "\n" not in said.strip() and any(name in said for name in names)
    shutil.rmtree(folder)
    shutil.rmtree(work / "out", ignore_errors=True)
    return Result(fault, found, said)


def quietly(check: Callable[[], None]) -> str:
    """What a check says: `error: …` for a `UserError` or a warning that names an older checkpoint, else what it was."""
    from megatron.sft.runtime.errors import UserError

    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            check()
    except UserError as error:
        return f"error: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    warnings = [line for line in output.getvalue().splitlines() if line.startswith("warning: ")]
    return "error: " + " | ".join(warnings).removeprefix("warning: ") if warnings else "nothing was said"


def table(results: list[Result], by_scripts: list[Result]) -> str:
    """How many faults of each kind were injected into each class, and how many were found, as Markdown."""
    head = f"| class of input | {' | '.join(KINDS)} | found | through the scripts |"
    lines = [head, "|---" * (len(KINDS) + 3) + "|"]
    for name in dict.fromkeys(result.fault.case for result in results):
        own = [result for result in results if result.fault.case == name]
        kinds = Counter(result.fault.kind for result in own)
        counts = " | ".join(str(kinds[kind] or "") for kind in KINDS)
        scripts = _found([result for result in by_scripts if result.fault.case == name])
        lines.append(f"| {name} | {counts} | {_found(own)} | {scripts} |")
    kinds = Counter(result.fault.kind for result in results)
    lines.append(f"| all | {' | '.join(str(kinds[kind]) for kind in KINDS)} | {_found(results)} | {_found(by_scripts)} |")
    return "\n".join(lines)


def _found(results: list[Result]) -> str:
    return f"{sum(result.found for result in results)} of {len(results)}" if results else ""


def campaign(material: Material, number: int, seed: int, work: Path) -> list[Result]:
    work.mkdir(exist_ok=True)
    with damage_material.one_process():
        return [tell(material, fault, work) for fault in faults(material, number, seed)]


def through_scripts(material: Material, number: int, seed: int, work: Path) -> list[Result]:
    """The same through the numbered scripts, in processes of their own: the exit status and the line on the terminal count."""
    work.mkdir(exist_ok=True)
    results = []
    cases = [case for case in material.cases if case.script]
    for fault in faults(Material(cases), number, seed):
        case = next(case for case in cases if case.name == fault.case)
        path = inject(material, case, fault, work / "damaged")
        environment = {**os.environ, "MEGATRON_SFT_PYTHON": sys.executable, "MEGATRON_SFT_DEVICE": "cpu"}
        variables, command = case.script(work / "damaged", work / "out")  # type: ignore[misc]
        result = subprocess.run(
            ["bash", *command],
            cwd=tiny.ROOT,
            env={**environment, "OMP_NUM_THREADS": "1", **variables},
            capture_output=True,
            text=True,
            timeout=tiny.TIMEOUT_SECONDS,
        )
        lines = (result.stdout + result.stderr).splitlines()
        said = [line for line in lines if line.startswith(("error: ", "warning: "))]
        names = {path.name, path.stem, *case.also_named}
        named = any(name in line for line in said for name in names)
        ended = result.returncode == (0 if case.falls_back else 2)
        text = f"status {result.returncode}: {' | '.join(said) or ' | '.join(lines[-3:])}"
        results.append(Result(fault, named and ended, text))
        shutil.rmtree(work / "damaged")
        shutil.rmtree(work / "out", ignore_errors=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("number", nargs="?", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scripts", type=int, default=48, help="faults through the scripts")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="damage-") as name:
        folder = Path(name)
        material = damage_material.make(folder / "material")
        results = campaign(material, arguments.number, arguments.seed, folder / "work")
        by_scripts = through_scripts(material, arguments.scripts, arguments.seed, folder / "scripts")
    print(table(results, by_scripts))
    missed = [result for result in results + by_scripts if not result.found]
    for result in missed:
        print(f"NOT FOUND {result.fault}: {result.said[:300]}")
    print(f"{len(results) + len(by_scripts)} faults, {len(missed)} not found, {time.monotonic() - started:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
