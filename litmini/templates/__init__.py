"""Chat templates: where they come from, rendering, in which form they want messages, and how calls of tools are written.

Not here: token ids (`litmini/tokenizer.py`), and what of a conversation is trained (`litmini/data/`).
"""
