"""Pretrained backbones with a new head: built, filled with weights, and divided into layer groups."""
