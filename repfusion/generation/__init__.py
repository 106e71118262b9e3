"""What drawing from a command line asks for, checked before anything is sampled."""
