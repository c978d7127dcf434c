"""Chat in the terminal; see vlm/cli/chat.py."""

from vlm.cli.chat import main_cli_demo

if __name__ == "__main__":
    main_cli_demo()
