"""Whether a run fits: weights, memory, steps, disk and time of each training, with nothing loaded."""
