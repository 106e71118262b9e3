"""What a training leaves on disk: checkpoints and the names of every file beside them."""
