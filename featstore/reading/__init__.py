"""Reading a store: its rows and arrays are checked before they are used."""
