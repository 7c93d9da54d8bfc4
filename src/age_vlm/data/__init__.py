"""Training data and evaluation questions; import its modules by name, each costs only what it uses."""
