"""Chat in the terminal; see vlm/cli/root_scripts.py."""

from vlm.cli.root_scripts import main_cli_demo

if __name__ == "__main__":
    main_cli_demo()
