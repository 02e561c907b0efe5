"""Does VCL help? Accuracy studies on real data, and the questions that the paper leaves open."""
