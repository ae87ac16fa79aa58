"""What foretells what a token will want. Arrays in, arrays out, no I/O."""
