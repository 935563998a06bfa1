"""A policy as a folder that others load: merged, compared, described; for llama.cpp too."""
