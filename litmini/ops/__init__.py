"""What models are made of: attention, caches, the loss, norms, rounding. Nothing here knows a family or a method."""
