"""Train; see vlm/cli/root_scripts.py."""

from vlm.cli.root_scripts import main_train

if __name__ == "__main__":
    main_train()
