"""Side-by-side timings with peers."""
