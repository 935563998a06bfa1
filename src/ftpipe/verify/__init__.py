"""`ftpipe verify`: make a run again from its record, and say where the two part."""
