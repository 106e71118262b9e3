"""Clips of any kind -> frames of 8-bit RGB and back, the one way in which this project handles video."""
