"""From prompts to text: batches, sampling, speculative decoding, several adapters at once."""
