"""Checkpoints of others: downloads, other layouts, GGUF. Finetuning imports none of it when the checkpoint exists."""
