"""Converts every model of a folder in many layouts and both formats and exports it again: a line for each that is its source.

python tests/support/export_grid.py FOLDER OUT [NAME...]; the torch_dist checkpoints stay in OUT under the models' names. Models
that are named are converted in all layouts, the others in `SAMPLE`.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from megatron.sft import convert, export
from tests.support import tiny, tiny_families

# TP, PP, EP; five layers, so PP 2 to 4 are uneven.
LAYOUTS = [(tp, pp, 1) for tp in (1, 2, 4) for pp in (1, 2, 4)] + [(1, 1, 4), (2, 3, 2)]
SAMPLE = [(1, 1, 1), (4, 2, 1)]


def main() -> None:
    models, out, everywhere = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    for model in sorted(path for path in models.iterdir() if path.is_dir()):
        experts = tiny_families.has_experts(model.name)
        for form in ("torch_dist", "torch"):
            for layout in LAYOUTS if model.name in everywhere else SAMPLE:
                # torch_dist is the same whatever the layout.
                if (layout[2] > 1 and not experts) or (form == "torch_dist" and layout != (1, 1, 1)):
                    continue
                check(model, form, layout, out / model.name)
    print("done")


def check(model: Path, form: str, layout: tuple[int, int, int], output: Path) -> None:
    names = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--expert-model-parallel-size")
    sizes = [str(part) for pair in zip(names, layout, strict=True) for part in pair]
    checkpoint = output if form == "torch_dist" else output.with_name("checkpoint")
    exported = output.with_name("exported")
    call(convert.main, "--source", model, "--output", checkpoint, "--ckpt-format", form, *sizes)
    call(export.main, "--load", checkpoint, "--hf-dir", model, "--output", exported)
    tiny.assert_same_weights(exported, model)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((exported / name).read_text()) == json.loads((model / name).read_text())
    shutil.rmtree(exported)
    if form == "torch":
        shutil.rmtree(checkpoint)
    print("equal", model.name, form, *layout, flush=True)


def call(main: Callable[[list[str]], int], *arguments: object) -> None:
    """An entry module's main in this process."""
    main([*map(str, arguments)])


if __name__ == "__main__":
    main()
