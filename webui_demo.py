"""Chat in the browser; see vlm/cli/chat.py."""

from vlm.cli.chat import main_webui_demo

if __name__ == "__main__":
    main_webui_demo()
