"""megatron.sft.train with small gradient buckets and a slow CPU, which writes down what happened when.

Its first argument is a JSON object, the others are those of megatron.sft.train:
  report   file that gets, for each step of this process, the gradients that were fetched before and in the optimizer's step,
           and how many had been stepped when the next forward pass began with the first layer
  slow     the CPU's step of each parameter takes longer, and that of the last one waits until the first layer has begun
  patient  everything waits for each transfer, and for the CPU's step: nothing happens at the same time
  spoil    a step whose gradient is made not finite, before its norm is known
  fail     a step in which the CPU's thread cannot step a parameter
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron.sft.runtime import device

# Parameters: a few buckets in each layer of tests.support.tiny's models.
BUCKET = 10_000


class Report:
    """What happened in each step of this process."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self.stepped = self.early = self.late = 0
        self.begun = threading.Event()

    def optimizer(self) -> None:
        self.begun.clear()
        self.steps.append({"early": self.early, "late": -1, "stepped": -1})
        self.stepped = self.early = self.late = 0

    def forward(self) -> None:
        if self.steps and self.steps[-1]["late"] < 0:
            self.steps[-1] |= {"late": self.late, "stepped": self.stepped}
        self.begun.set()


def slow(step: Callable[..., Any], settings: dict[str, Any], report: Report) -> Callable[..., Any]:
    def stepped(transfers: Any, shard: Any, factors: Any) -> Any:
        if settings.get("slow"):
            time.sleep(0.005)
            if shard.place == max(each.place for each in transfers.shards):
                assert report.begun.wait(60)
        if factors.step == settings.get("fail"):
            raise RuntimeError("injected: the CPU cannot step")
        result = step(transfers, shard, factors)
        report.stepped += 1
        return result

    return stepped


def spoiling(clip: Callable[..., float], settings: dict[str, Any], report: Report) -> Callable[..., float]:
    from megatron.sft.checkpoint.optimizer_state import inner_optimizers

    def clipped(optimizer: Any, clip_grad: float) -> float:
        report.optimizer()
        if len(report.steps) == settings.get("spoil"):
            for inner in inner_optimizers(optimizer):
                inner.optimizer.param_groups[0]["params"][0].decoupled_grad.fill_(float("nan"))
        return clip(optimizer, clip_grad)

    return clipped


def main() -> int:
    settings = json.loads(sys.argv[1])
    device.prepare()
    from megatron.sft.model.decoder_layer import DecoderLayer
    from megatron.sft.train import main as train
    from megatron.sft.training import engine, optimizer
    from megatron.sft.training.optimizers import transfers

    report = Report()
    start = transfers.Transfers.step
    fetch, forward, gather = transfers.Transfers.fetch, DecoderLayer.forward, engine.Engine.gathered_parameters
    config = optimizer.DistributedDataParallelConfig

    def fetched(self: Any, gradients: Any, reduced: Any = None) -> None:
        if reduced is None:
            report.late += len(gradients)
        else:
            report.early += len(gradients)
        fetch(self, gradients, reduced)
        if settings.get("patient"):
            device.synchronize()

    def started(self: Any, work: Any) -> None:
        start(self, work)
        if settings.get("patient"):
            self.wait()
            device.synchronize()

    def gathered(self: Any) -> Any:
        report.begun.set()
        return gather(self)

    def forwarded(self: Any, *arguments: Any, **keywords: Any) -> Any:
        report.forward()
        return forward(self, *arguments, **keywords)

    transfers.Transfers.fetch = fetched  # type: ignore[method-assign]
    transfers.Transfers.step = started  # type: ignore[method-assign]
    DecoderLayer.forward = forwarded  # type: ignore[method-assign]
    transfers.Transfers._step = slow(transfers.Transfers._step, settings, report)  # type: ignore[method-assign]
    engine.Engine.gathered_parameters = gathered  # type: ignore[method-assign]
    engine.clip_in_place = spoiling(engine.clip_in_place, settings, report)
    optimizer.DistributedDataParallelConfig = lambda **fields: partial(config, **fields)(bucket_size=BUCKET)  # type: ignore
    status = train(sys.argv[2:])
    if "report" in settings:
        Path(f"{settings['report']}.{os.environ.get('RANK', '0')}").write_text(json.dumps(report.steps))
    return status


if __name__ == "__main__":
    sys.exit(main())
