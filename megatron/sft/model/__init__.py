"""The network: megatron-core's GPTModel with this project's attention, norms, rotary positions and output head.

`config` is the only place that builds a TransformerConfig, `gpt` the only one that builds a model.
"""
