"""Existing checkpoints, read without torch: the model that a folder or file describes, the names and hash of its weights."""

from .names import EMBED, HEAD, gguf_name, hf_name, linear_name
from .source import TEACHER, Source, open_source, same_weights

__all__ = ["EMBED", "HEAD", "TEACHER", "Source", "gguf_name", "hf_name", "linear_name", "open_source", "same_weights"]
