"""Measurements: decoding with and without a draft, and the cost of a round."""
