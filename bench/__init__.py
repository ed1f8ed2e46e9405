"""Figures, each a small file: ratios within one run first, because machines differ."""
