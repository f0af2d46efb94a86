"""Curves of loss against LR: their optima, how these move with size, and what that costs."""
