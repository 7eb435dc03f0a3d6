"""Linear stand-ins for parts of blocks, and blocks removed for good."""
