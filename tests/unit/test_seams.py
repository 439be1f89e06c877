"""Every name of another project that nobody promised us is where we need it; docs/seams.md says why each is used.

Run as a program it prints what is wrong with each, from a process where nothing has been patched.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import megatron.sft

PACKAGE = Path(megatron.sft.__file__).parent
ROOT = PACKAGE.parents[1]
# Full name to the parameters that it must take.
SEAMS: dict[str, list[str]] = {
    # torch, on the CPU only
    "torch.cuda.current_device": [],
    "torch.cuda.synchronize": [],
    "torch.cuda.get_rng_state": [],
    "torch.cuda.random.get_rng_state": [],
    "torch.cuda.set_rng_state": [],
    "torch.cuda.manual_seed": [],
    "torch.cuda.default_generators": [],
    "torch.cuda.current_stream": [],
    "torch.cuda.stream": [],
    "torch.cuda.Stream": [],
    "torch.cuda.Event": [],
    "torch.compile": [],
    "torch._dynamo.config.disable": [],
    "torch.distributed.all_to_all_single": [],
    "torch.overrides.TorchFunctionMode": [],
    "torch.Tensor.cuda": [],
    "torch.Tensor.type": [],
    # torch, everywhere
    "torch.distributed.distributed_c10d._get_default_store": [],
    "torch.distributed.checkpoint.filesystem._StorageInfo": ["relative_path", "offset", "length", "transform_descriptors"],
    "torch._utils._rebuild_tensor_v2": ["storage", "storage_offset", "size", "stride"],
    "torch._utils._rebuild_parameter": ["data"],
    "torch.serialization._get_layout": ["name"],
    "torch.nn.attention.varlen.varlen_attn": [
        "query",
        "key",
        "value",
        "cu_seq_q",
        "cu_seq_k",
        "max_q",
        "max_k",
        "scale",
        "window_size",
        "return_aux",
    ],
    "torch.nn.attention.varlen._varlen_attn_backward": [],
    "torch.UntypedStorage.resize_": [],
    "torch.nn.Module._apply": ["fn", "recurse"],
    "torch.nn.Module.forward": [],
    "torch.optim.adam.Adam.exp_avg_sq": [],
    "torch._fused_adamw_": [],
    "torch.cuda.cudart": [],
    # torchrun
    "torch.distributed.launcher.api.LocalElasticAgent": [],
    "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent._start_workers": ["worker_group"],
    "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent._monitor_workers": ["worker_group"],
    "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent._pcontext": [],
    "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent._worker_group": [],
    "torch.distributed.elastic.multiprocessing.api.PContext.error_files": [],
    "torch.distributed.elastic.multiprocessing.api.SubprocessContext.subprocess_handlers": [],
    "torch.distributed.TCPStore": [],
    "torch.distributed.run.parse_args": ["args"],
    "torch.distributed.run.run": ["args"],
    "torch.distributed.launcher.api.LaunchConfig.signals_to_handle": [],
    # megatron-core: names replaced or set
    "megatron.core.tensor_parallel.random._lazy_call": [],
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": [],
    "megatron.core.extensions.transformer_engine": [],
    "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda": [],
    "megatron.core.tensor_parallel.layers._grad_accum_fusion_available": [],
    "megatron.core.optimizer.optimizer.MegatronOptimizer.get_grad_norm": ["self"],
    "megatron.core.transformer.transformer_block.TransformerBlock.config": [],
    "megatron.core.transformer.moe.paged_stash.paged_stash_copy_kernel": [],
    "megatron.core.models.gpt.GPTModel.output_layer": [],
    # megatron-core: methods overridden
    "megatron.core.models.gpt.GPTModel._preprocess": ["input_ids", "position_ids", "packed_seq_params"],
    "megatron.core.models.gpt.GPTModel._postprocess": ["hidden_states"],
    "megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator._communicate_shapes": [
        "tensor_send_next",
        "tensor_send_prev",
        "recv_prev",
        "recv_next",
    ],
    "megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator.__init__": ["pp_group", "config"],
    "megatron.core.transformer.transformer_layer.TransformerLayer.forward": [],
    "megatron.core.transformer.attention.Attention.num_query_groups_per_partition": [],
    "megatron.core.transformer.attention.Attention.hidden_size_per_attention_head": [],
    "megatron.core.transformer.transformer_layer.TransformerLayerSubmodules.sharded_state_dict_keys_map": [],
    # megatron-core: attributes that only its own code uses
    "megatron.core.distributed.DistributedDataParallel.buffers": [],
    "megatron.core.distributed.DistributedDataParallel.expert_parallel_buffers": [],
    "megatron.core.distributed.DistributedDataParallel.disable_forward_pre_hook": ["self"],
    "megatron.core.distributed.DistributedDataParallel.enable_forward_pre_hook": ["self"],
    "megatron.core.distributed.DistributedDataParallel._make_forward_pre_hook": ["self"],
    "megatron.core.distributed.DistributedDataParallel.grad_added_to_main_grad": [],
    "megatron.core.distributed.DistributedDataParallel.zero_out_wgrad": [],
    "megatron.core.distributed.DistributedDataParallel.main_grad": [],
    "megatron.core.tensor_parallel.layers.set_tensor_model_parallel_attributes": ["tensor", "is_parallel", "dim", "stride"],
    "megatron.core.tensor_parallel.layers.linear_with_frozen_weight": ["input", "weight"],
    "megatron.core.distributed.finalize_model_grads.sequence_parallel": [],
    "megatron.core.distributed.DistributedDataParallel.allreduce": [],
    "megatron.core.distributed.DistributedDataParallel.bucket_groups": [],
    "megatron.core.distributed.DistributedDataParallel.expert_parallel_bucket_groups": [],
    "megatron.core.distributed.DistributedDataParallel.zero_grad_buffer": ["self"],
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.start_grad_sync": ["force_all_reduce"],
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.grad_reduce_handle": [],
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.start_param_sync": ["force_sync"],
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.param_gather_dispatched": [],
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.intra_distributed_optimizer_instance_size": [],
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.buckets": [],
    "megatron.core.models.common.language_module.language_module.LanguageModule.is_embedding_or_output_parameter": [],
    "megatron.core.models.common.language_module.language_module.LanguageModule.shared_embedding": [],
    "megatron.core.tensor_parallel.layers.tensor_model_parallel": [],
    "megatron.core.optimizer.optimizer.ChainedOptimizer.chained_optimizers": [],
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.is_stub_optimizer": [],
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.gbuf_ranges": [],
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.model_param_group_index_map": [],
    "megatron.core.optimizer.USING_PYTORCH_OPTIMIZER": [],
    "megatron.core.optimizer.Adam": [],
    "megatron.core.optimizer.distrib_optimizer.Adam": [],
    "megatron.core.optimizer.is_te_min_version": ["version"],
    "megatron.core.optimizer.optimizer_config.OptimizerConfig.use_precision_aware_optimizer_no_fp8_or_ds_fp8": [],
    "megatron.core.optimizer.get_standard_config_overrides": ["config"],
    "megatron.core.optimizer.optimizer_config.ParamKey": ["name"],
    "megatron.core.optimizer_param_scheduler.ParamGroupOverride.max_lr": [],
    "megatron.core.optimizer_param_scheduler.get_canonical_lr_for_logging": ["param_groups"],
    "megatron.core.optimizer.optimizer.MegatronOptimizer.get_main_grads_for_grad_norm": ["self"],
    "megatron.core.optimizer.optimizer.MegatronOptimizer.get_grads_for_grad_norm": ["self"],
    "megatron.core.optimizer.optimizer.MegatronOptimizer.get_grad_stats_parallel_group": ["self"],
    "megatron.core.tensor_parallel.model_parallel_cuda_manual_seed": ["seed", "inference_rng_tracker"],
    "megatron.core.dist_checkpointing.mapping.ShardedTensor": [
        "key",
        "data",
        "local_shape",
        "global_shape",
        "global_offset",
        "replica_id",
        "prepend_axis_num",
        "allow_shape_mismatch",
    ],
    "megatron.core.pipeline_parallel.schedules.get_schedule_table": [
        "num_microbatches",
        "num_model_chunks",
        "microbatch_group_size_per_vp_stage",
    ],
    "megatron.core.pipeline_parallel.schedules.forward_backward_pipelining_with_interleaving": [
        "p2p_communicator",
        "pg_collection",
    ],
    "megatron.core.pipeline_parallel.schedules.forward_backward_pipelining_without_interleaving": [
        "p2p_communicator",
        "pg_collection",
    ],
    "megatron.core.fp8_utils.get_fp8_recipe": ["config"],
    "megatron.core.transformer.module.MegatronModule.is_first_microbatch": [],
    "megatron.core.transformer.transformer_config.TransformerConfig.hetereogenous_dist_checkpoint": [],
    "megatron.core.transformer.transformer_layer.get_transformer_layer_offset": ["config", "vp_stage", "pp_rank"],
    "megatron.core.models.gpt.gpt_layer_specs.get_gpt_layer_local_spec": [],
    "megatron.core.transformer.utils.make_sharded_tensors_for_checkpoint": [
        "state_dict",
        "prefix",
        "tensor_parallel_layers_axis_map",
        "sharded_offsets",
        "tp_group",
        "dp_cp_group",
    ],
    "megatron.core.transformer.utils.ensure_metadata_has_dp_cp_group": ["metadata"],
    # Transformer Engine
    "transformer_engine.pytorch.module.base.TransformerEngineBaseModule.fp8_meta": [],
    "transformer_engine.pytorch.module.base.TransformerEngineBaseModule.init_fp8_meta_tensors": ["recipe"],
    "transformer_engine.pytorch.Linear.fuse_wgrad_accumulation": [],
    "transformer_engine.pytorch.optimizers.FusedAdam.initialize_state": ["param", "store_param_remainders"],
    "transformer_engine.pytorch.optimizers.FusedAdam.master_param": [],
    # transformers and others
    "transformers.utils.chat_template_utils._compile_jinja_template": ["chat_template"],
    "transformers.utils.chat_template_utils.render_jinja_template": [
        "conversations",
        "tools",
        "chat_template",
        "return_assistant_tokens_mask",
    ],
    "transformers.PreTrainedTokenizerFast.backend_tokenizer": [],
    "transformers.PreTrainedTokenizerFast._tokenizer": [],
    "tokenizers.Tokenizer.encode_special_tokens": [],
    "datasets.data_files.DataFilesDict": [],
    "wandb.Settings._offline": [],
    "sys._current_frames": [],
    "transformers.PretrainedConfig._attn_implementation": [],
    "liger_kernel.transformers._apply_liger_kernel_to_instance": ["model"],
    "transformers.models.qwen3_5.modeling_qwen3_5.causal_conv1d_fn": [],
    "fla.modules.causal_conv1d.causal_conv1d": ["x", "weight", "activation", "cu_seqlens", "cu_seqlens_cpu"],
    "fla.modules.norm.fused_norm_gate.rms_norm_gated": ["x", "g", "weight", "bias", "activation", "eps"],
    "fla.ops.gated_delta_rule.chunk_gated_delta_rule": [
        "q",
        "k",
        "v",
        "g",
        "beta",
        "use_qk_l2norm_in_kernel",
        "cu_seqlens",
        "cu_seqlens_cpu",
    ],
}

# The version of megatron-core that has the name, where only one has.
VERSIONS = {
    "megatron.core.optimizer.optimizer.MegatronOptimizer.get_main_grads_for_grad_norm": "0.16.",
    "megatron.core.optimizer.optimizer.MegatronOptimizer.get_grads_for_grad_norm": "0.19.",
    "megatron.core.transformer.moe.paged_stash.paged_stash_copy_kernel": "0.19.",
}

# What the file that uses it says instead of the name.
USED_AS = {
    "__init__": "P2PCommunicator",
    "forward_backward_pipelining_with_interleaving": "get_forward_backward_func",
    "forward_backward_pipelining_without_interleaving": "get_forward_backward_func",
    "linear_with_frozen_weight": "requires_grad_",  # it follows from it
}


def problem(name: str, parameters: list[str]) -> str:
    """What is wrong with a name, or nothing. An attribute that objects get later must occur in its owner's source."""
    owner_name, _, last = name.rpartition(".")
    try:
        owner = pkgutil.resolve_name(owner_name)
    except (ImportError, AttributeError) as error:
        return f"{owner_name}: {error}"
    if not hasattr(owner, last):
        if parameters or not re.search(rf"\b{last}\b", source_of(owner)):
            return f"{owner_name} has no {last}"
        return ""
    if not parameters:
        return ""
    lacking = [parameter for parameter in parameters if parameter not in inspect.signature(getattr(owner, last)).parameters]
    return f"{name} does not take {', '.join(lacking)}" if lacking else ""


def source_of(owner: Any) -> str:
    """The source of a module, or of a class and of those above it in the same library."""
    owners = [owner] if isinstance(owner, ModuleType) else inspect.getmro(owner) if isinstance(owner, type) else [owner]
    library = getattr(owner, "__module__", owner.__name__).split(".")[0]
    found = ""
    for one in owners:
        if getattr(one, "__module__", library).split(".")[0] == library:
            try:
                found += inspect.getsource(one)
            except (OSError, TypeError):  # not written in Python
                found += " ".join(dir(one))
    return found


def installed(name: str) -> bool:
    return importlib.util.find_spec(name.split(".")[0]) is not None


def listed() -> dict[str, tuple[str, str, str]]:
    """The page's rows: name to where, why and what would replace it."""
    page = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line.startswith("| `")]
    assert len({row[0] for row in rows}) == len(rows), "a name stands there twice"
    return {row[0].strip("`"): (row[1].strip("`"), row[2], row[3]) for row in rows}


@pytest.fixture(scope="module")
def problems() -> dict[str, str]:
    """Of every name, from its own process: other tests patch torch in this one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-W", "ignore", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    found: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", SEAMS)
def test_the_name_exists_and_takes_what_we_give(name: str, problems: dict[str, str]) -> None:
    if not installed(name):
        pytest.skip(f"{name.split('.')[0]} is not installed")
    if not importlib.metadata.version("megatron-core").startswith(VERSIONS.get(name, "")):
        pytest.skip(f"of megatron-core {VERSIONS[name]}x")
    assert problems[name] == ""


def test_the_page_and_this_test_list_the_same_names_in_the_same_order() -> None:
    assert list(listed()) == list(SEAMS)


def test_the_page_gives_the_file_that_uses_each_name_a_reason_and_a_replacement() -> None:
    stale = []
    for name, (where, why, replacement) in listed().items():
        file = next((path for path in (PACKAGE / where, ROOT / where) if path.is_file()), None)
        last = name.rpartition(".")[2]
        used = file is not None and re.search(rf"\b{USED_AS.get(last, last)}\b", file.read_text(encoding="utf-8"))
        if not (used and why and replacement):
            stale.append(f"{name} in {where}")
    assert not stale, "no such file, a file that does not use the name, or an empty cell"


@pytest.mark.parametrize(
    "name, parameters, reported",
    [
        ("torch.cuda.current_devise", [], "current_devise"),
        ("torch.distributed.run.parse_arguments", ["args"], "parse_arguments"),
        ("torch.distributed.run.parse_args", ["args", "environment"], "environment"),
        ("torch.distributed.runner.run", [], "runner"),
        ("torch.optim.adam.Adam.exp_avg_cubed", [], "exp_avg_cubed"),
    ],
)
def test_a_renamed_name_or_parameter_is_reported(name: str, parameters: list[str], reported: str) -> None:
    assert reported in problem(name, parameters)


def test_every_private_name_of_another_project_is_listed() -> None:
    trees = {path: ast.parse(path.read_text()) for path in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    own = {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for _, node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.id for _, node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assigned = {
        (path, node.attr)
        for path, node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and foreign(node.value, trees[path])
    }
    private = {
        (path, name)
        for path, node in nodes
        for name in (
            [node.attr]
            if isinstance(node, ast.Attribute)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if re.match("_[a-z]", name) and (name not in own or (path, name) in assigned)
    }
    names = {part for name in SEAMS for part in name.split(".")} | {"_exit"}  # Python documents os._exit
    lacking = {f"{path.name}: {name}" for path, name in private | assigned if name not in names}
    assert not lacking, "private or replaced names that docs/seams.md does not list"


def foreign(node: ast.expr, tree: ast.Module) -> bool:
    """Whether an expression starts with a module or a name that is imported from another project."""
    while isinstance(node, ast.Attribute):
        node = node.value
    imports = [found for found in ast.walk(tree) if isinstance(found, ast.Import | ast.ImportFrom)]
    others = [
        found
        for found in imports
        if not (isinstance(found, ast.ImportFrom) and (found.module or "").startswith("megatron.sft"))
    ]
    bound = {(alias.asname or alias.name).split(".")[0] for found in others for alias in found.names}
    return isinstance(node, ast.Name) and node.id in bound


@pytest.mark.parametrize("name", ["torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"])
def test_a_file_of_torch_save_names_what_ours_reads(name: str) -> None:
    import io
    import pickletools
    import zipfile

    import torch

    buffer = io.BytesIO()
    torch.save({"tensor": torch.ones(2), "parameter": torch.nn.Parameter(torch.ones(2))}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (pickled,) = [archive.read(entry) for entry in archive.namelist() if entry.endswith("data.pkl")]
    names = [
        str(argument).replace(" ", ".") for operation, argument, _ in pickletools.genops(pickled) if operation.name == "GLOBAL"
    ]
    assert name in names


if __name__ == "__main__":
    print()
    print(json.dumps({name: problem(name, parameters) for name, parameters in SEAMS.items() if installed(name)}))
