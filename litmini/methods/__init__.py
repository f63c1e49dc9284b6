"""Layers that take the place of a model's linears: LoRA, DoRA, IA3, 4-bit weights. No method knows a family."""
