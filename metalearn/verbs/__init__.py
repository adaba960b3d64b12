"""What the verbs of the command line do, one file each, once a command line is parsed."""
