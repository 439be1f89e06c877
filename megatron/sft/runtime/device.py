"""The one module that knows CPU from GPU: which device there is, and what megatron-core needs to run without CUDA.

megatron-core calls CUDA by name in many places. So that the same model, schedules, optimizer and checkpoints run over gloo on a
machine without a GPU, `prepare()` replaces about 15 names of torch and megatron-core there, for the life of the process; with a
GPU it replaces none. docs/seams.md lists them, with what each is for.
"""

import contextlib
import logging
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from megatron.sft.runtime import ranks, stores

_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
SMALLEST_FOR_THREADS = 20_000_000  # parameters; below, threads take longer to meet than to compute
# Dense bf16 peaks in TFLOP/s from NVIDIA's data sheets (without sparsity); the name is searched in torch's device name.
_PEAK_TFLOPS = {"H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "H800": 989.4, "A100": 312.0, "A800": 312.0}


def has_gpu() -> bool:
    """True if torch sees a CUDA device and CPU was not asked for with MEGATRON_SFT_DEVICE=cpu."""
    return os.environ.get("MEGATRON_SFT_DEVICE", "") != "cpu" and torch.cuda.is_available()


def use_free_processors(num_parameters: int) -> None:
    """Let torch compute with as many threads on the CPU as will not wait for each other: one for a small model, else one for
    each processor that is free now. OMP_NUM_THREADS decides where it is set.

    Measured on two processors with four other programs: SmolLM2-135M answers 16 questions in 17 to 30 s with two threads, in
    4 s with one; the quickstart's model 240 in 11 to 19 s and 4 to 5 s.
    """
    if has_gpu() or os.environ.get("OMP_NUM_THREADS"):
        return
    free = torch.get_num_threads() - round(os.getloadavg()[0])
    torch.set_num_threads(max(1, free if num_parameters >= SMALLEST_FOR_THREADS else 1))


def current() -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def backend() -> str:
    """torch.distributed's backend for collectives between the devices."""
    return "nccl" if has_gpu() else "gloo"


def device_name() -> str:
    """The device with its size, for people: `NVIDIA H200, 139 GiB` or `CPU, 2 threads a process`."""
    if not has_gpu():
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''} a process"
    properties = torch.cuda.get_device_properties(current())
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def peak_tflops() -> float | None:
    """Dense bf16 peak of the GPU in TFLOP/s; None where it is not known (CPU, other cards)."""
    if not has_gpu():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in _PEAK_TFLOPS.items() if key in name), None)


def peak_memory_bytes() -> int:
    """The most bytes that torch's allocator has held on the GPU so far; on CPU the process's largest resident set."""
    if has_gpu():
        return torch.cuda.max_memory_reserved()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def synchronize() -> None:
    """Wait until the GPU has finished all work; does nothing on CPU."""
    if has_gpu():
        torch.cuda.synchronize()


class _CudaMeansCpu(TorchFunctionMode):
    """Makes `device="cuda"`, `.cuda()` and device numbers mean the CPU, and calls the types of CPU tensors `torch.cuda.*`.

    The last is for megatron-core's gradient buckets, which compare types with such names.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and _names_cuda(device):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to:
            args = tuple("cpu" if index and _names_cuda(arg) else arg for index, arg in enumerate(args))
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, str) and device.startswith("cuda")) or (type(device) is int)


class _NoStream:
    """In place of a CUDA stream or event: on CPU everything runs in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *args: Any) -> "_NoStream":
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _not_compiled(function: Any = None, **_: Any) -> Any:
    return _not_compiled if function is None else function


_prepared = False


def prepare() -> None:
    """Set up torch and megatron-core for this process's device. Further calls do nothing.

    Call it before megatron-core is imported: some of its modules read these names at import.
    """
    global _prepared
    if _prepared:
        return
    _prepared = True
    _quieten()
    if has_gpu():
        # float32 means float32: Transformer Engine asks cuBLAS for TensorFloat-32 (10 bits) wherever the inputs are float32.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return
    # Where Transformer Engine is installed, megatron-core would use its CUDA kernels for sums and norms: now its import fails.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    # The compiler would query the GPU through the names that are replaced below; megatron-core compiles some functions when it
    # is imported.
    torch._dynamo.config.disable = True
    torch.compile = _not_compiled  # type: ignore[assignment]
    _CudaMeansCpu().__enter__()
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *args: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.default_generators = (torch.default_generator,)
    cuda.current_stream = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream = _NoStream
    cuda.Event = _NoStream
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._lazy_call = lambda function: function()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    distributed: Any = torch.distributed
    distributed.all_to_all_single = _with_split_lists(torch.distributed.all_to_all_single)


def _with_split_lists(all_to_all: Callable[..., Any]) -> Callable[..., Any]:
    """torch's all_to_all_single, which also takes split sizes as tensors: megatron-core converts them on a GPU only."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return all_to_all(*args, **kwargs)

    return call


def _quieten() -> None:
    """Silence warnings of torch and megatron-core that a user of this project can do nothing about."""
    texts = "Apex is not|transformer_engine|.*deprecat|Setting the shape|The .grad attribute"
    warnings.filterwarnings("ignore", message=texts)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    # megatron-core 0.19 logs these two: its own model class is to be replaced some day, and it makes an argument itself.
    for module in ("models.gpt.gpt_model", "distributed.distributed_data_parallel"):
        logging.getLogger(f"megatron.core.{module}").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not re.match("GPTModel IS DEPRECATED|DistributedDataParallel: full_param_layout not provided", record.getMessage())


@contextlib.contextmanager
def process_group(timeout_minutes: float = 10.0) -> Iterator[None]:
    """Join the process group of the run that this process belongs to, and leave it at the end; outside a run, one process.

    timeout_minutes: of a collective, after which torch.distributed raises.
    """
    prepare()
    alone = {} if ranks.in_a_run() else _ALONE
    with _variables(alone):
        if alone:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend(), store=store, rank=0, world_size=1)
        else:
            stores.prepare()
            device_id = current() if has_gpu() else None
            timeout = timedelta(minutes=timeout_minutes)
            torch.distributed.init_process_group(backend(), timeout=timeout, device_id=device_id)
        failed = True
        try:
            yield
            failed = False
        finally:
            # After an error the others may be waiting for this process, and leaving would wait for them: it just ends.
            if not failed or torch.distributed.get_world_size() == 1:
                torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables, until the end: where these stayed, accelerate and others would join a process group by them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and megatron-core's generators. Needs megatron-core's parallel state."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # On CPU the inference tracker, whose `fork` does nothing: there are no CUDA generators to switch between.
    tensor_parallel.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=not has_gpu())
