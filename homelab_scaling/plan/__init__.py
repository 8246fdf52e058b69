"""Pure arithmetic: parameters, FLOPs, VRAM, time, energy, money, and the plan of a ladder."""
