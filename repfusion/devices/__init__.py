"""What a device can do and computes in, what does not fit it, and what is compiled for it."""
