"""Chat in the browser; see vlm/cli/webui.py."""

from vlm.cli.webui import main_webui_demo

if __name__ == "__main__":
    main_webui_demo()
