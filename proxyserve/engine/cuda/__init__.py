"""What a GPU is used with: kernels for paged attention, and steps that are captured once and replayed."""
