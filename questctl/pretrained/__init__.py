"""Checkpoints that people have, read without torch: the model that a folder or file describes, its weights' names and hash."""

from .names import EMBED, HEAD, gguf_name, hf_name, linear_name
from .source import TEACHER, Source, open_source, same_weights

__all__ = ["EMBED", "HEAD", "TEACHER", "Source", "gguf_name", "hf_name", "linear_name", "open_source", "same_weights"]
