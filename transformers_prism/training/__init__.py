"""Training a draft: the target's features, training-time-test steps, their losses and the trainer."""
