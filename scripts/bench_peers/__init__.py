"""What `scripts/bench_train.py` times: one file per trainer, and what all of them are given."""
