"""The gated delta net of Qwen3-Next and Qwen3.5: linear attention with a state that each conversation starts empty."""
