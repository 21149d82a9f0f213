"""Running networks, comparing them, and proving each fold."""
