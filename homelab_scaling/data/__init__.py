"""Text in, batches out: sources, tokenizers, shards, batches."""
