"""Solvers: how numbers get onto a grid."""
