"""The cards: the only room that imports pynvml."""
