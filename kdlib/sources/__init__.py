"""Reading what a data set is made of: files and folders, checked before anything is computed from them."""
