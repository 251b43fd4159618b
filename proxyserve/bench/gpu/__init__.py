"""What decoding costs on a GPU, beside what its bytes must cost: random models that are made on the device."""
