"""Mistral 7B v0.1 to v0.3, Nemo and Small, and Ministral 3: Llama's architecture, in some with a window in all layers.

Ministral 3 and the Mistral Small of 2025 have a vision tower next to the text model (`mistral3`).
"""

MODEL_TYPES = ("mistral", "ministral3")
WRAPPERS = ("mistral3",)
CARRIED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
SLIDING_WINDOW = True
OF_TYPE = {
    "mistral": {"DEFAULTS": {"sliding_window": 4096, "num_key_value_heads": 8}},
    "ministral3": {
        "DEFAULTS": {
            "sliding_window": None,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        # Queries grow with the position.
        "ROPE_FIELDS": ("llama_4_scaling_beta",),
    },
}
