"""Launchers start workers, on this machine, with SLURM or with Ray. The workers decide from the run folders what to train."""
