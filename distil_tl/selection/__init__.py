"""Choosing a backbone by its accuracy on the images: what is tried, what it costs, and the result."""
