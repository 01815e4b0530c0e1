"""Figures that explain EGGROLL, one module for each, and the script that draws them."""
