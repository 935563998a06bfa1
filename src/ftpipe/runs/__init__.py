"""``ftpipe runs``: what was run, where it came from, what can go, and how it travels."""
