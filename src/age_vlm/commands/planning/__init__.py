"""What a training run needs, before it is started: memory, computation, hours, cost."""
