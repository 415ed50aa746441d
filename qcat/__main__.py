"""`python -m qcat`: the command `qcat`, also where the folder of programs is not on the path."""

from qcat.cli import main

if __name__ == "__main__":
    main()
