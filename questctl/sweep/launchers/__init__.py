"""Launchers start workers, on this machine, with SLURM or with Ray; the workers and the run folders settle who trains what."""
