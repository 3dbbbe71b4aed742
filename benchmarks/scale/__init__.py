"""Scaling with files and ranks: start-up time, memory, communication."""
