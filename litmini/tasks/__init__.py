"""What is learned, one file for each task, and the setup around the loop."""
