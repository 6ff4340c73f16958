"""What a process says of itself, whatever its transport: metrics and logs."""
