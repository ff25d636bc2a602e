"""The transformers-prism command."""
