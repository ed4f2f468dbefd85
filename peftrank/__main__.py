"""`python -m peftrank` is the command `peftrank`."""

from peftrank.cli import main

if __name__ == "__main__":
    main()
