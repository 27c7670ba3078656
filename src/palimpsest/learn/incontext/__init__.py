"""Learning without changing a weight: what stands in the context decides the answer."""
