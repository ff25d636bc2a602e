"""What the repository's own pages are made with, outside the package: `python -m benchmarks.study` and others, in a clone."""
