"""The command line: one file per command, which parses, makes one public call and prints what that returns."""
