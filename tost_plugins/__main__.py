"""`python -m tost_plugins` is `tost`."""

from tost_plugins.lab.cli import main

if __name__ == "__main__":
    main()
