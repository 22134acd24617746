"""The command line. Every module below parses options, calls the library and prints; nothing else imports it."""

from edgeguard.cli.app import main

__all__ = ["main"]
