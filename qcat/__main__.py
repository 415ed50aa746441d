"""`python -m qcat`: the command `qcat`, also if the scripts folder is not on the path."""

from qcat.cli import main

if __name__ == "__main__":
    main()
