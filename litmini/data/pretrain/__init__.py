"""From raw text to token shards on disk, and from shards to sequences."""
