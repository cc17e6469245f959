"""What a model can do: its loss on held-out text, its accuracy on tasks, the text that it generates."""
