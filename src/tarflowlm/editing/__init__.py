"""Editing a text: draw some of its words given all others, or change its states."""
