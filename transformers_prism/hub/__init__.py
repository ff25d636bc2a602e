"""A draft's repository beside its code: metrics, card, inspection."""
