"""Figures and one page about trained runs (extra `plots`)."""
