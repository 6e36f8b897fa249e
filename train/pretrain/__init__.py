"""Pretraining of the embedded model on a curriculum of questions about people."""
