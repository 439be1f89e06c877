"""Random tokenised conversations, in groups or not."""

from pathlib import Path

import numpy as np

from megatron.sft.chat.encoding import Conversation
from megatron.sft.data.store import ConversationStore
from megatron.sft.data.tokenized import token_dtype

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
