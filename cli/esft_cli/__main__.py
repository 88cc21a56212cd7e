"""`python -m esft_cli`, the same as `esft`."""

from esft_cli.main import run

if __name__ == "__main__":
    run()
