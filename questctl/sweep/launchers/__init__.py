"""Launchers start workers, and nothing more: who trains what is settled between the workers and the run folders."""
