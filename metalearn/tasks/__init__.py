"""What a task is: its types, where inputs come from, how episodes are drawn, and how a task is learned from and scored."""
