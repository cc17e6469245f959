"""Evaluation of trained runs: loss on a text, accuracy on tasks, generated text.

runs.py: `evaluate_run` and `generate_text`, for whole runs · loss.py: validation loss of a model · generate.py: tokens after a
prompt · tasks.py: tasks of lm-eval.
"""

from .runs import Generation, evaluate_run, generate_text

__all__ = ["Generation", "evaluate_run", "generate_text"]
