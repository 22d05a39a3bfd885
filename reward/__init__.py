"""How good, and how harmful, is this video? Knows nothing of diffusion."""
