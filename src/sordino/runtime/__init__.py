"""What runs after quantization: modules that hold packed codes, and the transformers plugin."""
