"""What trained models can do, and what the asking cost."""
