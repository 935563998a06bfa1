"""Slurm: jobs for the stages of a run, the ranks of a job, and what became of them."""
