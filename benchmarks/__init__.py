"""Scripts that make the repository's own pages, outside the package: `python -m benchmarks.study` and others, in a clone."""
