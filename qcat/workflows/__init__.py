"""The order of steps of each thing that qcat does, as functions without the command line."""
