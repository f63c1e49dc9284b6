"""From files to packed sequences: readers, formats, tokens, packing, and the cache of tokens."""
