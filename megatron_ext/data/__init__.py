"""Raw text to token batches: demo text, tokenizing, shards, and the loader that training reads."""
