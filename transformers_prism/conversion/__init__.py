"""Drafts that others trained, turned into a [`PrismDraftModel`]: one file for each form of checkpoint."""
