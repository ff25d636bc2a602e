"""Which tree to draft: settings, measured costs, and the automatic choice."""
