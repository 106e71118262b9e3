"""Where images and captions come from: one file a kind of source."""
