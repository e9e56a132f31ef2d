"""Moves that change the numbers but not the function."""
