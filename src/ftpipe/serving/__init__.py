"""A policy that answers: in the terminal, and behind an OpenAI-compatible endpoint."""
