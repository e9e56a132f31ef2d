"""Protect: what is kept from rounding."""
