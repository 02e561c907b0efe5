"""Modules that hold beta, and what puts them on a model, watches them, or takes batch norm out."""
