"""Words that read as translated, and what to write instead. Fails where the project uses one.

python tests/support/words.py [FILE...]

In the package, scripts, tools and documents all text counts; in tests the names of files, functions and test cases.
Quotations in documents (`code`, lines that start with >) do not count.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Regular expressions, of whole words. A space matches an underscore, a hyphen and the end of a line as well.
INSTEAD = {
    "beside": "next to",
    "told|tell(s|ing)? of": "say, report",
    "mend(s|ed|ing)?": "fix",
    "of (its|their|your|our|his|my) own": "its own",
    "(go|goes|going|went|gone) on": "continue",
    "anew": "again",
    "(stand|stands|stood|standing) still": "hang",
    "(break|breaks|broke|broken|breaking) off": "interrupt",
    "so many": "this many, or the number",
    "(?<!there.)(is|are) no (?!longer|more|less|other|matter)[a-z]+": "is not a, there is no",
    "(leave|leaves|left|leaving) out": "skip",
    "without a word": "silently",
    "nobody": "no one",
    "let(s|ting)? go of": "free",
    "(take|takes|took|taking) note of": "record",
    "the one that": "the X that",
    "which [a-z]+ (that|it|this) is": "its X",
    "so marked": "marked this way",
}


def whole_words(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z])(?:{words.replace(' ', '[ _-]+')})(?![a-z])", re.IGNORECASE)


PATTERNS = {whole_words(words): instead for words, instead in INSTEAD.items()}
# What a line of prose starts with that continues the line before.
CONTINUES = re.compile(r"""^[\s#>"']+""")
NAMES = re.compile(r"""^\s*(?:def|class) (\w+)|^@test (.*) \{|^\s*(?:id|name)=["'](.*?)["']""")


def main(arguments: list[str]) -> int:
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    hits = 0
    for name in arguments or listed:
        if re.match(r"(megatron|scripts|docs|tests|tools|benchmarks|\.github)/|\w+\.md", name) or arguments:
            for number, found, instead in sorted(offences(name)):
                print(f"{name}:{number}: {found!r}: write {instead}")
                hits += 1
    print(f"{hits} such words" if hits else "words: none")
    return 1 if hits else 0


def offences(name: str) -> Iterator[tuple[int, str, str]]:
    """Line number (0: the file's name), the words found, what to write instead."""
    yield from ((0, match[0], instead) for pattern, instead in PATTERNS.items() for match in pattern.finditer(name))
    try:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return  # a picture
    if name.startswith("tests/"):
        lines = [" ".join(filter(None, match.groups())) if (match := NAMES.match(line)) else "" for line in lines]
    elif name.endswith(".md"):
        lines = ["" if line.startswith(">") else re.sub("`[^`]*`", "``", line) for line in lines]
    for index, line in enumerate(lines):
        following = CONTINUES.sub("", lines[index + 1]) if index + 1 < len(lines) else ""
        for pattern, instead in PATTERNS.items():
            for match in pattern.finditer(f"{line} {following}"):
                if match.start() < len(line):
                    yield index + 1, match[0], instead


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
