"""Other libraries' interfaces over Festina's layers, for code that should run with only its import changed."""
