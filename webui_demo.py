"""Chat in the browser; see vlm/cli/root_scripts.py."""

from vlm.cli.root_scripts import main_webui_demo

if __name__ == "__main__":
    main_webui_demo()
