"""The loop and what it needs: optimizer, memory and FLOP accounting, compilation. It knows no data, method or file format."""
