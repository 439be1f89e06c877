"""Versions for an environment, printed as pip's constraints: what must stay as it is, and what the tests have passed with.

The environment's Python runs it: python scripts/lib/versions.py MEGATRON_CORE_VERSION [CONSTRAINTS_FILE]. It needs no package.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

# Compiled against each other: where the base Python (a container's) has them, they are kept.
COMPILED = re.compile(r"(torch|torch(vision|audio|ao)|(pytorch-)?triton|transformer-engine.*|flash-attn.*|apex)$")


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    below = {
        normalized(package.metadata["Name"] or ""): f"{package.metadata['Name']}=={package.version}"
        for package in importlib.metadata.distributions()
        if not str(package.locate_file("")).startswith(sys.prefix)
    }
    print("\n".join(pin for name, pin in below.items() if COMPILED.match(name)))
    print(f"megatron-core=={sys.argv[1]}")
    for file in sys.argv[2:]:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            name = normalized(re.split("[^A-Za-z0-9._-]", line.strip(), maxsplit=1)[0])
            # What the base Python brings was tested together elsewhere.
            if name not in below and name not in ("", "torch", "megatron-core"):
                print(line)


if __name__ == "__main__":
    main()
