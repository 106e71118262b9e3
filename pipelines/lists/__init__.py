"""What others wrote beside their images: lists in any format, captions, further values."""
