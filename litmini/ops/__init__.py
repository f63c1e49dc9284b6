"""The operations of models: attention, KV caches, the loss, norms, rounding. Nothing here depends on a family or a method."""
