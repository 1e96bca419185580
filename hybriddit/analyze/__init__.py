"""What the command `analyze` does: which attention layers of a teacher can become what, measured on its own images."""
