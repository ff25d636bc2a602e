"""A draft's repository: its files, loading and saving, metrics, card, inspection."""
