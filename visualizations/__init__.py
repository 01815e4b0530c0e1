"""Figures that explain EGGROLL."""
