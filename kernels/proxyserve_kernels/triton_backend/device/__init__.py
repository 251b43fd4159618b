"""What runs on the device, in the subset of Python that Triton compiles, and the layout of what it reads and writes."""
