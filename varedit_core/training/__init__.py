"""Training of the networks; nothing here is imported for editing."""
