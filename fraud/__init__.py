"""The scoring core: what a transaction meets between validation and decision, the same online and offline."""
