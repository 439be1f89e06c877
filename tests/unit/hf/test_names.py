"""Names of folders, and the files of a repository that are wanted."""

from megatron.sft.download import wanted_files
from megatron.sft.hf.names import data_folder_name, model_folder_name


def test_folder_names_are_the_ids_with_the_separators_replaced_and_nothing_else() -> None:
    assert model_folder_name("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B") == "deepseek_ai_DeepSeek_R1_Distill_Qwen_1.5B"
    assert data_folder_name("Vinnnf/Hybrid-OpenThoughts2-1M-1.5B") == "Vinnnf-Hybrid-OpenThoughts2-1M-1.5B"


def test_second_copies_of_the_weights_are_skipped_only_where_safetensors_exist() -> None:
    files = dict.fromkeys(
        ["model-00001-of-00002.safetensors", "pytorch_model.bin", "consolidated.safetensors", "vocab.json"], 1
    )
    assert wanted_files(files) == ["model-00001-of-00002.safetensors", "vocab.json"]
    files = dict.fromkeys(["pytorch_model.bin", "tf_model.h5", "original/params.json", "config.json"], 1)
    assert wanted_files(files) == ["pytorch_model.bin", "config.json"]
