"""Several models compared: their scores as a table and a picture, and their answers next to each other."""

import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron.sft.inference.scores import Score, draw, markdown, table_lines
from megatron.sft.runtime.manifest import write_text

MOST_QUESTIONS = 100  # of a task in a mode; the results have them all
MOST_CHARACTERS = 600  # of an answer


def write_comparison(
    names: Sequence[str], folders: Sequence[Path], results: Sequence[Sequence[dict[str, Any]]], table: Path
) -> str:
    """Write `table`.md, `table`.png and, of data files, `table`-answers.md; returns what to say about them.

    results: of every model, in the order of `names`, one a task.
    """
    scores = [[Score(**score) for result in of_model for score in result["scores"]] for of_model in results]
    lines = table_lines(scores)
    text = markdown(names, lines)
    base = table.with_suffix("") if table.suffix in (".md", ".png") else table
    as_text, picture, answers_file = (base.with_name(base.name + ending) for ending in (".md", ".png", "-answers.md"))
    models = [f"{name}: {folder}" for name, folder in zip(names, folders, strict=True)]
    draw(names, lines, picture, "\n".join([*models, time.strftime("%d %B %Y")]))
    write_text(as_text, text)
    said = f"{text}table: {as_text}, {picture}"
    if len(names) > 1 and (answers := "".join(side_by_side(names, of_task) for of_task in zip(*results, strict=True))):
        write_text(answers_file, answers)
        said += f"\nanswers side by side: {answers_file}"
    return said


def side_by_side(names: Sequence[str], results: Sequence[dict[str, Any]]) -> str:
    """One task's results of several models (`exact_match`) as Markdown: a table for each mode, with the questions first whose
    answer changed from wrong to right or back. Empty for results without answers, as benchmarks' are."""
    if not all("records" in result for result in results):
        return ""
    modes = [list(records) for _, records in groupby(results[0]["records"], key=lambda record: record["control"])]
    others = [_by_question(result) for result in results]
    text = ""
    for mode in modes:
        keys = [(record["control"], record["question"]) for record in mode]
        lines = [[records[key] for records in others] for key in keys if all(key in records for records in others)]
        lines.sort(key=lambda line: len({answer["correct"] for answer in line}) < 2)  # stable: otherwise as in the file
        control = f", {mode[0]['control']}" if mode[0]["control"] else ""
        shown = f"the first {MOST_QUESTIONS} of " if len(lines) > MOST_QUESTIONS else ""
        text += f"## {results[0]['data']}{control}: {shown}{len(lines):,} questions\n\n"
        text += f"| question | reference | {' | '.join(map(_cell, names))} |\n|{'---|' * (len(names) + 2)}\n"
        for line in lines[:MOST_QUESTIONS]:
            answers = (("✓ " if answer["correct"] else "✗ ") + _cell(answer["answer"]) for answer in line)
            text += f"| {_cell(line[0]['question'])} | {_cell(line[0]['reference'])} | {' | '.join(answers)} |\n"
        text += "\n"
    return text


def _by_question(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(record["control"], record["question"]): record for record in result["records"]}


def _cell(text: str) -> str:
    """On one line, without what Markdown would take for markup."""
    cut = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"
    for character in "\\|<>*_`#":
        cut = cut.replace(character, f"\\{character}")
    return cut.strip().replace("\n", "<br>")
