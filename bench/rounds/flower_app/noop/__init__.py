"""Rounds without training in Flower."""
