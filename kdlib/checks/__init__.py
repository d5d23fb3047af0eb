"""What can be told before a long training: whether data, teacher, student and loss look as if they fit together."""
