"""What a round is made of: the draft's side, the target's side, trees, caches, masks, sequences and random numbers."""
