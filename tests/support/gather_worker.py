"""megatron.sft.train with small buckets, which notes layers that begin before all of their weights are gathered.

Its first argument is the file that gets how many layers of this process began, and how many too early.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron.sft.runtime import device

# Parameters: a few buckets in each layer of tests.support.tiny's models.
BUCKET = 4_000


def main() -> int:
    device.prepare()
    from megatron.core.distributed import DistributedDataParallel

    from megatron.sft.model.decoder_layer import DecoderLayer
    from megatron.sft.train import main as train
    from megatron.sft.training import optimizer

    groups: dict[Any, Any] = {}
    counts = {"begun": 0, "early": 0}
    build, forward, config = DistributedDataParallel.__init__, DecoderLayer.forward, optimizer.DistributedDataParallelConfig

    def built(self: Any, *arguments: Any, **keywords: Any) -> None:
        build(self, *arguments, **keywords)
        groups.update(self.param_to_bucket_group)

    def forwarded(self: Any, *arguments: Any, **keywords: Any) -> Any:
        mine = [groups[parameter] for parameter in self.parameters() if parameter in groups]
        counts["begun"] += 1
        counts["early"] += any(group.param_gather_handle is not None or not group.param_gather_dispatched for group in mine)
        return forward(self, *arguments, **keywords)

    DistributedDataParallel.__init__ = built  # type: ignore[method-assign]
    DecoderLayer.forward = forwarded  # type: ignore[method-assign]
    optimizer.DistributedDataParallelConfig = lambda **fields: config(**{**fields, "bucket_size": BUCKET})  # type: ignore
    status = train(sys.argv[2:])
    Path(f"{sys.argv[1]}.{os.environ.get('RANK', '0')}").write_text(json.dumps(counts))
    return status


if __name__ == "__main__":
    sys.exit(main())
