"""Backbones: networks that map inputs to embeddings, independent of classes."""
