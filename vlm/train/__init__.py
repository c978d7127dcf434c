"""The loop and what it needs. Parallelism is behind one call, `Engine.train_step`."""
