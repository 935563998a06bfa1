"""A recipe pinned to what it was made of."""
