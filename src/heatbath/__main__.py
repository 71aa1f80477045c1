"""`python -m heatbath` is the command `heatbath`."""

from heatbath.cli import main

if __name__ == "__main__":
    main()
