"""Draws the README's pictures again, from a quickstart that runs on a terminal of 115 columns.

python -m benchmarks.pictures

Needs Debian's `chromium-headless-shell` (apt-get install), for the page and the terminal.
"""

import os
import pty
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from megatron.sft import show_sample
from megatron.sft.reporting.curves import read_curve
from megatron.sft.reporting.loss_plot import draw
from megatron.sft.runtime.errors import OneLineParser, UserError, run

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
BROWSER = "chromium-headless-shell"
COLUMNS = 115
ROW = 3  # of the quickstart's data, with a short and a long answer in its first conversations
# Style sheet pixels: half of a page at GitHub, 830 pixels wide, shows the page of rows at nearly its own size.
PAGE = (480, 424)


def recorded(command: Sequence[str]) -> list[str]:
    """What a command leaves on a terminal, line by line, with its colors: of a rewritten line only the last state."""
    child, terminal = pty.fork()
    if not child:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES="50")
        os.execvp(command[0], list(command))
    output = b""
    try:
        while piece := os.read(terminal, 65536):
            output += piece
            sys.stdout.write(piece.decode(errors="replace"))
    except OSError:  # a terminal whose last process has ended
        pass
    if os.waitpid(child, 0)[1]:
        raise UserError(f"{' '.join(command)} failed: see above")
    return [line.rpartition("\r")[2] for line in output.decode().replace("\r\n", "\n").split("\n")]


def screenshot(source: Path, size: tuple[int, int], scale: float, output: Path) -> None:
    """What a browser shows of a page in a window of this size in style sheet pixels, as a PNG of `scale` dots for each."""
    browser = shutil.which(BROWSER)
    if browser is None:
        raise UserError(f"{BROWSER} is not installed: apt-get install {BROWSER}")
    window = f"--window-size={size[0]},{size[1]}"
    options = ["--no-sandbox", "--hide-scrollbars", f"--force-device-scale-factor={scale}", window, f"--screenshot={output}"]
    subprocess.run([browser, *options, source.absolute().as_uri()], check=True, capture_output=True, timeout=60)
    Image.open(output).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(output, optimize=True)


def draw_terminal(lines: Sequence[str], title: str, folder: Path, output: Path) -> None:
    """Lines as a terminal's window."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for line in lines:
        console.print(Text.from_ansi(line.replace("\x1b[K", "")), soft_wrap=True)
    svg = console.export_svg(title=title)
    width, height = (float(text) for text in svg.partition('viewBox="0 0 ')[2].partition('"')[0].split())
    # Of the fonts that it names, which it would load from elsewhere, the terminal's own is used.
    page = f'<body style="margin:0">{svg.replace("Fira Code", "DejaVu Sans Mono")}</body>'
    (folder / "terminal.html").write_text(page)
    screenshot(folder / "terminal.html", (round(width), round(height)), 1660 / width, output)


def main(argv: Sequence[str] | None = None) -> int:
    OneLineParser(prog="pictures", description="Draw the README's pictures again.").parse_args(argv)
    os.chdir(ROOT)
    lines = recorded(["bash", "scripts/quickstart.sh"])
    quickstart = Path("outputs/quickstart")
    draw([read_curve(quickstart / "checkpoints", "quickstart")], IMAGES / "loss.png", "Quickstart: sorting names")
    shutil.copy(quickstart / "scores.png", IMAGES / "before_after.png")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = next(number for number, line in enumerate(lines) if "computing with" in line)
        last = next(number for number, line in enumerate(lines) if "best checkpoint" in line)
        draw_terminal(lines[first : last + 1], "bash scripts/sft/SFT_Quickstart.sh train", folder, IMAGES / "log.png")
        data = "assets/data/quickstart/Tokenized-quickstart-quickstart-256_text_document"
        show_sample.main([data, str(ROW), "--rows", "1", "--html", str(folder / "page.html")])
        text = (folder / "page.html").read_text()
        start, end = text.index("<h1>"), text.index('<p class="legend">')
        rows = text[:start] + "<style>body { padding-top: .2rem }</style>" + text[end:]  # without the totals
        (folder / "rows.html").write_text(rows)
        screenshot(folder / "rows.html", PAGE, 2, IMAGES / "mask_page.png")
    return 0


if __name__ == "__main__":
    run(main)
