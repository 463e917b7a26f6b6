"""The `mote-cli` command: parses, calls the library, prints. It holds no logic of its own."""
