"""Hugging Face's side: the hub, model folders, safetensors files, tokenizer files."""
