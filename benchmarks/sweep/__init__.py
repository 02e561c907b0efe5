"""The launch settings that rules choose, timed against their neighbours: what the rules of the kernels rest on."""
