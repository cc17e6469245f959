"""What is done to a trained model: quantize it, allocate bits to its layers, probe what quantization does to its gradients."""
