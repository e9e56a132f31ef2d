"""Moves that give back what rounding took."""
