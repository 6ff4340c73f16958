"""What W&B and the Bento store know of the models: runs, artifacts, aliases, and the way back."""
