"""What can be read off a store; nothing here writes."""
