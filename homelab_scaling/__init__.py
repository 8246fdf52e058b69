"""A scaling-law lab for one workstation: text in, trained ladder, fitted law, honest report out."""

__version__ = "0.1.0"
