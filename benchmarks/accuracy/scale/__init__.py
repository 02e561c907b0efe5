"""What variance the ratio asks for: its expectation, and layers that learn by VCL alone."""
