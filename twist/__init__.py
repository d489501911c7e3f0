"""The command line. It knows every stage and does nothing itself; nobody imports it."""
