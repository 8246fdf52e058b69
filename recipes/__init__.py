"""What `accelerate launch` starts, and the shipped ladders."""
