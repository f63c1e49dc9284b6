"""The training loop, optimizers, memory and FLOP accounting, compilation. Independent of data, methods and file formats."""
