"""Kill training runs at random moments, start them again with the same command until they finish, and compare the end with that
of a run that nobody killed.

python -m tests.campaigns.kill_campaign [--kills 100] [--seed 0] [--layouts 1x1,DP2,TP2,PP2] [--folder DIR]
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.support.real_runs import HANG_SECONDS, LAYOUTS, STEPS, Material, RealRun, Seen, assert_same_run, make_material

MOMENTS = ("start", "step", "validation", "save", "async save", "exit")
SYNC, ASYNC = ["--async-save", "0"], ["--async-save", "1"]
# Where each moment begins in the announcements of faulty_train, and at which steps. Runs that save asynchronously write a
# checkpoint during the step after `save`.
_PARTS = {
    "start": ("start-up", [0]),
    "step": ("forward and backward", list(range(3, STEPS))),
    "validation": ("validation", [4, 8]),
    "save": ("save", [4, 6, 8, 10]),
    "async save": ("save", [4, 6, 8, 10]),
    "exit": ("exit", [STEPS]),
}


class Campaign:
    """Kills of one layout, spread over as many runs as they take."""

    def __init__(self, material: Material, layout: str, seed: int) -> None:
        self.material, self.layout = material, layout
        self.random = random.Random(f"{seed} {layout}")
        self.kills: Counter[str] = Counter()
        self.runs, self.slowest = 0, 0.0

    def run(self, kills: int) -> None:
        while self.kills.total() < kills:
            asynchronous = self.runs % 2 == 1
            options = ASYNC if asynchronous else SYNC
            reference = self.material.reference(self.layout, options)
            run = RealRun(self.material, self.material.folder / f"{self.layout} {self.runs}", self.layout, options)
            self._until_done(run, self._plan(asynchronous, kills - self.kills.total()))
            assert_same_run(run, reference)
            self.runs += 1
            print(f"{self.layout}: run {self.runs}, {self.kills.total()} kills, the same to the last bit", flush=True)

    def _plan(self, asynchronous: bool, most: int) -> list[str]:
        save = "async save" if asynchronous else "save"
        moments = ["start", "step", "validation", save, *self.random.choices(["start", "step", save, save], k=2)]
        self.random.shuffle(moments)
        return [*moments[: most - 1], "exit"]

    def _until_done(self, run: RealRun, moments: Sequence[str]) -> None:
        for moment in moments:
            run.start()
            if self._strike(run, moment):
                self.kills[moment] += 1
            elif run.finish() == 0:
                break
        assert run.start().finish() == 0, run.output

    def _strike(self, run: RealRun, moment: str) -> bool:
        """Kill the run, or one process of it, a random while after the moment has begun; False if it ended before."""
        part, steps = _PARTS[moment]
        ahead = [step for step in steps if step == 0 or step > run.latest()]
        victim = self.random.randrange(LAYOUTS[self.layout][0])
        seen = run.wait_for(part, self.random.choice(ahead) if ahead else STEPS, victim)
        if seen is None:
            return False
        # A process takes some 5 s to start; the other parts take hundredths.
        time.sleep(self.random.uniform(0.0, 5.0 if moment == "start" else 0.15))
        if run.process is None or run.process.poll() is not None:
            return moment == "exit"
        if self.random.random() < 0.5:
            run.kill()
            return True
        return self._kill_one(run, seen)

    def _kill_one(self, run: RealRun, victim: Seen) -> bool:
        """SIGKILL one process; the others must end by themselves, with a line that names it."""
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        struck = time.monotonic()
        status = run.finish(HANG_SECONDS)
        self.slowest = max(self.slowest, time.monotonic() - struck)
        assert status in (0, 128 + signal.SIGKILL), run.output
        assert status == 0 or f"rank {victim.rank} (process {victim.pid}) was ended by SIGKILL" in run.output, run.output
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    layouts = given.layouts.split(",")
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        material = make_material(folder)
        rows = []
        for number, layout in enumerate(layouts):
            campaign = Campaign(material, layout, given.seed)
            campaign.run(given.kills // len(layouts) + (number < given.kills % len(layouts)))
            rows.append(campaign)
        print(table(rows))


def table(campaigns: Sequence[Campaign]) -> str:
    """The outcome in Markdown. A run that had not come out the same would have ended the campaign."""
    lines = [f"| layout | runs | {' | '.join(MOMENTS)} | kills | bit-identical runs | slowest end of the others |"]
    lines += ["|" + "---|" * (len(MOMENTS) + 5)]
    for each in campaigns:
        counts = " | ".join(str(each.kills[moment]) for moment in MOMENTS)
        slowest = f"{each.slowest:.1f} s" if each.slowest else "-"
        total = each.kills.total()
        lines.append(f"| {each.layout} | {each.runs} | {counts} | {total} | {each.runs} of {each.runs} | {slowest} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
