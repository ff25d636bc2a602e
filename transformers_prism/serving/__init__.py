"""`transformers serve` with a draft."""
