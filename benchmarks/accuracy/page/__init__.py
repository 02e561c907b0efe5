"""The sections of the page of findings, each from its results."""
