"""`tools/repack` as users start it."""

import os
import subprocess
from pathlib import Path

import numpy as np

from megatron.sft.chat.encoding import Conversation
from megatron.sft.data.store import ConversationStore
from megatron.sft.data.tokenized import TokenizedRows, token_dtype
from tests.support.fork_server import SERVER

ROOT = Path(__file__).parents[2]
NAME = "Tokenized-data-model-{}_text_document"


def write(folder: Path, grouped: bool = False, length: int = 128) -> Path:
    """300 random conversations of 4 to 128 tokens, in pairs where they are grouped."""
    random = np.random.default_rng(11)
    prefix = folder / NAME.format(length)
    with ConversationStore(prefix, token_dtype(50_000), grouped) as store:
        for number in range(300):
            runs = random.integers(2, 1 + max(2, int(random.integers(2, 32))), size=int(random.choice([2, 4]))).tolist()
            tokens = random.integers(0, 50_000, size=sum(runs))
            store.add(Conversation(tokens, runs, group=number // 2 if grouped else None))
        packing = store.pack(length, 1234, packing=True)
        facts = {"format": 1, "seed": 1234, "options": {"overlong": "drop", "packing": True}, "chat_template": "T"}
        store.write(packing, facts | {"fingerprint": "of tokenising"} | store.totals(packing, length))
    return prefix


def test_the_command(tmp_path: Path) -> None:
    write(tmp_path)
    line = ["bash", str(ROOT / "tools/repack"), NAME.format(128), "--seq-length", "300"]
    environment = os.environ | {**SERVER.python()}
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "wrote " + NAME.format(300) + ".bin, .idx, .json"
    assert TokenizedRows(tmp_path / NAME.format(300)).manifest["rows"] > 0
