"""Networks: a Llama whose linear layers are quantized afterwards, and what it costs in parameters, bits and FLOPs."""
