"""The `trunkline` program: finds its own packages, whatever the folder it is called in holds."""
