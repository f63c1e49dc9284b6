"""GGUF files: read, dequantized, and written as a Hugging Face directory."""
