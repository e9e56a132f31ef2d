"""What a model is worth: perplexity, divergence from full precision, bits."""
