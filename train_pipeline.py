"""Train in pipeline stages; see vlm/cli/train.py."""

from vlm.cli.train import main_train_pipeline

if __name__ == "__main__":
    main_train_pipeline()
