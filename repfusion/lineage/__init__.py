"""What checkpoints, exports and images were made from, and whether this machine still agrees."""
