"""Training a draft: the target's features, the aligned forwards, their losses and the trainer."""
