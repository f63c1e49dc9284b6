"""Hugging Face directories and PEFT adapters: read, written, merged and published."""
