"""Synchronization with W&B: runs, artifacts and aliases, in both directions."""
