"""What else a user could decode the same prompts with, side by side on one machine."""
