"""Train in pipeline stages; see vlm/cli/root_scripts.py."""

from vlm.cli.root_scripts import main_train_pipeline

if __name__ == "__main__":
    main_train_pipeline()
