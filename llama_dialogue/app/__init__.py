"""The demo, one reply, and the command line."""
