"""Figures and pages; no torch."""
