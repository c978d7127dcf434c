"""Train; see vlm/cli/train.py."""

from vlm.cli.train import main_train

if __name__ == "__main__":
    main_train()
