"""Heads that are fitted to features in closed form, or in a few passes over them, in place of epochs of steps."""
