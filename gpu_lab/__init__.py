"""Looking at GPU code on a machine without a GPU: compile it, read it, run it, model its time."""
