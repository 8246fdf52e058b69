"""One readable training loop on Accelerate."""
