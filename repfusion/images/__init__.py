"""Images of any kind -> upright 8-bit RGB, the one way in which this project decodes them."""
