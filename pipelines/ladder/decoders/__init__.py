"""What each loss of a decoder is worth, on scenes: trainings that differ in it alone, side by side."""
