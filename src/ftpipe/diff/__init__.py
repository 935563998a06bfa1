"""``ftpipe diff``: what two runs, artifacts or recipes have not in common."""
