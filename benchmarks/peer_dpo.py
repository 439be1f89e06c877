"""The benchmark's peer for pairs: TRL's DPOTrainer as it is, padded, with Liger's layer kernels and precomputed references."""

import argparse
import importlib.util
import tempfile
import time
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import peak_bytes
from benchmarks.pair_rows import PairRows, TokenPair, padding_share
from megatron.sft.hf.published_configs import published_configs
from megatron.sft.runtime.errors import UserError


def pairs_of_steps(arguments: argparse.Namespace, rows: PairRows) -> tuple[list[TokenPair], int]:
    """The pairs of all steps in order, those of our stack's rows, and how many micro-batches a step has: as many pairs as ours
    has in a step on average, in whole micro-batches."""
    steps = arguments.warm_up + arguments.steps
    used = [pair for index in rows.used(0, steps, arguments.micro_batches) for pair in rows.pairs[index]]
    accumulated = max(1, round(len(used) / steps / arguments.peer_pairs))
    needed = steps * accumulated * arguments.peer_pairs
    return (used * (needed // len(used) + 1))[:needed], accumulated


def measure_steps(arguments: argparse.Namespace, rows: PairRows) -> tuple[list[float], list[float], list[float]]:
    """Seconds and losses of the timed steps, and `peak_bytes`: TRL's own training loop, timed from the beginning to the end of
    its steps."""
    from datasets import Dataset
    from trl import DPOTrainer

    pairs, accumulated = pairs_of_steps(arguments, rows)
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            _model(arguments.model, on_gpu),
            args=_config(arguments, folder, accumulated, on_gpu),
            train_dataset=Dataset.from_list([{"prompt": "a b", "chosen": "b", "rejected": "a"}]),
            processing_class=_tokenizer(),
            peft_config=_adapters(arguments.lora_rank),
        )
        # Texts that are tokenised already; a reference that guesses, as ours.
        guess = -float(np.log(trainer.model.config.vocab_size))
        trainer.train_dataset = Dataset.from_list([_example(pair, guess) for pair in pairs])
        clock = _clock(arguments.warm_up, on_gpu)
        trainer.add_callback(clock)
        trainer.train()
    return clock.seconds, clock.losses, peak_bytes()


def peer_padding(arguments: argparse.Namespace, rows: PairRows) -> float:
    """The share of padding in what the peer computes."""
    return padding_share(pairs_of_steps(arguments, rows)[0], arguments.peer_pairs)


def _config(arguments: argparse.Namespace, folder: str, accumulated: int, on_gpu: bool) -> Any:
    from trl import DPOConfig

    has_liger = importlib.util.find_spec("liger_kernel") is not None
    if on_gpu and not has_liger:
        raise UserError("the peer needs Liger's kernels: pip install liger-kernel, or --against ''")
    return DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=arguments.peer_pairs,
        gradient_accumulation_steps=accumulated,
        max_steps=arguments.warm_up + arguments.steps,
        train_sampling_strategy="sequential",
        max_length=None,
        precompute_ref_log_probs=True,
        use_liger_kernel=has_liger,
        gradient_checkpointing=arguments.peer_recompute,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        logging_strategy="steps",
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
    )


def _clock(warm_up: int, on_gpu: bool) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds and losses of the steps after the warm-up."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self._started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._started = self._now()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step > warm_up:
                self.seconds.append(self._now() - self._started)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs and state.global_step > warm_up:
                self.losses.append(float(logs["loss"]))

        def _now(self) -> float:
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

    return Clock()


def _example(pair: TokenPair, guess: float) -> dict[str, Any]:
    sides = {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
    references = {"ref_chosen_logps": guess * len(pair.chosen), "ref_rejected_logps": guess * len(pair.rejected)}
    return {**{name: ids.tolist() for name, ids in sides.items()}, **references}


def _model(name: str, on_gpu: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    configs = published_configs()
    fields = dict(configs[name]) if name in configs else None
    config = AutoConfig.for_model(**fields) if fields else AutoConfig.from_pretrained(name, trust_remote_code=False)
    torch.manual_seed(0)
    kind = torch.bfloat16 if on_gpu else torch.float32
    with torch.device("cuda" if on_gpu else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=False)


def _adapters(rank: int) -> Any:
    if not rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _tokenizer() -> Any:
    """One of three words, for the text that TRL's constructor wants."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="a")
